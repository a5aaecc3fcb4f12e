# SPDX-License-Identifier: Apache-2.0
"""``imagecache disk``: instance disks."""

from __future__ import annotations

import argparse
import os
from typing import Any

import imagecache_lib as ic
from imagecache_lib.cli import base, sources, values
from imagecache_lib.store import layout


class Create(base.BaseShow):
    """Make an instance disk from an image, which is fetched if it is not in the cache."""

    examples = (
        "disk create 318ac4fb-a140-4405-8167-ad782f983e48 /var/lib/nova/instances/vm/disk --size 20G",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", type=values.image_id, help="id of an image")
        parser.add_argument(
            "target", type=values.path, help="path of the disk; for rbd the name of an image in the pool"
        )
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
        manager = self.manager(sources.chosen(parsed_args, [parsed_args.image], needed=False))
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

    examples = ("disk forget /var/lib/nova/instances/6c0d.../disk",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "path", type=values.path, help="of a disk, a directory or a disk root, as a problem names it"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        # An empty one, of a variable that is not set, would become the working directory's.
        path = os.path.abspath(parsed_args.path) if parsed_args.path else ""
        forgotten = self.admin().forget_disks(path)
        if not forgotten:
            raise base.Unknown(
                "no pass saw a disk there or below it",
                path=values.printable(path),
                next_step="give the path as a problem of imagecache cache verify names it",
            )
        return ["path", "forgotten_disks"], [path, forgotten]


class Repair(base.BaseShow):
    """Make sure of the base image that a disk needs, which is fetched again if it is missing.

    For a disk that came from another host, or whose base image was removed. Exactly the base image that
    the disk was made on is made again; a disk that says it needs anything else is refused.
    """

    examples = (
        "disk repair /var/lib/nova/instances/6c0d.../disk",
        "disk repair /var/lib/nova/instances/6c0d.../disk --image 318ac4fb-a140-4405-8167-ad782f983e48",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("disk", type=values.path, help="path of the disk")
        parser.add_argument(
            "--image", metavar="ID", help="the image that it was made from (default: as the cache knows it)"
        )
        parser.add_argument("--os-type", metavar="TYPE", help="of an ephemeral disk: the guest's type")
        parser.add_argument("--fs", metavar="FILESYSTEM", help="of an ephemeral disk: its filesystem")
        parser.add_argument("--label", metavar="LABEL", help="of an ephemeral disk: its filesystem's label")
        sources.add_options(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        path = os.path.abspath(parsed_args.disk)
        if not os.path.lexists(path):
            raise base.Unknown(
                "there is no such disk", path=values.printable(path), next_step="give the path of a disk"
            )
        manager = self.manager(sources.chosen(parsed_args, [parsed_args.image or path], needed=False))
        needed = manager.inspect_disk(path).base
        image = parsed_args.image or _image_of(manager, needed, path)
        found = manager.ensure_backing(
            path, image_id=image, os_type=parsed_args.os_type, fs=parsed_args.fs, label=parsed_args.label
        )
        if found is None:
            self.note("the disk stands alone: it needs no base image")
        shown = {
            "disk": path,
            "base": found.name if found is not None else None,
            "image": image,
            "format": found.format if found is not None else None,
            "virtual_size": values.Bytes(found.virtual_size if found is not None else None),
        }
        return list(shown), list(shown.values())


def _image_of(manager: ic.ImageCacheManager, name: str | None, path: str) -> str | None:
    """Return the image that a disk's base was made from, or None if it was made from none: swap, ephemeral.

    :raises ConfigError: only the operator can tell.
    """
    if name is None or layout.classify(name) in (layout.Kind.SWAP, layout.Kind.EPHEMERAL):
        return None
    known = manager.show_base(name)
    if known is not None and known.image_id is not None:
        return known.image_id
    raise ic.ConfigError(
        f"the base image {name} that the disk needs is not known here",
        path=path,
        next_step="name the image that the disk was made from with --image ID",
    )
