# SPDX-License-Identifier: Apache-2.0
"""One call on a host, made in a thread of its own: values in, a value out, and no exception."""

from __future__ import annotations

import contextlib
import dataclasses

from imagecache_lib import errors
from imagecache_lib.precache import client, job
from imagecache_lib.precache.chains import HostRoute


@dataclasses.dataclass(frozen=True)
class Stop:
    """How a host is to be told to stop working on its task, and how its images end.

    :param result: the result of the images that have none when the host has stopped.
    :param reason: why, as a clause.
    :param calls: how often to tell the host.
    """

    result: job.Result
    reason: str
    calls: int = 1


@dataclasses.dataclass(frozen=True)
class Visit:
    """What a call brought.

    :param route: the route that the host took with the task, or None if it was given none.
    :param begun: the host took the task in this call.
    :param report: what the host says of the task, or None if it said nothing.
    :param failure: the exception that the call raised, or None if it raised none.
    :param stop: the stop that was asked for, with its reason completed, or None if the host was not to stop.
    :param untold: why the host could not be told to stop, or None if it could, or was not to be.
    :param agents: which agents answered, in order.
    """

    host: str
    begun: bool = False
    report: client.TaskReport | None = None
    failure: BaseException | None = None
    stop: Stop | None = None
    untold: errors.ImageCacheError | None = None
    agents: tuple[client.AgentInfo, ...] = ()
    route: HostRoute | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """One look at a host.

    :param hosts: reaches the host.
    :param task: the task to begin first, or None to begin none.
    :param release: let the host remove what it keeps for others, which is then all that the call does.
    :param stop: how to tell the host to stop, which is then all that the call does, or None to look at it.
    """

    hosts: client.HostClient
    job_id: str
    host: str
    task: client.HostTask | None = None
    release: bool = False
    stop: Stop | None = None

    def make(self) -> Visit:
        """Return what the call brought, failures included."""
        try:
            if self.release:
                self.hosts.release(self.host, self.job_id)
                return Visit(self.host)
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
        route = self.task.relay if begun and self.task is not None else None
        return Visit(self.host, begun, report, failure, agents=known, route=route)

    def _stop(self, stop: Stop) -> Visit:
        try:
            for _call in range(stop.calls):
                self.hosts.cancel(self.host, self.job_id)
        except errors.ImageCacheError as error:
            told = dataclasses.replace(stop, reason=f"{stop.reason}, and the host could not be told: {error}")
            return Visit(self.host, stop=told, untold=error)
        report = None
        # What it did until then is worth knowing; that it does not say so changes nothing.
        with contextlib.suppress(errors.ImageCacheError):
            report = self.hosts.poll(self.host, self.job_id)
        return Visit(self.host, report=report, stop=stop)
