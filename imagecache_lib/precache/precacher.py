# SPDX-License-Identifier: Apache-2.0
"""The conductor's side of pre-caching a host aggregate: plan, start, run, watch, cancel, resume.

Nothing of this is needed to finish a download: a conductor that dies and comes back begins the same tasks
again, which the agents either still have, or find cached.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from imagecache_lib import errors, model
from imagecache_lib.precache import client, job, job_rows, lease
from imagecache_lib.precache.calls import Call, Stop, Visit
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.job_events import JobEvent, JobObserver, Teller
from imagecache_lib.precache.patience import USUAL, Pauses
from imagecache_lib.precache.progress import JobProgress
from imagecache_lib.precache.run import JobRun
from imagecache_lib.precache.writer import JobWriter
from imagecache_lib.system import threads
from imagecache_lib.system.host import System
from imagecache_lib.system.maker import Maker

Answer = TypeVar("Answer")

LOG = logging.getLogger(__name__)

#: How many hosts are asked at a time what they have, or told to stop. That is cheap for them, and most of it
#: is waiting for those that are down.
_AT_A_TIME = 128

#: Seconds between two looks at a job that another conductor runs.
_WATCH = 1.0

#: Seconds between two tries to tell hosts to stop while the message bus does not work.
_BUS_PAUSE = 2.0

_CANCELLED = Stop(job.Result.SKIPPED, "the job was cancelled")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job would do.

    :param surveys: what each host has and lacks.
    :param unreachable: by host that could not be surveyed, why.
    """

    surveys: Mapping[str, client.Survey]
    unreachable: Mapping[str, str]

    @property
    def bytes_to_fetch(self) -> int:
        """Bytes to fetch over all hosts, of the images whose size is known."""
        return sum(size or 0 for survey in self.surveys.values() for size in survey.missing.values())


