# SPDX-License-Identifier: Apache-2.0
"""``imagecache image``: what is in the cache, and what shall be."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import imagecache_lib as ic
from imagecache_lib.cli import base, sources, values

_OWNER = "operator"
_IMAGE = "id of an image, or name of a base image in the cache"


class List(base.BaseLister):
    """List the base images in the cache."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--long", action="store_true", help="show more of each")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        header = ["Name", "Image", "Format", "Virtual size", "On disk", "Last use", "Pinned"]
        if parsed_args.long:
            header += ["Kind", "Origin", "Digest"]
        return header, [self._row(found, parsed_args.long) for found in self.manager().list_bases()]

    def _row(self, found: ic.CachedBase, long: bool) -> list[Any]:
        row = [
            found.name,
            found.image_id or "",
            found.stored_format or "",
            values.Bytes(found.virtual_size),
            values.Bytes(found.allocated),
            values.Date(found.last_use),
            ", ".join(pin.owner for pin in found.pins),
        ]
        if long:
            row += [found.kind, found.origin or "unchecked", str(found.digest or "")]
        return row


class Show(base.BaseShow):
    """Show what is known of one base image."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", help=_IMAGE)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        manager = self.manager()
        found = manager.show_base(parsed_args.image)
        if found is None:
            raise _absent(parsed_args.image)
        shown = {
            "name": found.name,
            "path": f"{manager.config.base_path}/{found.name}",
            "image": found.image_id,
            "kind": found.kind,
            "origin": found.origin
            or "unknown: another program made it, and it is checked before its first use",
            "source_format": found.source_format,
            "stored_format": found.stored_format,
            "virtual_size": values.Bytes(found.virtual_size),
            "length": values.Bytes(found.apparent),
            "on_disk": values.Bytes(found.allocated),
            "digest": str(found.digest) if found.digest else None,
            "inspected": found.inspected,
            "certificates": values.Lines(found.certificates),
            "last_use": values.Date(found.last_use),
            "hard_links": found.links,
            "pins": values.Lines(
                f"{pin.owner} until {values.Date(pin.expires).human_readable()}" if pin.expires else pin.owner
                for pin in found.pins
            ),
        }
        return list(shown), list(shown.values())


class Explain(base.BaseShow):
    """Say what the next pass would do with a base image, why, and what would change that."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", help=_IMAGE)
        base.add_instances(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        instances = base.read_instances(parsed_args.instances)
        found = self.manager().explain(parsed_args.image, instances)
        if found is None:
            raise _absent(parsed_args.image)
        shown = {
            "name": found.base.name,
            "image": found.base.image_id,
            "next_pass": "evicts it" if found.base.evicted else "keeps it",
            "because": found.base.reason,
            "kept_by": values.Lines(what for what, _change in found.obstacles),
            "to_change_that": values.Lines(change for _what, change in found.obstacles),
            "problems": values.Lines(found.problems),
        }
        return list(shown), list(shown.values())


class Cache(base.BaseLister):
    """Fetch images into the cache before an instance needs them."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", nargs="+", help="id of an image")
        parser.add_argument(
            "--pin-for",
            type=values.duration,
            metavar="DURATION",
            help="keep it for 90s, 30m, 12h or 7d, used or not",
        )
        sources.add_options(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        manager = self.manager(sources.chosen(parsed_args, parsed_args.image))
        until = None if parsed_args.pin_for is None else manager.host.clock() + parsed_args.pin_for

        def cache(image: str) -> str:
            return manager.cache_image(image, pin_until=until).value

        return ["Image", "Result"], self.each(parsed_args.image, cache)

    def each(self, images: Iterable[str], act: Callable[[str], str]) -> list[tuple[str, str]]:
        """Go on with the others when one fails."""
        results, codes = [], []
        for image in images:
            try:
                results.append((image, act(image)))
            except ic.ImageCacheError as error:
                self.complain(error)
                codes.append(base.code_of(error))
                results.append((image, "error"))
        self.exit_code = base.worst(codes)
        return results


class Evict(base.Base):
    """Remove base images now, whatever their age, unless a disk, a pin, a lease or a guest needs them."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", nargs="+", help=_IMAGE)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        manager, codes = self.manager(), []
        for image in parsed_args.image:
            try:
                manager.evict_image(image)
            except ic.ImageCacheError as error:
                self.complain(error)
                codes.append(base.code_of(error))
        self.exit_code = base.worst(codes)


class Pin(base.Base):
    """Keep an image's base, whether it is in the cache yet or not."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", help="id of an image")
        parser.add_argument("--owner", default=_OWNER, help="owner of the pin (default: %(default)s)")
        parser.add_argument(
            "--for",
            dest="duration",
            type=values.duration,
            metavar="DURATION",
            help="90s, 30m, 12h or 7d (default: until it is unpinned)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        manager = self.manager()
        expires = None if parsed_args.duration is None else manager.host.clock() + parsed_args.duration
        manager.pin(parsed_args.image, owner=parsed_args.owner, expires=expires)


class Unpin(base.Base):
    """Remove a pin. A base image that nothing else needs may then be evicted."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", help="id of an image")
        parser.add_argument("--owner", default=_OWNER, help="owner of the pin (default: %(default)s)")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        if not self.manager().unpin(parsed_args.image, owner=parsed_args.owner):
            self.note(f"image {parsed_args.image} had no pin of {parsed_args.owner}")


def _absent(image: str) -> ic.ImageNotFound:
    return ic.ImageNotFound("it is not in the cache", image=image, next_step="see: imagecache image list")
