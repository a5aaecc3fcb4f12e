# SPDX-License-Identifier: Apache-2.0
"""``imagecache precache``: images on every host of an aggregate, before they are needed."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from imagecache_lib import errors, opts
from imagecache_lib.cli import base, bus, sources, values
from imagecache_lib.cli.job_display import JobDisplay
from imagecache_lib.precache import chains, client, job, job_rows, jobs_url, reader
from imagecache_lib.precache.agent import HostAgent
from imagecache_lib.precache.in_process import InProcessClient
from imagecache_lib.precache.watch import Watch

if TYPE_CHECKING:
    from imagecache_lib.precache.database import JobDatabase
    from imagecache_lib.precache.precacher import AggregatePrecacher

#: Seconds between two looks at a job that is shown while it runs.
_REFRESH = 0.5

_DATABASE = "IMAGECACHE_JOBS"

#: Seconds by which a host's clock may differ without being worth a word.
_SKEW = 60.0


class _JobCommand(base.BaseLister):
    """A command about jobs."""

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
        return ["Host", "Image", "Result", "Received", "Reason"], [
            (name, image_id, _result(cell), values.Bytes(cell.received), cell.reason)
            for name, cells in work.cells.items()
            for image_id, cell in cells.items()
        ]


class _HostsCommand(_JobCommand):
    """A command that asks hosts."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        bus.add_topic(parser)
        sources.add_options(parser)
        return parser

    def add_what(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments that name hosts and images."""
        parser.add_argument("image", nargs="+", help="id of an image")
        parser.add_argument(
            "--host",
            action="append",
            default=[],
            metavar="NAME",
            help="a host, as its agent calls itself; may be given several times (default: this one alone, "
            "without a message bus)",
        )
        parser.add_argument(
            "--hosts-file",
            metavar="PATH",
            help="file with the name of a host on each line, and behind it its site, if hosts relay",
        )

    def hosts(self, arguments: argparse.Namespace) -> list[Placed]:
        """Return the hosts that the command line names, each with its site; those of a site in a row."""
        found = [Placed(name) for name in arguments.host]
        if arguments.hosts_file is not None:
            found += _read_hosts(arguments.hosts_file)
        if not found and bus.transport(self.app.options.config_file) is None:
            found.append(Placed(opts.from_files(self.app.options.config_file)[1].name))
        sites = {host.site: number for number, host in reversed(list(enumerate(found)))}
        return sorted(found, key=lambda host: sites[host.site])

    @contextlib.contextmanager
    def conductor(
        self, arguments: argparse.Namespace, images: list[str] | None
    ) -> Iterator[AggregatePrecacher]:
        """Yield what reaches the agents: over the message bus, else this very host's own.

        :param images: ids of the images that will be fetched, or None if nothing will be.
        """
        from imagecache_lib.precache.precacher import AggregatePrecacher

        database = self.database(arguments)
        found = bus.transport(self.app.options.config_file)
        if found is not None:
            from imagecache_lib.precache import rpc

            files = self.app.options.config_file
            notify = bus.job_notifier(files, opts.from_files(files)[1].name)
            hosts = rpc.RpcHostClient(found, topic=arguments.topic, mailboxes=bus.mailboxes(files))
            yield AggregatePrecacher(database, hosts, observers=[notify])
            return
        if images is None:
            yield AggregatePrecacher(database, InProcessClient({}))
            return
        watch = Watch()
        cache = self.manager(sources.chosen(arguments, images), observers=[watch], progress_shown=False)
        agent = HostAgent(cache, watch=watch)
        try:
            yield AggregatePrecacher(database, InProcessClient({cache.host.name: agent}))
        finally:
            agent.stop()

    def follow(
        self, work: job.Job, conductor: AggregatePrecacher, act: Callable[[threading.Event], job.Job]
    ) -> tuple[Any, Any]:
        """Show a job while ``act`` works on it, and return the job as a table."""
        leave = threading.Event()
        ended: list[job.Job] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                ended.append(act(leave))
            except BaseException as error:
                failed.append(error)

        # No KeyboardInterrupt: one that hits Thread.join leaves it believing that the thread has ended.
        before = {
            number: signal.signal(number, lambda _number, _frame: leave.set())
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        running = threading.Thread(target=run, name="imagecache-job")
        running.start()
        try:
            self.show(conductor, work.id, running)
        finally:
            running.join()
            for number, what in before.items():
                signal.signal(number, what)
        if failed:
            raise failed[0]
        if not ended[0].is_over:
            self.note(f"left; to go on: imagecache precache resume {work.id}")
            self.exit_code = base.ATTENTION
        return self.table(ended[0])

    def show(self, conductor: AggregatePrecacher, job_id: str, running: threading.Thread) -> None:
        """Show a job as long as a thread runs."""
        if self.app.options.verbose_level == 0:
            running.join()
            return
        display = JobDisplay(self.app.stderr)
        with display.alone():
            while running.is_alive():
                display.show(conductor.status(job_id))
                running.join(_REFRESH)
            display.show(conductor.status(job_id))


class Plan(_HostsCommand):
    """Ask all hosts what they have, and say what would be fetched. Changes nothing."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_what(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        hosts = [host.name for host in self.hosts(parsed_args)]
        with self.conductor(parsed_args, parsed_args.image) as conductor:
            plan = conductor.plan(hosts, parsed_args.image, learned=self._learned(len(hosts)))
        rows = [self._row(name, plan.surveys.get(name), plan.unreachable.get(name, "")) for name in hosts]
        self.note(f"{values.shown(plan.bytes_to_fetch)} would be fetched in all")
        if any(row[-1] for row in rows):
            self.exit_code = base.ATTENTION
        return ["Host", "Present", "Missing", "To fetch", "Free", "Problem"], rows

    def _learned(self, total: int) -> Callable[[str, client.Survey | errors.ImageCacheError], None]:
        """Return a callback that tells which hosts do not answer, as soon as that is known."""
        answered = itertools.count(1)

        def learned(name: str, answer: client.Survey | errors.ImageCacheError) -> None:
            number = next(answered)
            if isinstance(answer, errors.ImageCacheError):
                self.note(f"{number} of {total} hosts: {name}: {' '.join(str(answer).split())}")

        return learned

    def _row(self, name: str, survey: client.Survey | None, problem: str) -> tuple[Any, ...]:
        if survey is None:
            return (name, None, None, values.Bytes(None), values.Bytes(None), problem)
        wanted = sum(size or 0 for size in survey.missing.values())
        problems = list(survey.problems.values())
        if survey.agent is not None and abs(skew := survey.agent.clock - time.time()) > _SKEW:
            problems.append(f"its clock is {skew:+.0f} s off this one's")
        if wanted > survey.free:
            problems.append("there is not enough room")
        return (
            name,
            len(survey.present),
            len(survey.missing),
            values.Bytes(wanted),
            values.Bytes(survey.free),
            "; ".join(problems),
        )


class Start(_HostsCommand):
    """Have images on hosts, and watch until they are there. What is left can be resumed."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_what(parser)
        parser.add_argument(
            "--aggregate", default="", metavar="NAME", help="what to call these hosts in lists"
        )
        parser.add_argument(
            "--concurrency",
            type=int,
            metavar="N",
            help="how many hosts fetch at a time (default: precache_concurrency)",
        )
        parser.add_argument(
            "--rate",
            type=values.size,
            default=0,
            metavar="SIZE",
            help="bytes that one host may fetch a second, such as 50M",
        )
        parser.add_argument(
            "--total-rate",
            type=values.size,
            default=0,
            metavar="SIZE",
            help="bytes that all hosts together may fetch a second",
        )
        parser.add_argument(
            "--deadline",
            type=values.moment,
            metavar="WHEN",
            help="give up what is not done by then: 2026-11-27T18:00, or 6h from now",
        )
        parser.add_argument(
            "--pin-until",
            type=values.moment,
            metavar="WHEN",
            help="keep the images on the hosts until then, used or not",
        )
        parser.add_argument(
            "--retries",
            type=int,
            default=3,
            metavar="N",
            help="how often a host tries an image again after a failure that may pass (default: %(default)s)",
        )
        parser.add_argument(
            "--jitter",
            type=values.duration,
            default=0,
            metavar="DURATION",
            help="let hosts begin within so long, at random",
        )
        parser.add_argument(
            "--relay",
            action="store_true",
            help="let hosts pass the images on to each other while they receive them, where their agents can",
        )
        parser.add_argument(
            "--heads",
            type=int,
            default=chains.HEADS,
            metavar="N",
            help="with --relay, how many hosts of each site ask the image service (default: %(default)s)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        hosts = self.hosts(parsed_args)
        with self.conductor(parsed_args, parsed_args.image) as conductor:
            self._prune(conductor)
            names, terms = [host.name for host in hosts], self._terms(parsed_args, hosts)
            work = conductor.start(parsed_args.aggregate, names, parsed_args.image, terms)
            self.note(f"job {work.id}: {len(parsed_args.image)} images on {len(hosts)} hosts")
            return self.follow(work, conductor, lambda leave: conductor.run(work.id, leave=leave))

    def _prune(self, conductor: AggregatePrecacher) -> None:
        age = opts.from_files(self.app.options.config_file)[0].precache_job_age_seconds
        if age and (pruned := conductor.prune(age)):
            self.note(f"{pruned} old jobs are forgotten: precache_job_age_seconds is {age}")

    def _terms(self, arguments: argparse.Namespace, hosts: Sequence[Placed]) -> job.Terms:
        concurrency = arguments.concurrency
        if concurrency is None:
            concurrency = opts.from_files(self.app.options.config_file)[0].precache_concurrency
        return job.Terms(
            concurrency=concurrency,
            host_rate=arguments.rate,
            total_rate=arguments.total_rate,
            deadline=arguments.deadline,
            pin_until=arguments.pin_until,
            retries=arguments.retries,
            jitter=arguments.jitter,
            relay=None if not arguments.relay else job.RelayTerms(heads=arguments.heads, sites=_sites(hosts)),
        )


class Resume(_HostsCommand):
    """Go on with a job that was left, and try again what failed."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("job", help="as list shows it")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        work = self.reader(parsed_args).get(parsed_args.job)
        with self.conductor(parsed_args, list(work.image_ids)) as conductor:
            return self.follow(work, conductor, lambda leave: conductor.resume(work.id, leave=leave))


class Cancel(_HostsCommand):
    """Stop a job. Its hosts stop too, and what is not done ends as skipped."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("job", help="as list shows it")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        with self.conductor(parsed_args, None) as conductor:
            return self.table(conductor.cancel(parsed_args.job))


class Status(_JobCommand):
    """Show how far a job is, image by image on each host."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("job", help="as list shows it")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        return self.table(self.reader(parsed_args).get(parsed_args.job))


class List(_JobCommand):
    """List all jobs, the oldest first."""

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        header = [
            "Id",
            "Aggregate",
            "Created",
            "Hosts",
            "Images",
            "State",
            *(each.value for each in job.Result),
        ]
        return header, [
            (
                work.id,
                work.aggregate,
                values.Date(work.created),
                work.hosts,
                work.images,
                _state(work),
                *work.counts.values(),
            )
            for work in self.reader(parsed_args).summaries()
        ]


def _state(work: job.JobSummary) -> str:
    if work.problem is not None:
        return "unreadable"
    if not work.is_over:
        return "cancelled" if work.cancelled else "not done"
    return "failed" if work.has_failed else "done"


def _result(cell: job.Cell) -> str:
    return cell.result.value if cell.result is not None else ""


class Placed(NamedTuple):
    """A host, and the site that it is at; all hosts without one are at one site."""

    name: str
    site: str = ""


def _sites(hosts: Sequence[Placed]) -> tuple[tuple[str, int], ...]:
    """Return the sites of hosts as :class:`~imagecache_lib.precache.job.RelayTerms` has them."""
    runs = itertools.groupby(hosts, key=lambda host: host.site)
    return tuple((site, len(list(run))) for site, run in runs)


def _read_hosts(path: str) -> list[Placed]:
    try:
        with open(path, encoding="utf-8") as stream:
            lines = [line.partition("#")[0].strip() for line in stream]
    except (OSError, ValueError) as error:
        raise errors.ConfigError(
            f"the list of hosts cannot be read: {error}", path=path, next_step="correct the file"
        ) from error
    return [_placed(line, path) for line in lines if line]


def _placed(line: str, path: str) -> Placed:
    words = line.split()
    if len(words) > 2:
        raise errors.ConfigError(
            f"{line!r} is more than a host and its site", path=path, next_step="correct the file"
        )
    return Placed(*words)
