# SPDX-License-Identifier: Apache-2.0
"""What commands that ask hosts share: which hosts and images, how they are reached, what a job looks like."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from imagecache_lib import errors, opts
from imagecache_lib.cli import base, bus, job_hosts, jobs, openstack, sources, values
from imagecache_lib.cli.job_display import JobDisplay
from imagecache_lib.precache import job
from imagecache_lib.precache.agent import HostAgent
from imagecache_lib.precache.in_process import InProcessClient
from imagecache_lib.precache.watch import Watch
from imagecache_lib.system import threads

if TYPE_CHECKING:
    from imagecache_lib.precache.precacher import AggregatePrecacher

#: How many hosts an error names.
_NAMED = 3


class HostsCommand(jobs.JobCommand):
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
            type=values.image_id,
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

    def hosts(self, arguments: argparse.Namespace) -> list[job_hosts.Placed]:
        """Return the hosts that the command line names, each with its site; those of a site in a row."""
        found = [job_hosts.Placed(name) for name in arguments.host]
        if arguments.hosts_file is not None:
            found += job_hosts.read(arguments.hosts_file)
        if not found and arguments.aggregate and openstack.is_named(os.environ):
            found += [job_hosts.Placed(name) for name in openstack.hosts_of(arguments.aggregate)]
        if not found and bus.transport(self.app.options.config_file) is None:
            found.append(job_hosts.Placed(opts.from_files(self.app.options.config_file)[1].name))
        return job_hosts.in_a_row(found)

    def images(self, arguments: argparse.Namespace) -> list[str]:
        """Return the ids of the images that the command line names, by id or by name."""
        if not sources.is_cloud(arguments):
            return list(arguments.image)
        return [openstack.image_of(said) for said in arguments.image]

    @contextlib.contextmanager
    def conductor(
        self, arguments: argparse.Namespace, images: list[str] | None, hosts: Iterable[str] = ()
    ) -> Iterator[AggregatePrecacher]:
        """Yield what reaches the agents: over the message bus, else this very host's own.

        :param images: ids of the images that will be fetched, or None if nothing will be.
        :param hosts: names of the hosts that will have to answer.
        :raises ConfigError: one of them cannot, since there is no message bus.
        """
        from imagecache_lib.precache.precacher import AggregatePrecacher

        found = bus.transport(self.app.options.config_file)
        own = opts.from_files(self.app.options.config_file)[1].name
        if found is None:
            _require_own(hosts, own)
        database = self.database(arguments)
        if found is not None:
            from imagecache_lib.precache import rpc

            files = self.app.options.config_file
            notify = bus.job_notifier(files, own)
            waited = getattr(arguments, "timeout", None)
            over_bus = rpc.RpcHostClient(
                found,
                topic=arguments.topic,
                survey_timeout=rpc.SURVEY_TIMEOUT if waited is None else float(waited),
                mailboxes=bus.mailboxes(files),
            )
            yield AggregatePrecacher(database, over_bus, observers=[notify])
            return
        if images is None:
            yield AggregatePrecacher(database, InProcessClient({}, idle=[own]))
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
        try:
            running = threads.start(run, name="imagecache-job", daemon=False)
            try:
                self.show(conductor, work.id, running)
            finally:
                running.join()
        finally:
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

        def refresh() -> None:
            # What the database cannot say now costs a look at the job, and not the job.
            with contextlib.suppress(errors.ConfigError):
                display.show(conductor.status(job_id))

        with display.alone():
            while running.is_alive():
                refresh()
                running.join(jobs.REFRESH)
            refresh()


def _require_own(hosts: Iterable[str], own: str) -> None:
    """Refuse hosts that cannot be asked without a message bus.

    :raises ConfigError: one of them is not this host.
    """
    others = [name for name in hosts if name != own]
    if others:
        more = f" and {values.counted(len(others) - _NAMED, 'other')}" if len(others) > _NAMED else ""
        raise errors.ConfigError(
            f"there is no message bus to ask {', '.join(others[:_NAMED])}{more}: the configuration has no "
            f"transport_url, and without one {own} is the only host",
            next_step="set transport_url in the configuration file, or "
            "OS_DEFAULT__TRANSPORT_URL in the environment",
        )