class AggregatePrecacher:
    """Runs pre-cache jobs. One per conductor process; several may share a database.

    :param database: where jobs are kept.
    :param hosts: reaches the agents.
    :param observers: called with each event, one after the other, in a thread of their own; what they raise
        is logged.
    :param pauses: how long to wait for what.
    """

    def __init__(
        self,
        database: JobDatabase,
        hosts: client.HostClient,
        *,
        host: System | None = None,
        observers: Sequence[JobObserver] = (),
        pauses: Pauses = USUAL,
    ) -> None:
        self._database = database
        self._hosts = hosts
        self._host = host or System()
        self._observers = tuple(observers)
        self._pauses = pauses
        self._running: dict[str, JobProgress] = {}

    def plan(
        self,
        hosts: Sequence[str],
        image_ids: Sequence[str],
        *,
        learned: Callable[[str, client.Survey | errors.ImageCacheError], None] = lambda _host, _answer: None,
    ) -> Plan:
        """Ask all hosts what they have, and return what a job would do. Changes nothing.

        :param learned: called with each host and its answer, or the error that stands for it, as soon as
            either is known.
        :raises ConfigError, ImageRejected: the request makes no sense.
        :raises BackendError: no thread can be started.
        """
        job.check(hosts, image_ids)
        surveys: dict[str, client.Survey] = {}
        unreachable: dict[str, str] = {}
        for name, answer in _asked(hosts, lambda name: self._hosts.survey(name, image_ids).about(image_ids)):
            if isinstance(answer, errors.ImageCacheError):
                unreachable[name] = str(answer)
            else:
                surveys[name] = answer
            learned(name, answer)
        return Plan(surveys, unreachable)

    def start(
        self,
        aggregate: str,
        hosts: Sequence[str],
        image_ids: Sequence[str],
        terms: job.Terms | None = None,
        *,
        job_id: str | None = None,
    ) -> job.Job:
        """Store a new job and return it. :meth:`run` works on it.

        :param job_id: the id of the job, 32 hex digits at random, or None to have one made. A caller that was
            told that the database failed can ask again with the same id: the job is then stored once.
        :raises ConfigError, ImageRejected: the request makes no sense, or the job database fails.
        """
        job.check(hosts, image_ids)
        return self._database.add(
            aggregate, hosts, image_ids, terms or job.Terms(), now=self._host.clock(), job_id=job_id
        )

    def run(self, job_id: str, *, leave: model.CancelToken | None = None) -> job.Job:
        """Work on a job until every image on every host has a result, and return the job.

        Goes on where an earlier run stopped.

        While another conductor runs the job, this one watches, and goes on with the job should the other die.

        :param leave: once it is set, return; the hosts go on with what they have begun.
        :raises ConfigError: there is no such job, this release does not understand it, or the job database
            fails.
        :raises BackendError: no thread can be started. The job stays as it is.
        """
        return self._work(job_id, leave or threading.Event(), retry=False)

    def resume(self, job_id: str, *, leave: model.CancelToken | None = None) -> job.Job:
        """Work on a job as :meth:`run` does, and try again what failed or was skipped. Returns the job."""
        return self._work(job_id, leave or threading.Event(), retry=True)

    def status(self, job_id: str) -> job.Job:
        """Return a job with its progress so far.

        :raises ConfigError: there is no such job.
        """
        running = self._running.get(job_id)
        return self._database.get(job_id) if running is None else running.job

    def list(self) -> list[job.JobSummary]:
        """Return a summary of every job, the oldest first."""
        return self._database.summaries()

    def prune(self, older_than: float) -> int:
        """Delete the jobs that are over and older than so many seconds. Returns how many it deleted."""
        return self._database.prune(self._host.clock() - older_than)

    def cancel(self, job_id: str) -> job.Job:
        """Stop a job, whichever process runs it, and return the job. What is not done ends as skipped.

        :raises ConfigError: there is no such job.
        :raises BackendError: no thread can be started to tell the hosts. The job is marked as cancelled.
        """
        self._database.cancel(job_id)
        work = self._database.get(job_id)
        open_hosts = [name for name in work.hosts if work.pending(name)]
        # The hosts stop at once, even if the conductor that runs the job hangs.
        told = self._tell_to_stop(job_id, open_hosts)
        with self._lease(job_id, threading.Event()) as runner:
            if runner is not None:
                self._end_open(job_id, runner, told)
        return self._database.get(job_id)

    # -- running -------------------------------------------------------------------------------------

    def _work(self, job_id: str, leave: model.CancelToken, *, retry: bool) -> job.Job:
        while not leave.is_set():
            try:
                with self._lease(job_id, leave) as runner:
                    if runner is not None:
                        return self._run(job_id, runner, leave, retry=retry)
            except lease.LeaseLost:
                LOG.warning("Another conductor has taken over job %s", job_id)
                continue
            break
        return self._database.get(job_id)

    def _run(self, job_id: str, runner: str, leave: model.CancelToken, *, retry: bool) -> job.Job:
        job_rows.require_runnable(self._database.get(job_id))
        deadline = self._database.get(job_id).terms.deadline
        if deadline is not None and self._host.clock() >= deadline:
            LOG.warning(
                "The deadline of job %s has passed: nothing is tried, results that are there stay", job_id
            )
        elif retry:
            self._database.retry(job_id, runner, deadline=deadline)
        progress = JobProgress(self._database.get(job_id))
        # Taking the lease raised the beat of a job that nobody had run from 0 to 1.
        again = self._database.lease_of(job_id).beat > 1
        with contextlib.closing(Teller(self._observers)) as teller:

            def done(name: str) -> None:
                teller.tell(JobEvent("progress", progress.job, name, progress.hosts_over))

            run = JobRun(
                progress,
                JobWriter(self._database, progress, runner, host=self._host),
                self._hosts,
                host=self._host,
                again=again,
                done=done,
                leave=leave,
                pauses=self._pauses,
            )
            teller.tell(JobEvent("start", progress.job))
            self._running[job_id] = progress
            try:
                run.execute()
                if progress.is_over:
                    teller.tell(JobEvent("end", progress.job, index=progress.hosts_over))
            finally:
                del self._running[job_id]
        return self._database.get(job_id)

    @contextlib.contextmanager
    def _lease(self, job_id: str, leave: model.CancelToken) -> Iterator[str | None]:
        """Yield the name under which this process runs a job, once no other process runs it.

        Yields None if another process brought the job to its end, or ``leave`` was set meanwhile.
        """
        runner = lease.new_runner(self._host.name)
        taken, maker = self._take_lease(job_id, runner, leave), Maker()
        try:
            yield runner if taken else None
        finally:
            if taken and maker.is_here:
                # Not worth a failure: the lease lapses by itself.
                with contextlib.suppress(errors.ConfigError):
                    self._database.release_lease(job_id, runner)

    def _take_lease(self, job_id: str, runner: str, leave: model.CancelToken) -> bool:
        seen, since, watched = self._database.lease_of(job_id), self._host.monotonic(), False
        while True:
            lapsed = self._host.monotonic() - since >= lease.SECONDS
            if (seen.is_free or lapsed) and not (watched and self._database.is_over(job_id)):
                if self._database.take_lease(job_id, runner, seen):
                    if seen.runner is not None:
                        LOG.warning(
                            "Job %s was left by the conductor on %s, and goes on here", job_id, seen.conductor
                        )
                    return True
            elif watched and seen.runner is None:
                return False
            if not watched and seen.runner is not None:
                watched = True
                LOG.warning("Job %s is run by the conductor on %s: watching it", job_id, seen.conductor)
            if leave.is_set():
                return False
            self._host.sleep(_WATCH)
            now = self._database.lease_of(job_id)
            if now != seen:
                seen, since = now, self._host.monotonic()

    # -- cancelling ----------------------------------------------------------------------------------

    def _tell_to_stop(self, job_id: str, hosts: Sequence[str]) -> Mapping[str, Visit]:
        """Tell hosts to stop, again while it is the message bus that does not work: it may restart."""
        began, told, left = self._host.monotonic(), dict[str, Visit](), list(hosts)
        while left:
            told.update(self._stop_all(job_id, left))
            left = [name for name in left if told[name].untold is not None]
            # What was on its way when the message bus went is lost, too: those hosts seem to be down.
            failing = next((told[name].untold for name in left if _is_the_bus(told[name])), None)
            if failing is None or self._host.monotonic() - began >= self._pauses.bus:
                break
            LOG.warning("The message bus does not work, to be tried again: %s", failing)
            self._host.sleep(_BUS_PAUSE)
        return {name: self._told(name, visit) for name, visit in told.items()}

    def _stop_all(self, job_id: str, hosts: Sequence[str]) -> Iterator[tuple[str, Visit]]:
        calls = {name: Call(self._hosts, job_id, name, stop=_CANCELLED) for name in hosts}
        for name, visit in _asked(hosts, lambda name: calls[name].make()):
            assert isinstance(visit, Visit)
            yield name, visit

    def _told(self, name: str, visit: Visit) -> Visit:
        if visit.failure is not None:
            LOG.error("Host %s could not be told to stop", name, exc_info=visit.failure)
        elif visit.stop is not None and visit.stop != _CANCELLED:
            LOG.warning("Host %s: %s", name, visit.stop.reason)
        return visit

    def _end_open(self, job_id: str, runner: str, told: Mapping[str, Visit]) -> None:
        """End the cells without a result, after what the hosts said when they were told to stop."""
        progress = JobProgress(self._database.get(job_id))
        for name in progress.job.hosts:
            visit = told.get(name)
            if visit is not None and visit.report is not None:
                progress.record(name, visit.report.cells)
            reason = visit.stop.reason if visit is not None and visit.stop is not None else _CANCELLED.reason
            progress.finish(name, _CANCELLED.result, reason)
        JobWriter(self._database, progress, runner, host=self._host).close()


def _is_the_bus(visit: Visit) -> bool:
    return isinstance(visit.untold, client.BusDown)


def _asked(
    hosts: Sequence[str], ask: Callable[[str], Answer]
) -> Iterable[tuple[str, Answer | errors.ImageCacheError]]:
    """Ask many hosts at a time, and yield each answer, or the error that stands for it, once it is known.

    :raises BackendError: not one thread can be started.
    """
    if not hosts:
        return
    pool = threads.Pool(min(_AT_A_TIME, len(hosts)), "imagecache-asks")
    try:
        asked = {pool.submit(functools.partial(ask, name)): name for name in hosts}
        for answer in concurrent.futures.as_completed(asked):
            try:
                yield asked[answer], answer.result()
            except errors.ImageCacheError as error:
                yield asked[answer], error
    finally:
        # Whoever is interrupted waits for no host, and asks no more of them.
        pool.close(drop=True)
