# SPDX-License-Identifier: Apache-2.0
"""``imagecache host``: the hosts that share the cache, each of which must agree before a base image goes."""

from __future__ import annotations

import argparse
from typing import Any

from imagecache_lib.cli import base, values


class List(base.BaseLister):
    """List the hosts that share the cache."""

    examples = ("host list",)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        return ["id", "name", "is_this", "base_images_waiting"], [
            (
                values.Id(host.id),
                values.Label(host.name or "unreadable"),
                values.Yes(host.is_this),
                values.Count(host.blocks),
            )
            for host in self.admin().list_hosts()
        ]


class Forget(base.Base):
    """Stop waiting for a host that is gone for good."""

    examples = ("host forget 5e2b90c4d7a1f863",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("id", help="as host list shows it")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        admin = self.admin()
        if parsed_args.id not in [host.id for host in admin.list_hosts()]:
            raise base.Unknown(
                f"no host has the id {values.printable(parsed_args.id)!r}",
                next_step="see: imagecache host list",
            )
        admin.forget_host(parsed_args.id)
