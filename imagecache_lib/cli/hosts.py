# SPDX-License-Identifier: Apache-2.0
"""``imagecache host``: the hosts that share the cache, each of which must agree before a base image goes."""

from __future__ import annotations

import argparse
from typing import Any

from imagecache_lib.cli import base


class List(base.BaseLister):
    """List the hosts that share the cache."""

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        return ["Id", "Name", "This one", "Base images waiting for it"], [
            (host.id, host.name or "unreadable", host.is_this, host.blocks)
            for host in self.manager().list_hosts()
        ]


class Forget(base.Base):
    """Stop waiting for a host that is gone for good."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("id", help="as host list shows it")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        self.manager().forget_host(parsed_args.id)
