# SPDX-License-Identifier: Apache-2.0
"""``imagecache cache``: the cache as a whole."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.cli import base, parsing, values
from imagecache_lib.cli.instance_report import add_instances, read_instances, to_operator

if TYPE_CHECKING:
    from imagecache_lib.observers.metrics import MetricsObserver


class Verify(base.BaseLister):
    """Say for each base image whether the next pass would remove it, and why. Removes only with --evict."""

    droppable = ("name",)
    machine_only = ("base", "damaged", "reasons")
    examples = (
        "cache verify --instances /run/imagecache/instances.json",
        "cache verify --instances /run/imagecache/instances.json --evict",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--evict", action="store_true", help="remove what can go (default: only say so)")
        add_instances(parser)
        add_textfile(parser, "with --evict: write the figures of this pass")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        if parsed_args.textfile is not None and not parsed_args.evict:
            raise parsing.Misused(
                "--textfile has the figures of a pass", next_step="add --evict, or leave it out"
            )
        instances = read_instances(parsed_args.instances)
        before = self.admin().survey(instances)
        report = self._verify(instances, parsed_args)
        if instances is None:
            self.note(
                "no base image is evicted without --instances FILE: an instance may not have its disk yet"
            )
        # Without a report this command says so itself: there is no driver that could have been asked.
        told = [each for each in report.problems if instances is not None or "could not tell" not in each]
        for problem in told:
            self.note(problem)
        known = {each.base.name: each for each in before.bases}
        for each in before.damaged:
            self.note(f"base image {each.base.name} is damaged on disk: see image show, and the runbooks")
        gone = "evicted" if parsed_args.evict else "would be evicted"
        if report.bases:
            some = f"{len(report.evicted)} of {len(report.bases)}"
            self.note(f"{some} {gone}, {values.shown(report.reclaimed)}")
        else:
            self.note(f"no base images in {self.config().base_path}")
        if report.problems or before.damaged:
            self.exit_code = base.ATTENTION
        return ["image", "name", "on_disk", "fate", "reason", "base", "damaged", "reasons"], [
            self._row(each, known.get(each.name), gone, instances) for each in report.bases
        ]

    def _row(
        self,
        each: ic.BaseReport,
        known: ic.SurveyedBase | None,
        gone: str,
        instances: Sequence[ic.Instance] | None,
    ) -> list[Any]:
        damaged = known is not None and known.base.damaged
        reason = to_operator(each.reason, instances)
        return [
            values.Id(each.image_id or each.name),
            values.Label(known.base.image_name if known is not None else None),
            values.Bytes(each.allocated),
            gone if each.evicted else "kept",
            f"damaged; {reason}" if damaged else reason,
            values.Id(each.name),
            damaged,
            base.reason_facts(known.reasons if known is not None else ()),
        ]

    def _verify(
        self, instances: Sequence[ic.Instance] | None, parsed_args: argparse.Namespace
    ) -> ic.VerifyReport:
        if parsed_args.textfile is None:
            return self.manager().verify_base_images(instances, dry_run=not parsed_args.evict)
        observer = textfile_observer(parsed_args.textfile)
        manager = self.manager(observers=[observer])
        report = manager.verify_base_images(instances)
        observer(manager.survey(instances).as_event())
        observer.write_textfile(parsed_args.textfile)
        return report


class Scrub(base.BaseLister):
    """Re-read cached images from disk and compare them with what was fetched. Evicts damaged, unused ones."""

    machine_only = ("base",)
    droppable = ("read",)
    unlogged = (*base.Base.unlogged, events.Damaged)
    examples = ("cache scrub --rate 100M", "cache scrub ubuntu-24.04")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "image_ids",
            nargs="*",
            metavar="IMAGE",
            help="id or name of an image, or name of a base image (default: all, the longest unchecked "
            "first)",
        )
        parser.add_argument(
            "--rate",
            type=values.size,
            metavar="SIZE",
            help="how much to read per second, such as 100M, 0 for no limit (default: scrub_rate of the "
            "configuration)",
        )
        add_textfile(parser, "write what is known afterwards")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        admin = self.admin()
        names = [base.base_of(admin, image) for image in parsed_args.image_ids] or None
        observer = None if parsed_args.textfile is None else textfile_observer(parsed_args.textfile)
        report = admin.scrub(names, rate=parsed_args.rate)
        if observer is not None:
            observer(admin.survey().as_event())
            observer.write_textfile(parsed_args.textfile)
        if report.damaged:
            self.exit_code = base.ATTENTION
        read = values.shown(report.read)
        self.note(f"{len(report.bases)} checked, {len(report.damaged)} damaged, {read} read")
        return ["image", "verdict", "detail", "stays", "read", "base"], [
            (
                values.Id(each.image_id or each.name),
                each.verdict.value,
                each.detail,
                each.stays or "",
                values.Bytes(each.read),
                values.Id(each.name),
            )
            for each in report.bases
        ]


class Check(base.BaseLister):
    """Look for what is wrong with this host's set-up, and say what to do."""

    needs_instances = False
    examples = ("cache check", "cache check -f json")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        from imagecache_lib import opts

        admin = self.admin()
        findings = [*admin.preflight()]
        for text in opts.misspelt(self.app.options.config_file):
            findings.append(ic.Finding(ic.Severity.ERROR, text, "Correct its name, or remove it."))
        findings.sort(key=lambda finding: list(ic.Severity).index(finding.severity))
        if any(finding.severity is ic.Severity.ERROR for finding in findings):
            self.exit_code = base.ATTENTION
        if not findings:
            self.note("nothing is wrong")
        return ["severity", "finding", "what_to_do"], [
            (values.Word(finding.severity.value), finding.text, finding.next_step) for finding in findings
        ]


class Audit(base.BaseLister):
    """Look for disks and base images that do not fit together. Changes nothing."""

    examples = ("cache audit --instances /run/imagecache/instances.json",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_instances(parser, reads_disks=True)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        report = self.admin().audit(read_instances(parsed_args.instances))
        if any(each.severity is not ic.Severity.INFO for each in report.findings):
            self.exit_code = base.ATTENTION
        bases = "1 base image" if report.bases == 1 else f"{report.bases} base images"
        disks = "1 disk that refers" if report.overlays == 1 else f"{report.overlays} disks that refer"
        self.note(f"{bases}, {disks} to one")
        return ["severity", "subject", "finding", "what_to_do"], [
            (values.Word(each.severity.value), each.subject, each.text, each.next_step)
            for each in report.findings
        ]


def add_textfile(parser: argparse.ArgumentParser, what: str) -> None:
    """Let a command leave figures for Prometheus."""
    parser.add_argument(
        "--textfile",
        type=values.textfile,
        metavar="FILE",
        help=f"{what} for node_exporter's textfile collector into FILE, whose name ends in .prom",
    )


def textfile_observer(path: str) -> MetricsObserver:
    """Return what counts for a file that one command writes at its end, which may be hours away.

    :raises ConfigError: prometheus-client is not installed, or the file could not be written.
    """
    directory = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.access(directory, os.W_OK | os.X_OK):
        raise ic.ConfigError(
            "the metrics cannot be written there", path=path, next_step="check the directory and its owner"
        )
    try:
        import prometheus_client

        from imagecache_lib.observers import metrics
    except ImportError as error:
        raise ic.ConfigError(
            "--textfile needs prometheus-client", next_step="pip install imagecache-lib[prometheus]"
        ) from error
    return metrics.MetricsObserver(prometheus_client.CollectorRegistry(), counting=False)
