# SPDX-License-Identifier: Apache-2.0
"""How the conductor reaches a host's agent: a narrow interface, and the values that cross it."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.precache.chains import HostRoute
from imagecache_lib.precache.job import Cell
from imagecache_lib.sources.route import RouteState


@dataclasses.dataclass(frozen=True)
class AgentInfo:
    """What an agent says of itself in every answer.

    :param instance: random, and new whenever the agent starts: two agents that call themselves by one host's
        name, and one that restarts again and again, are told apart by it.
    :param clock: epoch seconds, by the agent's clock, when it answered.
    :param reports: whether the agent reports by itself how far a task is, to the mailbox that the task names.
    :param relays: whether the host passes images on to others while it receives them.
    """

    instance: str
    clock: float
    reports: bool = False
    relays: bool = False


class HostDown(errors.SourceError):
    """The host does not answer now, but may do so later."""


class BusDown(HostDown):
    """The host cannot be asked now: the message bus does not work, or the asking process lacks what it needs
    for a call. Nothing is known of the host."""


class HostBusy(errors.SourceError):
    """The host cannot take a task now, but will be able to later."""


class HostUnsupported(errors.BackendError):
    """The host has no image cache, or its agent speaks another version of the protocol."""


class UnknownTask(errors.SourceError):
    """The host knows nothing of the task: its agent restarted since the task began. Begin it again.

    :ivar agent: the agent that says so, or None for one that speaks protocol version 1.0.
    """

    agent: AgentInfo | None = None


@dataclasses.dataclass(frozen=True)
class HostTask:
    """A host's part of a job. Names images only: where they come from is the host's own configuration.

    :param job_id: the job's id. A host that has a task of that id goes on with it.
    :param image_ids: the images to cache, one after the other.
    :param attempt: number of the job's attempt. A host that knows the task from an earlier attempt tries
        again what failed.
    :param rate: bytes per second that the host may fetch; 0 for no limit.
    :param deadline: epoch seconds after which the host begins no more images, or None for no deadline.
    :param pin_until: epoch seconds until which the images stay pinned, or None not to pin them.
    :param retries: how often to try an image again after a failure that may pass.
    :param deadline_in: the deadline in seconds from now. An agent that knows this field ignores ``deadline``,
        which is by the conductor's clock.
    :param pin_for: the end of the pin in seconds from now. An agent that knows this field ignores
        ``pin_until``.
    :param report_to: the conductor's mailbox, to which an agent that can reports what changed. An agent
        whose conductor has not asked for :data:`WATCHED_SECONDS` reports no longer.
    :param relay: which hosts pass the images on to this one, by their names alone, or None if they come from
        the host's own image service. A task that goes on takes the new route at once.
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
    relay: HostRoute | None = None


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a host would have to do for some images.

    :param present: ids of the images that the host has.
    :param missing: by id of an image that the host lacks, its size in bytes, or None where the source does
        not say.
    :param free: bytes that the filesystem of the host's cache has free.
    :param problems: by image id, why the host cannot fetch the image.
    :param agent: the agent that answered, or None for one that speaks protocol version 1.0.
    """

    present: tuple[str, ...]
    missing: Mapping[str, int | None]
    free: int
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)
    agent: AgentInfo | None = dataclasses.field(default=None, compare=False)

    def about(self, image_ids: Sequence[str]) -> Survey:
        """Return what it says of some images, and that it does not say anything of one where that is so."""
        present, known = set(self.present), {*self.present, *self.missing, *self.problems}
        unsaid = dict.fromkeys(
            (each for each in image_ids if each not in known), "the agent does not mention it"
        )
        return dataclasses.replace(
            self,
            present=tuple(each for each in image_ids if each in present),
            missing={each: self.missing[each] for each in image_ids if each in self.missing},
            problems={each: self.problems[each] for each in image_ids if each in self.problems} | unsaid,
        )


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """How far a host's task is.

    :param cells: by image id. An answer has all cells of the task; a report that an agent sends by itself has
        those that changed.
    :param agent: the agent that says so, or None for one that speaks protocol version 1.0.
    :param attempt: number of the job's attempt that this is about.
    :param number: number of the agent's last report on the task; the cells are at least as new. Each report
        that an agent sends by itself has the number after that of its last one.
    :param relay: how the host gets on along the task's route, or None if it has none.
    """

    cells: Mapping[str, Cell]
    agent: AgentInfo | None = dataclasses.field(default=None, compare=False)
    attempt: int = 0
    number: int = 0
    relay: RouteState | None = None


@dataclasses.dataclass(frozen=True)
class HostReport:
    """What an agent reports by itself. A report may get lost, come twice, or after a later one.

    :param host: the name of the agent's host.
    :param job_id: the job whose task it is about.
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

        Yields the mailbox to name in their tasks, or None if agents cannot report to this process. That is
        no failure: the conductor then asks the agents.

        :param inbox: takes the reports on all tasks that name the mailbox.
        """
        yield None

    @abc.abstractmethod
    def survey(self, host: str, image_ids: Sequence[str]) -> Survey:
        """Return what a host has of some images.

        :raises HostDown: the host does not answer.
        :raises HostUnsupported: the host has no image cache, or its agent speaks another protocol version.
        """

    @abc.abstractmethod
    def begin(self, host: str, task: HostTask) -> AgentInfo | None:
        """Have a host work on a task, unless it does already. Returns the agent that took the task.

        :raises HostDown: the host does not answer.
        :raises HostBusy: the host has too many tasks now.
        :raises HostUnsupported: the host has no image cache, or its agent speaks another protocol version.
        :raises BackendError: the host refuses the task; the cause says why.
        """

    @abc.abstractmethod
    def poll(self, host: str, job_id: str) -> TaskReport:
        """Return how far a task is.

        :raises HostDown: the host does not answer.
        :raises UnknownTask: the host does not know the task, or no longer.
        """

    @abc.abstractmethod
    def cancel(self, host: str, job_id: str) -> None:
        """Have a host stop working on a task. Does nothing if the host does not know the task.

        :raises HostDown: the host does not answer.
        """

    def release(self, host: str, job_id: str) -> None:
        """Let a host remove what it keeps of a job's images to pass it on. The default does nothing.

        :raises HostDown: the host does not answer.
        """
        return
