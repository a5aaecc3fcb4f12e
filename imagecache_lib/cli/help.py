# SPDX-License-Identifier: Apache-2.0
"""``imagecache help``: the commands, or one of them."""

from __future__ import annotations

import argparse

from cliff import help as cliff_help


class Help(cliff_help.HelpCommand):
    """Show the commands, or how one of them is used."""

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        try:
            return super().take_action(parsed_args)
        except ValueError:
            said = " ".join(parsed_args.cmd)
            self.app.stderr.write(
                f"{self.app.NAME}: error: there is no command {said!r}; see: imagecache help\n"
            )
            return 2

    def _load_hooks(self) -> None:
        self._hooks = []
