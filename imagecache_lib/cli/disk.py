# SPDX-License-Identifier: Apache-2.0
"""``imagecache disk``: instance disks."""

from __future__ import annotations

import argparse
import os
from typing import Any

from imagecache_lib.cli import base, sources, values


class Create(base.BaseShow):
    """Make an instance disk from an image, which is fetched if it is not in the cache."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", help="id of an image")
        parser.add_argument("target", help="path of the disk; for rbd the name of an image in the pool")
        parser.add_argument(
            "--size",
            type=values.size,
            metavar="SIZE",
            help="virtual size, such as 20G (default: the image's)",
        )
        parser.add_argument(
            "--reuse",
            action="store_true",
            help="keep a disk that is there, make sure of its base, and grow it",
        )
        sources.add_options(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        manager = self.manager(sources.chosen(parsed_args, [parsed_args.image]))
        target = parsed_args.target
        if manager.backend.name != "rbd":
            target = os.path.abspath(target)
        disk = manager.create_disk(
            parsed_args.image,
            target,
            size=parsed_args.size,
            if_exists="reuse" if parsed_args.reuse else "error",
        )
        shown = {
            "target": disk.target,
            "format": disk.format,
            "virtual_size": values.Bytes(disk.virtual_size),
            "base": disk.base,
        }
        return list(shown), list(shown.values())


class Forget(base.BaseShow):
    """Say that disks which the pass saw, and does not see any more, are gone for good."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("path", help="of a disk, a directory or a disk root, as a problem names it")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        path = os.path.abspath(parsed_args.path)
        return ["path", "forgotten_disks"], [path, self.manager().forget_disks(path)]
