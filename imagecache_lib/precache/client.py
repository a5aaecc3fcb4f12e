# SPDX-License-Identifier: Apache-2.0
"""How the conductor reaches a host's agent: a narrow interface, and the values that cross it."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.precache.job import Cell


@dataclasses.dataclass(frozen=True)
class AgentInfo:
    """What an agent says of itself in every answer.

    :param instance: random, and new whenever the agent starts: two agents that call themselves by one host's
        name, and one that restarts again and again, are told apart by it.
    :param clock: epoch seconds, by the agent's clock, when it answered.
    :param reports: it says by itself how far a task is, if the task says where to.
    """

    instance: str
    clock: float
    reports: bool = False


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
    :param report_to: the conductor's mailbox, to which an agent that can reports what changed. An agent
        whose conductor has not asked for :data:`WATCHED_SECONDS` reports no longer.
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
    report_to: str | None = None


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

    :param cells: by image id. All of the task's in an answer, those that changed in what an agent says by
        itself.
    :param agent: which agent says so, if it says who it is.
    :param attempt: of the job, for which this is so.
    :param number: of the agent's last report on the task; this is at least as new. What an agent says by
        itself is one more than what it said before.
    """

    cells: Mapping[str, Cell]
    agent: AgentInfo | None = dataclasses.field(default=None, compare=False)
    attempt: int = 0
    number: int = 0


@dataclasses.dataclass(frozen=True)
class HostReport:
    """What an agent says by itself. It may get lost, come twice, or after a later one.

    :param host: the name of its host.
    :param job_id: whose task it is about.
    """

    host: str
    job_id: str
    report: TaskReport


class Inbox(Protocol):
    """Takes reports, from any thread. A :class:`queue.SimpleQueue` is one."""

    def put(self, item: HostReport) -> None: ...


#: Seconds for which an agent reports on a task since a conductor asked about it last.
WATCHED_SECONDS = 150.0

#: A conductor asks about a task at least this often, in seconds, although the agent reports by itself.
ASKED_SECONDS = 60.0


class HostClient(abc.ABC):
    """Reaches the agents of hosts by their names. Safe to share between threads.

    Every method answers soon: the work itself goes on in the agent.
    """

    @contextlib.contextmanager
    def listening(self, inbox: Inbox) -> Iterator[str | None]:
        """Bring what agents report by themselves to an inbox during the body.

        Yields the mailbox to name in their tasks; None if agents cannot be heard this way. Not to be heard
        is no failure: agents are asked then.

        :param inbox: takes the reports on all tasks that name the mailbox.
        """
        yield None

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
