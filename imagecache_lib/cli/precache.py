# SPDX-License-Identifier: Apache-2.0
"""``imagecache precache``: images on every host of an aggregate, before they are needed."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from imagecache_lib import errors, opts
from imagecache_lib.cli import base, bus, jobs, openstack, sources, values
from imagecache_lib.cli.job_display import JobDisplay
from imagecache_lib.precache import chains, client, job
from imagecache_lib.precache.agent import HostAgent
from imagecache_lib.precache.in_process import InProcessClient
from imagecache_lib.precache.watch import Watch

if TYPE_CHECKING:
    from imagecache_lib.precache.precacher import AggregatePrecacher

#: More hosts than this, one after the other, are most likely not what is meant.
_MANY_HOSTS = 10

#: Seconds by which a host's clock may differ without being worth a word.
_SKEW = 60.0


class _HostsCommand(jobs.JobCommand):
    """A command that asks hosts."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        bus.add_topic(parser)
        sources.add_options(parser)
        return parser

    def add_what(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments that name hosts and images."""
        parser.add_argument(
            "image",
            nargs="+",
            help="id of an image, or its name in the image service that OS_ variables name",
        )
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
        parser.add_argument(
            "--aggregate",
            default="",
            metavar="NAME",
            help="what to call these hosts in lists; without --host and --hosts-file, and where the OS_ "
            "variables or OS_CLOUD name a cloud, all hosts of the host aggregate of that name",
        )

    def hosts(self, arguments: argparse.Namespace) -> list[Placed]:
        """Return the hosts that the command line names, each with its site; those of a site in a row."""
        found = [Placed(name) for name in arguments.host]
        if arguments.hosts_file is not None:
            found += _read_hosts(arguments.hosts_file)
        if not found and arguments.aggregate and openstack.is_named(os.environ):
            found += [Placed(name) for name in openstack.hosts_of(arguments.aggregate)]
        if not found and bus.transport(self.app.options.config_file) is None:
            found.append(Placed(opts.from_files(self.app.options.config_file)[1].name))
        sites = {host.site: number for number, host in reversed(list(enumerate(found)))}
        return sorted(found, key=lambda host: sites[host.site])

    def images(self, arguments: argparse.Namespace) -> list[str]:
        """Return the ids of the images that the command line names, by id or by name."""
        if not sources.is_cloud(arguments):
            return list(arguments.image)
        return [openstack.image_of(said) for said in arguments.image]

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
            waited = getattr(arguments, "timeout", None)
            hosts = rpc.RpcHostClient(
                found,
                topic=arguments.topic,
                survey_timeout=rpc.SURVEY_TIMEOUT if waited is None else float(waited),
                mailboxes=bus.mailboxes(files),
            )
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
        # Who reads this may interrupt: from here on that leaves the job, and nothing else.
        images, hosts = values.counted(len(work.image_ids), "image"), values.counted(len(work.hosts), "host")
        self.note(f"job {work.id}: {images} on {hosts}")
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
                running.join(jobs.REFRESH)
            display.show(conductor.status(job_id))


class Plan(_HostsCommand):
    """Ask all hosts what they have, and say what would be fetched. Changes nothing."""

    examples = (
        "precache plan 318ac4fb-a140-4405-8167-ad782f983e48 --hosts-file racks.txt",
        "precache plan ubuntu-24.04 --aggregate rack-7 --timeout 5s",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_what(parser)
        parser.add_argument(
            "--timeout",
            type=values.duration,
            metavar="DURATION",
            help="wait so long for each host's answer (default: 25s; an agent asks the image service itself)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        hosts, images = [host.name for host in self.hosts(parsed_args)], self.images(parsed_args)
        with self.conductor(parsed_args, images) as conductor:
            plan = conductor.plan(hosts, images, learned=self._learned(len(hosts)))
        rows = [self._row(name, plan.surveys.get(name), plan.unreachable.get(name, "")) for name in hosts]
        self.note(f"{values.shown(plan.bytes_to_fetch)} would be fetched in all")
        if any(row[-1] for row in rows):
            self.exit_code = base.ATTENTION
        return ["host", "present", "missing", "to_fetch", "free", "problem"], rows

    def _learned(self, total: int) -> Callable[[str, client.Survey | errors.ImageCacheError], None]:
        """Return a callback that tells what each host answers as soon as it does, or that it does not."""
        answered = itertools.count(1)

        def learned(name: str, answer: client.Survey | errors.ImageCacheError) -> None:
            number = next(answered)
            if isinstance(answer, errors.ImageCacheError):
                self.note(f"{number} of {total} hosts: {name}: {' '.join(str(answer).split())}")
            elif self.app.options.verbose_level > 0 and total > 1:
                size = values.shown(sum(size or 0 for size in answer.missing.values()))
                missing = values.counted(len(answer.missing), "image")
                self.note(f"{number} of {total} hosts: {name}: {missing} missing, {size} to fetch")

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

    examples = (
        "precache start 318ac4fb-a140-4405-8167-ad782f983e48 --hosts-file racks.txt --concurrency 20",
        "precache start ubuntu-24.04 --aggregate rack-7 --rate 50M --deadline 6h --pin-until 30d",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_what(parser)
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
            type=values.future,
            metavar="WHEN",
            help="give up what is not done by then: 2026-11-27T18:00, or 6h from now",
        )
        parser.add_argument(
            "--pin-until",
            type=values.future,
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
        hosts, images = self.hosts(parsed_args), self.images(parsed_args)
        with self.conductor(parsed_args, images) as conductor:
            self._prune(conductor)
            names, terms = [host.name for host in hosts], self._terms(parsed_args, hosts)
            if terms.concurrency == 1 and terms.relay is None and len(hosts) > _MANY_HOSTS:
                self.note(
                    f"the {len(hosts)} hosts fetch one after the other: --concurrency, or "
                    "precache_concurrency in the configuration, lets more of them fetch at a time"
                )
            work = conductor.start(parsed_args.aggregate, names, images, terms)
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

    examples = ("precache resume --last",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_job(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        work = self.reader(parsed_args).get(self.job_of(parsed_args))
        with self.conductor(parsed_args, list(work.image_ids)) as conductor:
            return self.follow(work, conductor, lambda leave: conductor.resume(work.id, leave=leave))


class Cancel(_HostsCommand):
    """Stop a job. Its hosts stop too, and what is not done ends as skipped."""

    examples = ("precache cancel --last",)

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        self.add_job(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        job_id = self.job_of(parsed_args)
        with self.conductor(parsed_args, None) as conductor:
            return self.table(conductor.cancel(job_id))


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
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise errors.ConfigError(
            f"the list of hosts cannot be read: {why}", path=path, next_step="correct --hosts-file"
        ) from error
    return [_placed(line, path) for line in lines if line]


def _placed(line: str, path: str) -> Placed:
    words = line.split()
    if len(words) > 2:
        raise errors.ConfigError(
            f"{line!r} is more than a host and its site", path=path, next_step="correct the file"
        )
    return Placed(*words)
