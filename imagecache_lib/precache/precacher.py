# SPDX-License-Identifier: Apache-2.0
"""The conductor's side of pre-caching a host aggregate: plan, start, run, watch, cancel, resume.

Nothing of this is needed to finish a download: a conductor that dies and comes back begins the same tasks
again, which the agents either still have, or find cached.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import random as random_module
import threading
from collections.abc import Callable, Mapping, Sequence

from imagecache_lib import errors, model
from imagecache_lib.precache import client, job
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.run import JobRun
from imagecache_lib.system.host import System

LOG = logging.getLogger(__name__)

#: How many hosts are asked at a time what they have. That is cheap for them, and most of it is waiting.
_SURVEYS = 16


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job would do.

    :param surveys: what each host has and lacks.
    :param unreachable: by host, why nothing is known of it.
    """

    surveys: Mapping[str, client.Survey]
    unreachable: Mapping[str, str]

    @property
    def bytes_to_fetch(self) -> int:
        """Over all hosts, of the images whose size is known."""
        return sum(size or 0 for survey in self.surveys.values() for size in survey.missing.values())


@dataclasses.dataclass(frozen=True)
class JobEvent:
    """What happens to a job.

    :param kind: ``start``, ``progress`` (a host is done, well or not) or ``end``.
    :param job: as far as it is.
    :param host: the host that is done, for ``progress``.
    :param index: how many hosts are done, those of earlier runs included.
    """

    kind: str
    job: job.Job
    host: str | None = None
    index: int = 0


class AggregatePrecacher:
    """Runs pre-cache jobs. One per conductor process; several may share a database.

    :param database: where jobs are kept.
    :param hosts: reaches the agents.
    :param observers: called with what happens, in the threads in which it happens; what they raise is logged.
    :param random: uniform in [0, 1), for jitter.
    """

    def __init__(
        self,
        database: JobDatabase,
        hosts: client.HostClient,
        *,
        host: System | None = None,
        observers: Sequence[Callable[[JobEvent], None]] = (),
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self._database = database
        self._hosts = hosts
        self._host = host or System()
        self._observers = tuple(observers)
        self._random = random

    def plan(self, hosts: Sequence[str], image_ids: Sequence[str]) -> Plan:
        """Ask all hosts what they have. Changes nothing.

        :raises ConfigError, ImageRejected: the request makes no sense.
        """
        job.check(hosts, image_ids)
        surveys: dict[str, client.Survey] = {}
        unreachable: dict[str, str] = {}
        with concurrent.futures.ThreadPoolExecutor(min(_SURVEYS, len(hosts))) as pool:
            asked = {name: pool.submit(self._hosts.survey, name, image_ids) for name in hosts}
        for name, answer in asked.items():
            try:
                surveys[name] = answer.result()
            except errors.ImageCacheError as error:
                unreachable[name] = str(error)
        return Plan(surveys, unreachable)

    def start(
        self, aggregate: str, hosts: Sequence[str], image_ids: Sequence[str], terms: job.Terms | None = None
    ) -> job.Job:
        """Keep a new job. :meth:`run` works on it.

        :raises ConfigError, ImageRejected: the request makes no sense.
        """
        job.check(hosts, image_ids)
        return self._database.add(aggregate, hosts, image_ids, terms or job.Terms(), now=self._host.clock())

    def run(self, job_id: str, *, leave: model.CancelToken | None = None) -> job.Job:
        """Work on a job until everything has a result. Goes on where an earlier run stopped.

        :param leave: once it is set, return; the hosts go on with what they have begun.
        :raises ConfigError: there is no such job.
        """
        work = self._database.get(job_id)
        self._tell(JobEvent("start", work))

        def done(name: str) -> None:
            now = self._database.get(job_id)
            over = sum(not now.pending(each) for each in now.hosts)
            self._tell(JobEvent("progress", now, name, over))

        JobRun(
            work,
            self._database,
            self._hosts,
            host=self._host,
            done=done,
            leave=leave or threading.Event(),
            random=self._random,
        ).execute()
        ended = self._database.get(job_id)
        if ended.is_over:
            self._tell(JobEvent("end", ended, index=len(ended.hosts)))
        return ended

    def status(self, job_id: str) -> job.Job:
        """Return a job as far as it is.

        :raises ConfigError: there is no such job.
        """
        return self._database.get(job_id)

    def list(self) -> list[job.Job]:
        """Return all jobs, the oldest first."""
        return self._database.all()

    def cancel(self, job_id: str) -> None:
        """Stop a job, whichever process runs it. What is not done ends as skipped.

        :raises ConfigError: there is no such job.
        """
        work = self._database.get(job_id)
        self._database.cancel(job_id)
        for name in work.hosts:
            if work.pending(name):
                try:
                    self._hosts.cancel(name, job_id)
                except errors.ImageCacheError as error:
                    LOG.warning("Host %s could not be told that job %s is cancelled: %s", name, job_id, error)

    def resume(self, job_id: str, *, leave: model.CancelToken | None = None) -> job.Job:
        """Work on a job again, on what failed or was skipped too. As :meth:`run`."""
        self._database.retry(job_id)
        return self.run(job_id, leave=leave)

    def _tell(self, event: JobEvent) -> None:
        for observer in self._observers:
            try:
                observer(event)
            except Exception:
                LOG.exception("An observer failed on %s of job %s", event.kind, event.job.id)
