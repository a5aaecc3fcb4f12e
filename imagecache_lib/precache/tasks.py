# SPDX-License-Identifier: Apache-2.0
"""A task at work on a host: how far it is, what comes next, what a conductor has not heard yet. No I/O."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Mapping

from imagecache_lib.precache import client, job
from imagecache_lib.sources.route import Route, RouteState
from imagecache_lib.system.host import System


@dataclasses.dataclass(frozen=True)
class Moments:
    """When a task ends, by the host's monotonic clock: the time of day may be set while the task is at work.

    :param deadline: after which no image is begun, or None for no deadline.
    :param pin_until: until which the images stay pinned, or None not to pin them.
    """

    deadline: float | None = None
    pin_until: float | None = None

    @classmethod
    def of(cls, asked: client.HostTask, system: System) -> Moments:
        """Return the moments of a task: the seconds from now that it names, else its times of day."""
        now, off = system.monotonic(), system.monotonic() - system.clock()

        def moment(ahead: float | None, absolute: float | None) -> float | None:
            if ahead is not None:
                return now + ahead
            return None if absolute is None else absolute + off

        return cls(moment(asked.deadline_in, asked.deadline), moment(asked.pin_for, asked.pin_until))

    def by_the_clock(self, system: System) -> Moments:
        """Return them in epoch seconds, as the host's clock is now."""
        off = system.clock() - system.monotonic()
        found = (None if each is None else each + off for each in (self.deadline, self.pin_until))
        return Moments(*found)


@dataclasses.dataclass(frozen=True)
class Retry:
    """An image that failed in a way that may pass.

    :param not_before: when to try it again at the earliest, by the monotonic clock.
    :param failures: how often it failed so far.
    """

    not_before: float
    failures: int


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What is needed to try one image: the task's state when the try began.

    :param moments: when the task ends.
    :param cancelled: set when the task is to stop.
    :param failures: how often the image failed before.
    """

    asked: client.HostTask
    moments: Moments
    cancelled: threading.Event
    image_id: str
    failures: int

    def is_late(self, now: float) -> bool:
        """Whether the deadline has passed at a moment of the monotonic clock."""
        return self.moments.deadline is not None and now >= self.moments.deadline


class Task:
    """A task at work. Guarded by the agent's lock.

    :ivar watched_until: until when the agent reports what changes. All moments are by the monotonic clock.
    """

    def __init__(self, asked: client.HostTask, moments: Moments) -> None:
        self.asked = asked
        self._moments = moments
        self.watched_until = 0.0
        self.number = 0
        self._told: dict[str, job.Cell] = {}
        self._report_to = asked.report_to
        self.cells = {image_id: job.Cell() for image_id in asked.image_ids}
        #: Where the images come from, if other hosts pass them on.
        self.route = None if asked.relay is None else Route(asked.relay.parents, origin=asked.relay.origin)
        self._told_state = RouteState()
        self.cancelled = threading.Event()
        self.thread: threading.Thread | None = None
        self.current: str | None = None
        self.spent = 0
        self._retries: dict[str, Retry] = {}

    @property
    def is_over(self) -> bool:
        return all(cell.result is not None for cell in self.cells.values())

    def extend(self, asked: client.HostTask, moments: Moments) -> None:
        """Go on with what is asked now: more images, or another attempt at those that failed."""
        again = asked.attempt > self.asked.attempt
        if asked.report_to != self._report_to:
            # Another conductor, or another run of it, to which nothing was told yet.
            self._report_to, self._told = asked.report_to, {}
        if self.route is not None and asked.relay is not None:
            self.route.change(asked.relay.parents, origin=asked.relay.origin)
        for image_id in asked.image_ids:
            cell = self.cells.setdefault(image_id, job.Cell())
            if again and cell.result is not None and cell.result.is_failure:
                self.cells[image_id] = job.Cell()
        if again:
            self.asked, self._moments = asked, moments
            self._retries.clear()
            if self.route is not None:
                self.route.acquit()
            # One that was not cancelled is what a fetch under way looks at: the next cancellation, or the
            # agent's end, must reach that fetch whichever attempt began it.
            if self.cancelled.is_set():
                self.cancelled = threading.Event()

    def pending(self, image_ids: Iterable[str]) -> list[str]:
        """Return those of some images of the task that have no result."""
        return [image_id for image_id in image_ids if self.cells[image_id].result is None]

    def next(self, now: float) -> Attempt | None:
        """Return the image to try now, or None if every image has a result or waits for a retry."""
        self.current = None
        for image_id, cell in self.cells.items():
            retry = self._retries.get(image_id, Retry(0.0, 0))
            if cell.result is None and (retry.not_before <= now or self.cancelled.is_set()):
                self.current = image_id
                return Attempt(self.asked, self._moments, self.cancelled, image_id, retry.failures)
        return None

    def postpone(self, attempt: Attempt, not_before: float) -> None:
        """Let other images go before one that failed, until it may be tried again."""
        self._retries[attempt.image_id] = Retry(not_before, attempt.failures + 1)

    def seconds_to_next(self, now: float) -> float:
        """Return the seconds until there is something to do."""
        pending = [self._retries[image_id] for image_id, cell in self.cells.items() if cell.result is None]
        return max(0.0, min((retry.not_before for retry in pending), default=now) - now)

    # -- what a conductor has not heard --------------------------------------------------------------

    def report_to(self, now: float) -> str | None:
        """Return the mailbox of the conductor that watches the task, or None if none does."""
        return self._report_to if now < self.watched_until else None

    def changes(self, cells: Mapping[str, job.Cell]) -> Mapping[str, job.Cell] | None:
        """Return those of the cells that changed since they were reported, and count them as reported.

        Returns None if nothing changed, the state of the route included.
        """
        changed = {image_id: cell for image_id, cell in cells.items() if self._told.get(image_id) != cell}
        state = self._told_state if self.route is None else self.route.state
        if not changed and state == self._told_state:
            return None
        self._told.update(changed)
        self._told_state = state
        self.number += 1
        return changed

    def untold(self, image_ids: Iterable[str]) -> None:
        """Count cells as not reported, since the report on them could not be sent."""
        for image_id in image_ids:
            self._told.pop(image_id, None)
