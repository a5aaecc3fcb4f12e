# SPDX-License-Identifier: Apache-2.0
"""What commands about pre-cache jobs share, and those that only look: ``precache status`` and ``list``."""

from __future__ import annotations

import argparse
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from imagecache_lib import errors
from imagecache_lib.cli import base, parsing, values
from imagecache_lib.cli.job_display import JobDisplay
from imagecache_lib.precache import job, job_rows, jobs_url, reader

if TYPE_CHECKING:
    from imagecache_lib.precache.database import JobDatabase

#: Seconds between two looks at a job that is shown while it runs.
REFRESH = 0.5

_DATABASE = "IMAGECACHE_JOBS"


class JobCommand(base.BaseLister):
    """A command about jobs."""

    droppable: tuple[str, ...] = ("total", "received")
    machine_only: tuple[str, ...] = ("result",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--jobs",
            metavar="PATH_OR_URL",
            default=os.environ.get(_DATABASE, "~/.imagecache/jobs.sqlite"),
            help="where jobs are kept: the path of a file, or the URL of a MariaDB or PostgreSQL, such as "
            "mysql+pymysql://user@host/name; one with a password belongs into the environment (default: "
            f"${_DATABASE}, else ~/.imagecache/jobs.sqlite)",
        )
        return parser

    def database(self, arguments: argparse.Namespace) -> JobDatabase:
        """Return the job database, for reading and writing."""
        where = self._where(arguments)
        if not jobs_url.is_url(where):
            try:
                os.makedirs(os.path.dirname(where), mode=0o700, exist_ok=True)
            except OSError as error:
                raise errors.ConfigError(
                    f"the job database cannot be made: {error.strerror}",
                    path=where,
                    next_step="choose another --jobs",
                ) from error
        # Loaded here: looking at jobs does without SQLAlchemy, which takes longer to load than to use.
        from imagecache_lib.precache.database import JobDatabase

        # Which plug-ins it loads to make tables is no operator's concern.
        logging.getLogger("alembic").setLevel(logging.WARNING)
        return JobDatabase(where)

    def reader(self, arguments: argparse.Namespace) -> job_rows.JobsReader:
        """Return the reader of the job database, which changes nothing in it."""
        where = self._where(arguments)
        if not jobs_url.is_url(where):
            return reader.EmbeddedJobs(where)
        from imagecache_lib.precache.database import JobDatabase

        return JobDatabase(where, change_schema=False)

    def _where(self, arguments: argparse.Namespace) -> str:
        where = str(arguments.jobs)
        return where if jobs_url.is_url(where) else os.path.abspath(os.path.expanduser(where))

    def table(self, work: job.Job) -> tuple[Any, Any]:
        """Return a job as a table, and set the command's exit code by the job's result."""
        if work.problem is not None:
            self.note(f"job {work.id}: {work.problem}")
        if work.has_failed or work.problem is not None:
            self.exit_code = base.ATTENTION
        return ["host", "image", "state", "result", "received", "total", "per_cent", "reason"], [
            (
                name,
                values.Id(image_id),
                values.Word(_state_of(cell)),
                cell.result.value if cell.result is not None else None,
                values.Bytes(cell.received),
                values.Bytes(cell.total),
                _part(cell.received, cell.total),
                cell.reason,
            )
            for name, cells in work.cells.items()
            for image_id, cell in cells.items()
        ]

    def add_job(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments that name a job."""
        parser.add_argument("job", nargs="?", help="id of a job as list shows it, or its first letters")
        parser.add_argument("--last", action="store_true", help="the job that was started last")

    def job_of(self, arguments: argparse.Namespace) -> str:
        """Return the id of the job that the command line names.

        :raises ConfigError: it names none, several, or one that is not there.
        """
        if arguments.last == (arguments.job is not None):
            raise parsing.Misused("name one job", next_step="give its id, or --last")
        known = [work.id for work in self.reader(arguments).summaries()]
        found = known[-1:] if arguments.last else [each for each in known if each == arguments.job]
        found = found or [each for each in known if arguments.job and each.startswith(arguments.job)]
        if len(found) == 1:
            return found[0]
        said = values.printable(arguments.job or "")
        what = f"{len(found)} jobs have an id that begins with {said}" if found else f"there is no job {said}"
        raise base.Unknown(what.strip(), next_step="see: imagecache precache list -f value -c id")

    def named_job(self, arguments: argparse.Namespace) -> job.Job:
        """Return the job that the command line names.

        :raises ConfigError: it names none, several, or one that is not there.
        """
        return self.read_job(self.job_of(arguments), arguments)

    def read_job(self, job_id: str, arguments: argparse.Namespace) -> job.Job:
        """Return a job, which may have been forgotten since it was named.

        :raises Unknown: it is not there.
        """
        try:
            return self.reader(arguments).get(job_id)
        except job_rows.UnknownJob as error:
            raise base.Unknown(error.cause, next_step=error.next_step) from error


class Status(JobCommand):
    """Show how far a job is, image by image on each host."""

    examples = ("precache status --last", "precache status 3f2a --watch")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_job(parser)
        parser.add_argument(
            "--watch", action="store_true", help="go on showing it until it is over, or until Ctrl-C"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        work = self.named_job(parsed_args)
        if parsed_args.watch:
            display = JobDisplay(self.app.stderr)
            with display.alone():
                display.show(work)
                while not work.is_over and work.problem is None:
                    time.sleep(REFRESH)
                    work = self.read_job(work.id, parsed_args)
                    display.show(work)
        return self.table(work)


class List(JobCommand):
    """List all jobs, the oldest first."""

    droppable = ("unknown", "unsupported", "skipped", "existing", "aggregate", "created")
    machine_only = ()
    examples = ("precache list", "precache list -f value -c id")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        results = [each.value for each in job.Result]
        summaries = self.reader(parsed_args).summaries()
        if not summaries:
            self.note("there are no jobs; imagecache precache start makes one")
        header = ["id", "aggregate", "created", "hosts", "images", "state", "per_cent", *results]
        return header, [
            (
                values.Id(work.id),
                values.Label(work.aggregate),
                values.Date(work.created),
                work.hosts,
                work.images,
                values.Word(_state(work)),
                _part(sum(work.counts.values()), work.hosts * work.images),
                *work.counts.values(),
            )
            for work in summaries
        ]


def _state(work: job.JobSummary) -> str:
    if work.problem is not None:
        return "unreadable"
    if work.cancelled:
        return "cancelled" if work.is_over else "cancelling"
    if not work.is_over:
        return "not_done"
    return "failed" if work.has_failed else "done"


def _state_of(cell: job.Cell) -> str:
    """Return what is the matter with one image on one host, in a word."""
    if cell.result is not None:
        return cell.result.value
    return "fetching" if cell.received else "waiting"


def _part(amount: int, whole: int | None) -> int | None:
    """Return per cent, or None where the whole is not known."""
    return min(100, amount * 100 // whole) if whole else None
