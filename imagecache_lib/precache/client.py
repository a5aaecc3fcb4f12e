# SPDX-License-Identifier: Apache-2.0
"""How the conductor reaches a host's agent: a narrow interface, and the values that cross it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence

from imagecache_lib import errors
from imagecache_lib.precache.job import Cell


@dataclasses.dataclass(frozen=True)
class AgentInfo:
    """What an agent says of itself in every answer.

    :param instance: random, and new whenever the agent starts: two agents that call themselves by one host's
        name, and one that restarts again and again, are told apart by it.
    :param clock: epoch seconds, by the agent's clock, when it answered.
    """

    instance: str
    clock: float


class HostDown(errors.SourceError):
    """The host does not answer. It may come back."""


class HostBusy(errors.SourceError):
    """The host cannot take a task now. It will answer otherwise later."""


class HostUnsupported(errors.BackendError):
    """The host has no image cache, or its agent speaks another version of the protocol."""


class UnknownTask(errors.SourceError):
    """The host knows nothing of the task: its agent restarted since it began. Begin it again.

    :ivar agent: which agent says so, if it says who it is.
    """

    agent: AgentInfo | None = None


@dataclasses.dataclass(frozen=True)
class HostTask:
    """A host's part of a job. Names images only: where they come from is the host's own configuration.

    :param job_id: the job's. A host that has a task of that id goes on with it.
    :param image_ids: to be cached, in series.
    :param attempt: a host that knows the task, but of an earlier attempt, tries again what failed.
    :param rate: bytes per second that it may fetch. 0: no limit.
    :param deadline: epoch seconds after which nothing more is begun, if there is such a moment.
    :param pin_until: epoch seconds until which the images stay, if they are to be pinned.
    :param retries: how often to try an image again after a failure that may pass.
    :param deadline_in: the deadline in seconds from now. An agent that knows it does not look at the other,
        which is by the conductor's clock.
    :param pin_for: the end of the pin in seconds from now, likewise.
    """

    job_id: str
    image_ids: tuple[str, ...]
    attempt: int = 0
    rate: int = 0
    deadline: float | None = None
    pin_until: float | None = None
    retries: int = 3
    deadline_in: float | None = None
    pin_for: float | None = None


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a host would have to do for some images.

    :param present: those that it has.
    :param missing: those that it has not, with their sizes in bytes; None where the source does not say.
    :param free: bytes that its cache's filesystem has free.
    :param problems: by image id, why it cannot be had.
    :param agent: which agent says so, if it says who it is.
    """

    present: tuple[str, ...]
    missing: Mapping[str, int | None]
    free: int
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)
    agent: AgentInfo | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """How far a host's task is.

    :param cells: by image id.
    :param agent: which agent says so, if it says who it is.
    """

    cells: Mapping[str, Cell]
    agent: AgentInfo | None = dataclasses.field(default=None, compare=False)


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
    def begin(self, host: str, task: HostTask) -> AgentInfo | None:
        """Have a host work on a task; nothing changes if it does already. Returns which agent took it.

        :raises HostDown, HostBusy, HostUnsupported: as they say.
        :raises BackendError: the host refuses the task; the cause says why.
        """

    @abc.abstractmethod
    def poll(self, host: str, job_id: str) -> TaskReport:
        """Ask how far a task is.

        :raises HostDown: it does not answer.
        :raises UnknownTask: it has forgotten.
        """

    @abc.abstractmethod
    def cancel(self, host: str, job_id: str) -> None:
        """Have a host stop working on a task. One that it does not know is fine.

        :raises HostDown: it does not answer.
        """
