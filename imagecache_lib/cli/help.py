# SPDX-License-Identifier: Apache-2.0
"""``imagecache help``: the commands, or one of them."""

from __future__ import annotations

from cliff import help as cliff_help


class Help(cliff_help.HelpCommand):
    """Show the commands, or how one of them is used."""

    def _load_hooks(self) -> None:
        self._hooks = []
