# SPDX-License-Identifier: Apache-2.0
"""``imagecache df``, ``prune`` and ``cache usage``: where the space went, and how to have it back."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import imagecache_lib as ic
from imagecache_lib import dates
from imagecache_lib.cli import base, parsing, values
from imagecache_lib.cli.instance_report import add_instances, read_instances
from imagecache_lib.diagnostics.survey import State, Survey

#: What an interval of 0 means, in seconds.
_EVERY_MINUTE = 60


class Df(base.BaseShow):
    """Show how full the cache's filesystem is, and what the cache takes of it by state."""

    examples = ("df", "df -f json")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_instances(parser, reads_disks=True)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        admin = self.admin()
        survey = admin.survey(read_instances(parsed_args.instances))
        for problem in survey.problems:
            self.note(problem)
        shown = {
            "path": admin.config.base_path,
            "filesystem_size": values.Bytes(survey.size),
            "filesystem_free": _part(survey.free, survey.size),
            "base_images": len(survey.bases),
            "base_images_on_disk": _part(survey.allocated, survey.size),
            **{state.value: values.Bytes(survey.bytes_of(state)) for state in State},
            "damaged": len(survey.damaged),
            "trash": values.Bytes(survey.trash),
            "in_flight": values.Bytes(survey.stage),
            "reserved": values.Bytes(survey.reserved),
            "last_scrub": values.Date(survey.last_scrub),
            "last_pass": values.Date(survey.last_pass),
            "next_pass": _next_pass(survey, admin.config.manager_interval),
        }
        return list(shown), list(shown.values())


def _next_pass(survey: Survey, interval: int) -> values.Facts:
    """Return when the next pass is due, by ``manager_interval``: whoever makes it may have another."""
    if interval < 0 or survey.last_pass is None:
        return values.Facts(
            None, ["none is planned: manager_interval is -1" if interval < 0 else "no pass has run yet"]
        )
    due = survey.last_pass + (interval or _EVERY_MINUTE)
    late = survey.now - due
    when = f"overdue by {dates.span(late)}" if late > 0 else f"in {dates.span(-late)}"
    return values.Facts(values.iso(due), [f"{when}, by manager_interval"])


def _part(amount: int, whole: int) -> values.Facts:
    share = f" ({amount * 100 // whole} %)" if whole else ""
    return values.Facts(amount, [f"{values.shown(amount)}{share}"])


class Usage(base.BaseShow):
    """Show how much space the cache takes, and how much is left."""

    examples = ("cache usage -f json",)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        admin = self.admin()
        space, bases, config = admin.get_space(), admin.list_bases(), admin.config
        shown = {
            "path": config.base_path,
            "base_images": len(bases),
            "base_images_on_disk": values.Bytes(sum(each.allocated for each in bases)),
            "taken_from_instances": values.Bytes(admin.get_disk_usage()),
            "reserved": values.Bytes(space.reserved),
            "reclaimable": values.Bytes(space.reclaimable),
            "free": values.Bytes(space.free),
            "max_cache_size": values.Bytes(config.max_cache_size or None),
            "free_space_low": values.Bytes(config.free_space_low or None),
        }
        return list(shown), list(shown.values())


class Prune(base.BaseLister):
    """Remove base images that nothing needs, before their age: for a disk that is full. Asks first.

    What a disk, an instance, a pin, a lease or a running guest needs stays, and what was used less than
    space_minimum_age_seconds ago. The table names each base image, and says why the rest stays.
    """

    droppable = ("name",)
    machine_only = ("base", "reasons")
    examples = ("prune --dry-run", "prune --until-free 50G", "prune --older-than 7d --yes")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--older-than",
            type=values.duration,
            default=0,
            metavar="DURATION",
            help="only what was not used for 90s, 30m, 12h or 7d (default and least: "
            "space_minimum_age_seconds)",
        )
        parser.add_argument(
            "--until-free",
            type=values.size,
            default=0,
            metavar="SIZE",
            help="stop when so much of the filesystem is free, such as 50G, the least recently used first",
        )
        parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
        parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
        add_instances(parser, reads_disks=True)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        admin = self.admin()
        instances = read_instances(parsed_args.instances)
        limits = {"older_than": float(parsed_args.older_than), "until_free": parsed_args.until_free}
        before = admin.survey(instances)
        report = admin.prune(instances, **limits, dry_run=True)
        if report.evicted and not parsed_args.dry_run and self._is_sure(report, parsed_args.yes):
            report = admin.prune(instances, **limits, dry_run=False)
        for problem in report.problems:
            self.note(problem)
        self._tell(report, before, parsed_args.until_free, admin)
        known = {each.base.name: each for each in before.bases}
        return ["image", "name", "on_disk", "fate", "reason", "base", "reasons"], [
            _row(each, known.get(each.name), report.dry_run) for each in report.bases
        ]

    def _is_sure(self, report: ic.VerifyReport, yes: bool) -> bool:
        """Ask, unless that was answered already."""
        if yes:
            return True
        if not sys.stdin.isatty():
            raise parsing.Misused(
                "there is no terminal on which the removal of base images could be confirmed",
                next_step="give --yes, or --dry-run to see what would be removed",
            )
        for each in report.evicted:
            self.note(f"{each.image_id or each.name}, {values.shown(each.allocated)}: {each.reason}")
        count, size = len(report.evicted), values.shown(report.reclaimed)
        self.app.stderr.write(f"Remove {count} base image{'s' if count > 1 else ''}, {size}? [y/N] ")
        self.app.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def _tell(self, report: ic.VerifyReport, before: Survey, until_free: int, admin: ic.CacheAdmin) -> None:
        what = "would be removed" if report.dry_run else "removed"
        self.note(f"{len(report.evicted)} of {len(report.bases)} {what}, {values.shown(report.reclaimed)}")
        free = before.free + report.reclaimed if report.dry_run else admin.survey().free
        if free < until_free:
            self.note(
                f"{values.shown(free)} {'would be' if report.dry_run else 'are'} free, less than "
                f"{values.shown(until_free)}: what is left is needed; move guests, or make the "
                f"filesystem larger"
            )
            self.exit_code = base.ATTENTION
        if report.problems:
            self.exit_code = base.ATTENTION


def _row(each: ic.BaseReport, known: ic.SurveyedBase | None, dry_run: bool) -> list[Any]:
    gone = "would be removed" if dry_run else "removed"
    return [
        values.Id(each.image_id or each.name),
        values.Label(known.base.image_name if known is not None else None),
        values.Bytes(each.allocated),
        gone if each.evicted else "stays",
        each.reason,
        values.Id(each.name),
        base.reason_facts(known.reasons if known is not None and not each.evicted else ()),
    ]
