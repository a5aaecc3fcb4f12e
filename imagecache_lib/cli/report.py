# SPDX-License-Identifier: Apache-2.0
"""``imagecache cache report``: the cache as a page to look at, or to send to somebody."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile

from imagecache_lib import errors
from imagecache_lib.cli import base, values
from imagecache_lib.cli.instance_report import add_instances, read_instances


class Report(base.Base):
    """Write a page that shows what takes the space, and why each base image stays. Changes nothing else."""

    examples = (
        "cache report --html cache.html",
        "cache report --html /srv/www/cache.html --history /var/lib/imagecache/report.sqlite",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--html",
            required=True,
            type=values.path,
            metavar="FILE",
            help="the page, which needs no other file and no network. It is replaced in one step",
        )
        parser.add_argument(
            "--history",
            type=values.path,
            metavar="FILE",
            help="SQLite file that keeps what each report saw, for a plot over time; it is made if it is not "
            "there",
        )
        add_instances(parser, reads_disks=True)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        # Loaded here: what completes command lines loads every command.
        from imagecache_lib.cli import report_history, report_page

        admin = self.admin()
        survey = admin.survey(read_instances(parsed_args.instances))
        looks = report_history.add(parsed_args.history, survey) if parsed_args.history else []
        host, path = admin.host.name, admin.config.base_path
        _replace(parsed_args.html, report_page.page(survey, looks, host=host, path=path))
        images = values.counted(len(survey.bases), "image")
        self.note(f"{parsed_args.html}: {images}, {values.shown(survey.allocated)}")


def _replace(path: str, text: str) -> None:
    """Give a file that content in one step, readable by all. A device or a pipe is written to, as it is."""
    path = os.path.realpath(path)  # a link stays one
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "w", encoding="utf-8") as stream:
                stream.write(text)
            return
        descriptor, name = tempfile.mkstemp(prefix=".report-", dir=os.path.dirname(path) or ".")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
                os.fchmod(stream.fileno(), 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise errors.ConfigError(
            f"the page cannot be written: {error.strerror}", path=path, next_step="name another --html"
        ) from error
