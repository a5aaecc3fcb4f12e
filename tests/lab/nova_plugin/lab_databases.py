# SPDX-License-Identifier: Apache-2.0
"""Makes the tables of Nova and of its one cell: what ``nova-manage`` does in four calls, in one process."""

import os
import sys
import warnings

warnings.simplefilter("ignore")
os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"

from nova.cmd import manage  # noqa: E402, I001  first, since it forbids eventlet before anything loads it
from nova import config, objects  # noqa: E402


def main():
    directory, cell0 = sys.argv[1:]
    files = [f"--config-file={directory}/{name}.conf" for name in ("nova", "databases")]
    objects.register_all()
    config.parse_args(["nova-manage", *files])
    cells = manage.CellV2Commands()
    for step, made in (
        ("API tables", lambda: manage.ApiDbCommands().sync()),
        ("cell0", lambda: cells.map_cell0(database_connection=cell0)),
        ("tables", lambda: manage.DbCommands().sync()),
        ("cell1", lambda: cells.create_cell(name="cell1")),
    ):
        if made():
            raise SystemExit(f"{step}: not made")


if __name__ == "__main__":
    main()
