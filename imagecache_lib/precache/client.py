# SPDX-License-Identifier: Apache-2.0
"""How the conductor reaches a host's agent: a narrow interface, and the way within one process."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from imagecache_lib import errors
from imagecache_lib.precache.job import Cell

if TYPE_CHECKING:
    from imagecache_lib.precache.agent import HostAgent


#: More than any roll-out needs; a task is no way to fill an agent's memory.
MOST_IMAGES = 1000


class HostDown(errors.SourceError):
    """The host does not answer. It may come back."""


class HostUnsupported(errors.BackendError):
    """The host has no image cache."""


class UnknownTask(errors.SourceError):
    """The host knows nothing of the task: it restarted since it began. Begin it again."""


@dataclasses.dataclass(frozen=True)
class HostTask:
    """A host's part of a job. Names images only: where they come from is the host's own configuration.

    :param job_id: the job's. A host that has a task of that id goes on with it.
    :param image_ids: to be cached, in series.
    :param attempt: a host that knows the task, but of an earlier attempt, tries again what failed.
    :param rate: bytes per second that it may fetch. 0: no limit.
    :param deadline: epoch seconds. None: none.
    :param pin_until: epoch seconds. None: do not pin.
    :param retries: how often to try an image again after a failure that may pass.
    """

    job_id: str
    image_ids: tuple[str, ...]
    attempt: int = 0
    rate: int = 0
    deadline: float | None = None
    pin_until: float | None = None
    retries: int = 3


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a host would have to do for some images.

    :param present: those that it has.
    :param missing: those that it has not, with their sizes in bytes; None where the source does not say.
    :param free: bytes that its cache's filesystem has free.
    :param problems: by image id, why it cannot be had.
    """

    present: tuple[str, ...]
    missing: Mapping[str, int | None]
    free: int
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)


class HostClient(abc.ABC):
    """Reaches the agents of hosts by their names. Safe to share between threads.

    Every method answers soon: the work itself goes on in the agent.
    """

    @abc.abstractmethod
    def survey(self, host: str, image_ids: Sequence[str]) -> Survey:
        """Ask what a host has of some images.

        :raises HostDown, HostUnsupported: as they say.
        """

    @abc.abstractmethod
    def begin(self, host: str, task: HostTask) -> None:
        """Have a host work on a task; nothing changes if it does already.

        :raises HostDown, HostUnsupported: as they say.
        :raises BackendError: the host refuses the task; the cause says why.
        """

    @abc.abstractmethod
    def poll(self, host: str, job_id: str) -> Mapping[str, Cell]:
        """Ask how far a task is, by image id.

        :raises HostDown: it does not answer.
        :raises UnknownTask: it has forgotten.
        """

    @abc.abstractmethod
    def cancel(self, host: str, job_id: str) -> None:
        """Have a host stop working on a task. One that it does not know is fine.

        :raises HostDown: it does not answer.
        """


class InProcessClient(HostClient):
    """Agents in this very process: one machine, or a test."""

    def __init__(self, agents: Mapping[str, HostAgent]) -> None:
        self._agents = agents

    def survey(self, host: str, image_ids: Sequence[str]) -> Survey:
        return self._agent(host).survey(image_ids)

    def begin(self, host: str, task: HostTask) -> None:
        self._agent(host).begin(task)

    def poll(self, host: str, job_id: str) -> Mapping[str, Cell]:
        return self._agent(host).poll(job_id)

    def cancel(self, host: str, job_id: str) -> None:
        if host in self._agents:  # without an agent, nothing is at work
            self._agents[host].cancel(job_id)

    def _agent(self, host: str) -> HostAgent:
        try:
            return self._agents[host]
        except KeyError:
            raise HostDown(f"there is no agent for host {host}", next_step="start one") from None
