# SPDX-License-Identifier: Apache-2.0
"""``imagecache image``: what is in the cache, and what shall be."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import imagecache_lib as ic
from imagecache_lib.cli import base, filters, formats, values
from imagecache_lib.cli.instance_report import add_instances, read_instances, to_operator

_OWNER = "operator"
_IMAGE = "id or name of an image, name of a base image, or the first letters of one that is in the cache"


class List(base.BaseLister):
    """List the base images in the cache, and say what each of them is used for."""

    droppable: tuple[str, ...] = ("size", "last_use", "used_by")
    machine_only: tuple[str, ...] = ("base", "pins", "reasons", "damaged")
    examples = (
        "image list",
        "image list --filter state=reclaimable,size>1G,age>30d",
        "image list -q --filter state=damaged | xargs imagecache image evict",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--long", action="store_true", help="show more of each, with whole ids and dates")
        parser.add_argument(
            "--filter",
            type=filters.conditions,
            action="extend",
            default=[],
            metavar="CONDITIONS",
            help=f"only those that meet all of, with commas between: {filters.SYNTAX}",
        )
        parser.add_argument(
            "--ids",
            action="store_true",
            help="only the ids, a line each; of a base without one, its name. The same with -q",
        )
        add_instances(parser, reads_disks=True)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        admin = self.admin()
        survey = admin.survey(read_instances(parsed_args.instances))
        found = [each for each in survey.bases if filters.meets(each, parsed_args.filter, survey.now)]
        # -q is the whole program's: nothing but what was asked for.
        if parsed_args.ids or (self.app.options.verbose_level == 0 and parsed_args.formatter == "table"):
            parsed_args.formatter = "value"
            parsed_args.columns = []
            self.formatter = formats.Formats(("value",))["value"].obj
            return ["image"], [(each.base.image_id or each.base.name,) for each in found]
        self._tell(survey, found, admin.config.base_path)
        return self._table(found, survey.now, parsed_args.long)

    def _tell(self, survey: ic.Survey, found: list[ic.SurveyedBase], path: str) -> None:
        for problem in survey.problems:
            self.note(problem)
        if not survey.bases:
            self.note(f"no base images in {path}")
            return
        on_disk = sum(each.base.allocated for each in found)
        of = f" of {len(survey.bases)}" if len(found) < len(survey.bases) else ""
        images = "image" if len(survey.bases) == 1 else "images"
        totals = (
            f"{len(found)}{of} {images}, {values.shown(on_disk)} on disk, {values.shown(survey.free)} free"
        )
        damaged = len([each for each in found if each.base.damaged])
        self.note(totals + (f", {damaged} damaged" if damaged else ""))

    def _table(self, found: list[ic.SurveyedBase], now: float, long: bool) -> tuple[Any, Any]:
        header = ["image", "name", "size", "on_disk", "used_by", "last_use", "state"]
        header += ["base", "damaged", "pins", "reasons"]
        if long:
            header += ["format", "kind", "origin", "digest"]
            self.droppable = ()
            self.machine_only = ("reasons", "damaged")
        return header, [self._row(each, now, long) for each in found]

    def _row(self, each: ic.SurveyedBase, now: float, long: bool) -> list[Any]:
        found = each.base
        last_use = values.Date(found.last_use) if long else values.Ago(found.last_use, now)
        row = [
            values.Id(found.image_id or found.name),
            values.Label(found.image_name),
            values.Bytes(found.virtual_size),
            values.Bytes(found.allocated),
            values.Count(each.users),
            last_use,
            values.Word(each.shown_state),
            values.Id(found.name),
            found.damaged,
            base.pin_facts(found.pins),
            base.reason_facts(each.reasons),
        ]
        if long:
            row += [found.stored_format, found.kind, found.origin or "unchecked", digest(found.digest)]
        return row


class Show(base.BaseShow):
    """Show what is known of one base image."""

    examples = ("image show 318ac4fb-a140-4405-8167-ad782f983e48", "image show ubuntu-24.04 -f json")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", help=_IMAGE)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        admin = self.admin()
        name = base.base_of(admin, parsed_args.image)
        surveyed = next((each for each in admin.survey().bases if each.base.name == name), None)
        if surveyed is None:
            raise absent(parsed_args.image)
        found = surveyed.base
        shown = {
            "image": found.image_id,
            "name": found.image_name,
            "state": values.Word(surveyed.shown_state),
            "base": found.name,
            "path": f"{admin.config.base_path}/{found.name}",
            "kind": found.kind,
            "origin": found.origin
            or "unknown: another program made it, and it is checked before its first use",
            "source_format": found.source_format,
            "stored_format": found.stored_format,
            "virtual_size": values.Bytes(found.virtual_size),
            "length": values.Bytes(found.apparent),
            "on_disk": values.Bytes(found.allocated),
            "digest": digest(found.digest),
            "damaged": values.Yes(found.damaged),
            "inspected": values.Yes(found.inspected),
            "certificates": values.Lines(found.certificates),
            "last_use": values.Date(found.last_use),
            "hard_links": found.links,
            "used_by": surveyed.users,
            "pins": base.pin_facts(found.pins),
            "reasons": base.reason_facts(surveyed.reasons),
        }
        return list(shown), list(shown.values())


class Explain(base.BaseShow):
    """Say what the next pass would do with a base image, why, and what would change that."""

    examples = ("image explain ubuntu-24.04 --instances /run/imagecache/instances.json",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", help=_IMAGE)
        add_instances(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        instances = read_instances(parsed_args.instances)
        admin = self.admin()
        found = admin.explain(base.base_of(admin, parsed_args.image), instances)
        if found is None:
            raise absent(parsed_args.image)
        shown = {
            "base": found.base.name,
            "image": found.base.image_id,
            "next_pass": "evicts it" if found.base.evicted else "keeps it",
            "because": to_operator(found.base.reason, instances),
            "kept_by": values.Lines(to_operator(what, instances) for what, _change in found.obstacles),
            "to_change_that": values.Lines(
                to_operator(change, instances) for _what, change in found.obstacles
            ),
            "problems": values.Lines(to_operator(each, instances) for each in found.problems),
        }
        return list(shown), list(shown.values())


class Cache(base.BaseLister):
    """Fetch images into the cache before an instance needs them."""

    examples = (
        "image cache 318ac4fb-a140-4405-8167-ad782f983e48 --pin-for 7d",
        f"image cache noble --http https://example.org/noble.img --digest md5:{'0123456789abcdef' * 2}",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        from imagecache_lib.cli import sources

        parser = super().get_parser(prog_name)
        parser.add_argument("image", nargs="+", type=values.image_id, help="id of an image")
        parser.add_argument(
            "--pin-for",
            type=values.lifetime,
            metavar="DURATION",
            help="keep it for 90s, 30m, 12h or 7d, used or not",
        )
        sources.add_options(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        from imagecache_lib.cli import sources

        manager = self.manager(sources.chosen(parsed_args, parsed_args.image))
        until = None if parsed_args.pin_for is None else manager.host.clock() + parsed_args.pin_for

        def cache(image: str) -> str:
            return manager.cache_image(image, pin_until=until).value

        return ["image", "result", "reason"], self.each(parsed_args.image, cache)

    def each(self, images: Iterable[str], act: Callable[[str], str]) -> list[tuple[Any, ...]]:
        """Go on with the others when one fails."""
        results: list[tuple[Any, ...]] = []
        codes = []
        for image in images:
            try:
                results.append((values.Id(image), act(image), None))
            except ic.ImageCacheError as error:
                self.complain(error)
                codes.append(base.code_of(error))
                results.append((values.Id(image), "error", error.cause))
        self.exit_code = base.worst(codes)
        return results


class Evict(base.Base):
    """Remove base images now, whatever their age, unless a disk, a pin, a lease or a guest needs them."""

    examples = ("image evict 318ac4fb-a140-4405-8167-ad782f983e48",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", nargs="+", help=_IMAGE)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        admin, codes = self.admin(), []
        for image in parsed_args.image:
            try:
                admin.evict_image(base.base_of(admin, image))
            except ic.ImageCacheError as error:
                error.image = values.printable(image)  # as the operator calls it, and not the base's name
                self.complain(error)
                codes.append(base.code_of(error))
        self.exit_code = base.worst(codes)


class Pin(base.Base):
    """Keep an image's base, whether it is in the cache yet or not."""

    examples = ("image pin 318ac4fb-a140-4405-8167-ad782f983e48 --for 7d --owner rollout-42",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", type=values.image_id, help="id of an image")
        parser.add_argument("--owner", default=_OWNER, help="owner of the pin (default: %(default)s)")
        parser.add_argument(
            "--for",
            dest="duration",
            type=values.lifetime,
            metavar="DURATION",
            help="90s, 30m, 12h or 7d (default: until it is unpinned)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        admin = self.admin()
        expires = None if parsed_args.duration is None else admin.host.clock() + parsed_args.duration
        admin.pin(parsed_args.image, owner=parsed_args.owner, expires=expires)
        if admin.show_base(parsed_args.image) is None:
            self.note(
                f"image {values.printable(parsed_args.image)} is not in the cache: the pin keeps it "
                f"once it is; "
                "see: imagecache image pins"
            )


class Unpin(base.Base):
    """Remove a pin. A base image that nothing else needs may then be evicted."""

    examples = ("image unpin 318ac4fb-a140-4405-8167-ad782f983e48 --owner rollout-42",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", type=values.image_id, help="id of an image")
        parser.add_argument("--owner", default=_OWNER, help="owner of the pin (default: %(default)s)")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        if not self.admin().unpin(parsed_args.image, owner=parsed_args.owner):
            raise ic.ImageNotFound(
                f"it has no pin of {parsed_args.owner}",
                image=values.printable(parsed_args.image),
                next_step="see: imagecache image pins",
            )


class Pins(base.BaseLister):
    """List all pins, those of images that are not in the cache too."""

    droppable = ("cached",)
    machine_only = ("base",)
    examples = ("image pins", "image pins -f json")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        admin = self.admin()
        found, now = admin.list_pins(), admin.host.clock()
        if not found:
            self.note("nothing is pinned")
        return ["image", "owner", "until", "expired", "cached", "base"], [
            (
                values.Id(each.image_id or each.name),
                values.Label(each.pin.owner),
                values.Date(each.pin.expires),
                values.Yes(each.pin.is_over(now)),
                values.Yes(each.cached),
                values.Id(each.name),
            )
            for each in found
        ]


def digest(found: ic.Digest | None) -> str | None:
    """Return a digest as text."""
    return str(found) if found is not None else None


def absent(image: str) -> ic.ImageNotFound:
    """Return the error that an image is not in the cache."""
    return ic.ImageNotFound("it is not in the cache", image=image, next_step="see: imagecache image list")
