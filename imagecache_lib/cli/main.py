# SPDX-License-Identifier: Apache-2.0
"""The command itself: its options, and the list of its commands."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import io
import itertools
import logging
import os
import sys
from collections.abc import Sequence

from cliff import app, commandmanager

from imagecache_lib import dates
from imagecache_lib.cli import parsing, values

_PACKAGE = "imagecache_lib.cli"

#: Where the class of each command is, a :class:`cliff.command.Command`: only the one that runs is loaded.
COMMANDS: dict[str, str] = {
    "agent": "agent:Agent",
    "cache audit": "cache:Audit",
    "cache check": "cache:Check",
    "cache report": "report:Report",
    "cache scrub": "cache:Scrub",
    "cache usage": "space:Usage",
    "cache verify": "cache:Verify",
    "complete": "completion:Complete",
    "df": "space:Df",
    "disk create": "disk:Create",
    "disk forget": "disk:Forget",
    "disk repair": "disk:Repair",
    "help": "help:Help",
    "history": "history:History",
    "host forget": "hosts:Forget",
    "host list": "hosts:List",
    "image cache": "image:Cache",
    "image evict": "image:Evict",
    "image explain": "image:Explain",
    "image list": "image:List",
    "image pin": "image:Pin",
    "image pins": "image:Pins",
    "image show": "image:Show",
    "image unpin": "image:Unpin",
    "precache cancel": "precache:Cancel",
    "precache list": "jobs:List",
    "precache plan": "precache:Plan",
    "precache resume": "precache:Resume",
    "precache start": "precache:Start",
    "precache status": "jobs:Status",
    "prune": "space:Prune",
}


class ImageCacheApp(app.App):
    """``imagecache``. A command of its own each time: there is no interactive mode."""

    NAME = "imagecache"

    def __init__(self) -> None:
        # The commands are listed above. cliff's own way, entry points, would search every installed package.
        manager = commandmanager.CommandManager(convert_underscores=False)
        super().__init__(
            description="The image cache of this host.",
            version=importlib.metadata.version("imagecache-lib"),
            command_manager=manager,
            deferred_help=True,
        )
        for name, where in COMMANDS.items():
            manager.commands[name] = importlib.metadata.EntryPoint(name, f"{_PACKAGE}.{where}", _PACKAGE)

    def run_subcommand(self, argv: list[str]) -> int:
        try:
            self.command_manager.find_command(argv)
        except ValueError:
            self.stderr.write(f"{self.NAME}: error: {self._unknown(argv)}\n")
            return 2
        return super().run_subcommand(argv)

    def _unknown(self, argv: list[str]) -> str:
        """Say what is wrong with a command line that names no command."""
        if argv[0].startswith("-"):
            options = [option for action in self.parser._actions for option in action.option_strings]
            return f"there is no option {argv[0]} before the command{_near(argv[0], options)}"
        words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
        rest = [name.split()[1] for name in COMMANDS if name.startswith(f"{words[0]} ")]
        if rest and len(words) == 1:
            return f"{words[0]} is followed by one of: {', '.join(rest)}"
        return f"there is no command {' '.join(words[:2])!r}{_near(' '.join(words[:2]), list(COMMANDS))}"

    def configure_logging(self) -> None:
        try:
            super().configure_logging()
        except OSError as error:
            path = dates.plain(str(self.options.log_file))
            self.parser.error(f"argument --log-file: {path} cannot be written: {error.strerror}")
        # What they have to say of each other is nothing to an operator.
        for handler in logging.getLogger().handlers:
            handler.addFilter(parsing.without_numbers)
            if parsing.is_journal(self.stderr, os.environ.get("JOURNAL_STREAM", "")):
                handler.setFormatter(parsing.JournalFormatter())
        for name in ("cliff", "urllib3"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # What they warn of is said in the error that follows, with what to do.
        for name in ("stevedore", "keystoneauth"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def build_option_parser(
        self, description: str | None, version: str | None, argparse_kwargs: dict[str, object] | None = None
    ) -> argparse.ArgumentParser:
        # Else "--instances FILE", a command's option, would be taken for an abbreviated --instances-path.
        parser = super().build_option_parser(
            description, version, {**(argparse_kwargs or {}), "allow_abbrev": False}
        )
        parsing.complain_in_one_line(parser)
        parser.add_argument(
            "--config-file",
            action="append",
            default=[],
            metavar="PATH",
            help="oslo.config file, such as /etc/nova/nova.conf; may be given several times, later ones win. "
            "Default: imagecache.conf in ~/.imagecache, ~, /etc/imagecache or /etc, if there is one.",
        )
        parser.add_argument(
            "--instances-path",
            type=values.path,
            metavar="PATH",
            help="instances directory, instead of the configuration's",
        )
        return parser


def _near(said: str, known: Sequence[str]) -> str:
    """Return a clause with what was most likely meant, and where help is."""
    found = difflib.get_close_matches(said, known, 1)
    return f"; {found[0]} is one" if found else "; see: imagecache help"


def _open_closed_streams() -> None:
    """Open those of the three standard streams that are closed.

    Else the next file that is opened has the number of one: a base image, into which a program that this one
    runs would write its complaints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w", buffering=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may be no text, and a list of them is worth more than the error.
        sys.stdout.reconfigure(errors="backslashreplace")
    return ImageCacheApp().run(arguments or ["--help"])


if __name__ == "__main__":
    sys.exit(main())
