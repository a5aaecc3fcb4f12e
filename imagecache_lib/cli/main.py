# SPDX-License-Identifier: Apache-2.0
"""The command itself: its options, and the list of its commands."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

from cliff import app, commandmanager

from imagecache_lib.cli import agent, cache, disk, hosts, image, precache

#: Each is a :class:`cliff.command.Command`.
_COMMANDS: dict[str, type[Any]] = {
    "agent": agent.Agent,
    "cache audit": cache.Audit,
    "cache check": cache.Check,
    "cache scrub": cache.Scrub,
    "cache usage": cache.Usage,
    "cache verify": cache.Verify,
    "disk create": disk.Create,
    "disk forget": disk.Forget,
    "host forget": hosts.Forget,
    "host list": hosts.List,
    "image cache": image.Cache,
    "image evict": image.Evict,
    "image explain": image.Explain,
    "image list": image.List,
    "image pin": image.Pin,
    "image show": image.Show,
    "image unpin": image.Unpin,
    "precache cancel": precache.Cancel,
    "precache list": precache.List,
    "precache plan": precache.Plan,
    "precache resume": precache.Resume,
    "precache start": precache.Start,
    "precache status": precache.Status,
}


class ImageCacheApp(app.App):
    """``imagecache``. A command of its own each time: there is no interactive mode."""

    NAME = "imagecache"

    def __init__(self) -> None:
        # The commands are listed above. cliff's own way, entry points, would search every installed package.
        manager = commandmanager.CommandManager("imagecache_lib.cli", convert_underscores=False)
        for name, command in _COMMANDS.items():
            manager.add_command(name, command)
        super().__init__(
            description="The image cache of this host.",
            version=importlib.metadata.version("imagecache-lib"),
            command_manager=manager,
            deferred_help=True,
        )

    def build_option_parser(
        self, description: str | None, version: str | None, argparse_kwargs: dict[str, object] | None = None
    ) -> argparse.ArgumentParser:
        # Else "--instances FILE", a command's option, would be taken for an abbreviated --instances-path.
        parser = super().build_option_parser(
            description, version, {**(argparse_kwargs or {}), "allow_abbrev": False}
        )
        parser.add_argument(
            "--config-file",
            action="append",
            default=[],
            metavar="PATH",
            help="oslo.config file, such as /etc/nova/nova.conf; may be given several times, later ones win. "
            "Default: imagecache.conf in ~/.imagecache, ~, /etc/imagecache or /etc, if there is one.",
        )
        parser.add_argument(
            "--instances-path", metavar="PATH", help="instances directory, instead of the configuration's"
        )
        return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return ImageCacheApp().run(arguments or ["--help"])


if __name__ == "__main__":
    sys.exit(main())
