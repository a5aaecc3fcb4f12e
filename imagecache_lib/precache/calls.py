# SPDX-License-Identifier: Apache-2.0
"""One call on a host, made in a thread of its own: values in, a value out, and no exception."""

from __future__ import annotations

import contextlib
import dataclasses

from imagecache_lib import errors
from imagecache_lib.precache import client, job


@dataclasses.dataclass(frozen=True)
class Stop:
    """That a host is to stop working on its task, and how its images end.

    :param result: of the images that have none when it has stopped.
    :param calls: how often to tell it.
    """

    result: job.Result
    reason: str
    calls: int = 1


@dataclasses.dataclass(frozen=True)
class Visit:
    """What a call brought.

    :param begun: the host took the task in this call.
    :param report: what the host says of the task, if it said anything.
    :param failure: what was raised, if anything was.
    :param stop: as it was asked for, the reason completed, if the host was to stop.
    :param agents: which agents answered, in order.
    """

    host: str
    begun: bool = False
    report: client.TaskReport | None = None
    failure: BaseException | None = None
    stop: Stop | None = None
    agents: tuple[client.AgentInfo, ...] = ()


@dataclasses.dataclass(frozen=True)
class Call:
    """One look at a host.

    :param hosts: reaches it.
    :param task: to be begun first, if it is to be.
    :param stop: tell the host to stop instead, if it is to.
    """

    hosts: client.HostClient
    job_id: str
    host: str
    task: client.HostTask | None = None
    stop: Stop | None = None

    def make(self) -> Visit:
        """Return what the call brought, failures included."""
        try:
            return self._look() if self.stop is None else self._stop(self.stop)
        except BaseException as failure:
            return Visit(self.host, failure=failure, stop=self.stop)

    def _look(self) -> Visit:
        agents: list[client.AgentInfo | None] = []
        begun, report = False, None
        failure: errors.ImageCacheError | None = None
        try:
            if self.task is not None:
                agents.append(self.hosts.begin(self.host, self.task))
                begun = True
            report = self.hosts.poll(self.host, self.job_id)
            agents.append(report.agent)
        except client.UnknownTask as unknown:
            agents.append(unknown.agent)
            failure = unknown
        except errors.ImageCacheError as error:
            failure = error
        known = tuple(who for who in agents if who is not None)
        return Visit(self.host, begun, report, failure, agents=known)

    def _stop(self, stop: Stop) -> Visit:
        try:
            for _call in range(stop.calls):
                self.hosts.cancel(self.host, self.job_id)
        except errors.ImageCacheError as error:
            told = dataclasses.replace(stop, reason=f"{stop.reason}, and the host could not be told: {error}")
            return Visit(self.host, stop=told)
        report = None
        # What it did until then is worth knowing; that it does not say so changes nothing.
        with contextlib.suppress(errors.ImageCacheError):
            report = self.hosts.poll(self.host, self.job_id)
        return Visit(self.host, report=report, stop=stop)
