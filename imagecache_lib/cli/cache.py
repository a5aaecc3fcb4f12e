# SPDX-License-Identifier: Apache-2.0
"""``imagecache cache``: the cache as a whole."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import imagecache_lib as ic
from imagecache_lib.cli import base, values


class Verify(base.BaseLister):
    """Say for each base image whether the next pass would remove it, and why. Removes only with --evict."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--evict", action="store_true", help="remove what can go (default: only say so)")
        base.add_instances(parser)
        parser.add_argument(
            "--textfile",
            metavar="FILE",
            help="with --evict: write the figures of this pass for node_exporter's textfile collector",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        instances = base.read_instances(parsed_args.instances)
        report = self._verify(instances, parsed_args)
        if instances is None:
            self.note(
                "without --instances FILE no base image is evicted: an instance may not have its disk yet"
            )
        for problem in report.problems:
            self.note(problem)
        gone = "evicted" if parsed_args.evict else "would be evicted"
        if report.bases:
            some = f"{len(report.evicted)} of {len(report.bases)}"
            self.note(f"{some} {gone}, {values.shown(report.reclaimed)}")
        if report.problems:
            self.exit_code = base.ATTENTION
        return ["Name", "Image", "Fate", "Reason", "On disk"], [
            (
                each.name,
                each.image_id or "",
                gone if each.evicted else "kept",
                each.reason,
                values.Bytes(each.allocated),
            )
            for each in report.bases
        ]

    def _verify(
        self, instances: Sequence[ic.Instance] | None, parsed_args: argparse.Namespace
    ) -> ic.VerifyReport:
        if parsed_args.textfile is None:
            return self.manager().verify_base_images(instances, dry_run=not parsed_args.evict)
        try:
            import prometheus_client

            from imagecache_lib.observers import metrics
        except ImportError as error:
            raise ic.ConfigError(
                "--textfile needs prometheus-client", next_step="pip install imagecache-lib[prometheus]"
            ) from error
        observer = metrics.MetricsObserver(prometheus_client.CollectorRegistry())
        report = self.manager(observers=[observer]).verify_base_images(
            instances, dry_run=not parsed_args.evict
        )
        if parsed_args.evict:
            observer.write_textfile(parsed_args.textfile)
        return report


class Scrub(base.BaseLister):
    """Re-read cached images from disk and compare them with what was fetched. Evicts damaged, unused ones."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "image_ids",
            nargs="*",
            metavar="IMAGE",
            help="id of an image, or name of a base image (default: all, the longest unchecked first)",
        )
        parser.add_argument(
            "--rate",
            type=int,
            metavar="BYTES",
            help="bytes to read per second, 0 for no limit (default: scrub_rate of the configuration)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        report = self.manager().scrub(parsed_args.image_ids or None, rate=parsed_args.rate)
        if report.damaged:
            self.exit_code = base.ATTENTION
        read = values.shown(report.read)
        self.note(f"{len(report.bases)} checked, {len(report.damaged)} damaged, {read} read")
        return ["Name", "Image", "Verdict", "Detail", "Stays", "Read"], [
            (
                each.name,
                each.image_id or "",
                each.verdict.value,
                each.detail,
                each.stays or "",
                values.Bytes(each.read),
            )
            for each in report.bases
        ]


class Usage(base.BaseShow):
    """Show how much space the cache takes, and how much is left."""

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        manager = self.manager()
        space, bases, config = manager.get_space(), manager.list_bases(), manager.config
        shown = {
            "path": config.base_path,
            "base_images": len(bases),
            "base_images_on_disk": values.Bytes(sum(each.allocated for each in bases)),
            "taken_from_instances": values.Bytes(manager.get_disk_usage()),
            "reserved": values.Bytes(space.reserved),
            "reclaimable": values.Bytes(space.reclaimable),
            "free": values.Bytes(space.free),
            "max_cache_size": values.Bytes(config.max_cache_size or None),
            "free_space_low": values.Bytes(config.free_space_low or None),
        }
        return list(shown), list(shown.values())


class Check(base.BaseLister):
    """Look for what is wrong with this host's set-up, and say what to do."""

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        findings = self.manager().preflight()
        if any(finding.severity is ic.Severity.ERROR for finding in findings):
            self.exit_code = base.ATTENTION
        if not findings:
            self.note("nothing is wrong")
        return ["Severity", "Finding", "What to do"], [
            (finding.severity.value, finding.text, finding.next_step) for finding in findings
        ]


class Audit(base.BaseLister):
    """Look for disks and base images that do not fit together. Changes nothing."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        base.add_instances(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        report = self.manager().audit(base.read_instances(parsed_args.instances))
        if any(each.severity is not ic.Severity.INFO for each in report.findings):
            self.exit_code = base.ATTENTION
        self.note(f"{report.bases} base images, {report.overlays} disks that refer to one")
        return ["Severity", "Subject", "Finding", "What to do"], [
            (each.severity.value, each.subject, each.text, each.next_step) for each in report.findings
        ]
