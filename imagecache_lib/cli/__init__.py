# SPDX-License-Identifier: Apache-2.0
"""The ``imagecache`` command, for operators. An extra: ``pip install imagecache-lib[cli]``."""

from __future__ import annotations

import sys


def run() -> int:
    """Run the command. Returns its exit code.

    This is what the console script calls: it can be imported without the extra, and says that it is lacking.
    """
    try:
        from imagecache_lib.cli import main
    except ModuleNotFoundError as error:
        sys.stderr.write(f"imagecache: {error.name} is not installed; install imagecache-lib[cli]\n")
        return 1
    return main.main()
