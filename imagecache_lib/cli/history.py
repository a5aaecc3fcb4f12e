# SPDX-License-Identifier: Apache-2.0
"""``imagecache history``: what happened to one base image, the first question after a lost disk."""

from __future__ import annotations

import argparse
from typing import Any

import imagecache_lib as ic
from imagecache_lib.cli import base, values


class History(base.BaseLister):
    """Show what happened to an image's base on every host that shares the cache, the oldest first.

    The base need not be in the cache any more.
    """

    droppable: tuple[str, ...] = ("program",)
    machine_only: tuple[str, ...] = ("process", "image", "base")
    examples = (
        "history 318ac4fb-a140-4405-8167-ad782f983e48",
        "history 0b2a7c4c1f6a3a3e5c1ad4be8c1b0c8f8a1d2e3f -f json",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "image",
            type=values.image_id,
            help="id of an image or name of a base image, as a disk's header has it; of what is in the "
            "cache, the image's name or the first letters will do",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        admin = self.admin()
        try:
            meant = base.base_of(admin, parsed_args.image)
        except ic.ImageNotFound:
            meant = parsed_args.image
        found = admin.history(meant)
        if not found:
            raise ic.ImageNotFound(
                "nothing is known of it",
                image=values.printable(parsed_args.image),
                next_step="give the whole id, or the name of its base image, as a disk's header has it",
            )
        header = ["when", "host", "what", "why", "program", "process", "image", "base"]
        return header, [self._row(each) for each in found]

    def _row(self, each: ic.Happening) -> list[Any]:
        return [
            values.Date(each.at),
            values.Label(each.host),
            values.Word(each.what),
            each.why,
            values.Label(each.program),
            each.process,
            each.image_id,
            each.name,
        ]
