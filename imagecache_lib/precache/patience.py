# SPDX-License-Identifier: Apache-2.0
"""When a host is looked at next, and for how long it is waited for. Decides only: no calls.

Moments are by the conductor's monotonic clock, which nobody sets. Only a job's deadline is a time of day: it
is converted anew each time, so that it stays where it is when the conductor's clock is set.
"""

from __future__ import annotations

import dataclasses

from imagecache_lib.precache import client, job
from imagecache_lib.precache.slots import HostState
from imagecache_lib.system.host import System

#: Seconds between two looks at a host that works and does not report by itself.
POLL = 1.0

#: Seconds of silence after which a host that reports by itself is asked: more than three of its periods.
QUIET = 15.0

#: Seconds before a host that is down is asked again: at first, doubled each time, and at most.
POLL_DOWN = 5.0
LONGEST_POLL_DOWN = 30.0

#: Seconds for which a host that was at work and does not answer keeps its slot.
SILENCE = 60.0

#: Without a deadline, a host that is down is given up after so many seconds, and one that cannot take a task
#: because it has too many.
PATIENCE = 600.0
BUSY_PATIENCE = 3600.0

#: Seconds for which hosts are told again to stop while the message bus does not work.
BUS = 30.0

#: Seconds after the deadline in which a host may still say itself how its images ended.
GRACE = 15.0


@dataclasses.dataclass(frozen=True)
class Pauses:
    """What a conductor waits for its hosts. All times are in seconds.

    :param poll: between two looks at a host that works and does not report by itself.
    :param quiet: of silence, after which a host that reports by itself is asked.
    :param down: before a host that is down is asked again at first.
    :param longest_down: the same at most.
    :param silence: for which a host that was at work and does not answer keeps its slot.
    :param patience: for which a host is down until it is given up, where there is no deadline.
    :param busy: the same for a host that has too many tasks.
    :param bus: for which hosts are told again to stop while the message bus does not work.
    :param grace: after the deadline, in which a host may still say how its images ended.
    """

    poll: float = POLL
    quiet: float = QUIET
    down: float = POLL_DOWN
    longest_down: float = LONGEST_POLL_DOWN
    silence: float = SILENCE
    patience: float = PATIENCE
    busy: float = BUSY_PATIENCE
    bus: float = BUS
    grace: float = GRACE


#: What conductors wait that nobody told otherwise.
USUAL = Pauses()


class Patience:
    """The patience of one run of a job with its hosts.

    :param host: the source of clocks, and of randomness, which keeps hosts from being asked all at once.
    :param pauses: how long to wait for what.
    """

    def __init__(self, terms: job.Terms, host: System, pauses: Pauses = USUAL) -> None:
        self._deadline = terms.deadline
        self._host = host
        self._random = host.random
        self.pauses = pauses

    def next_look(self, state: HostState, now: float) -> float:
        """Return when to ask a host that was just heard."""
        if not state.begun:
            return now
        if not state.reports:
            return now + self.pauses.poll * (0.5 + self._random())
        moment = min(now + self.pauses.quiet * (1.0 + 0.5 * self._random()), state.ask_by)
        return min(moment, self.last_moment(state))

    def ask_by(self, now: float) -> float:
        """Return by when to ask again a host that was just asked, although it reports by itself."""
        return now + client.ASKED_SECONDS * (0.5 + 0.5 * self._random())

    def last_moment(self, state: HostState) -> float:
        """Return when to give a host up."""
        if self._deadline is not None:
            left = self._deadline - self._host.clock()
            return (
                self._host.monotonic()
                + left
                + (self.pauses.grace if state.begun and not state.trouble else 0.0)
            )
        if state.down_since is not None:
            return state.down_since + self.pauses.patience
        return state.busy_since + self.pauses.busy if state.busy_since is not None else float("inf")

    def next_try(self, state: HostState, now: float, *, failures: int) -> float:
        """Return when to ask again a host that does not answer, or has too many tasks.

        :param failures: how often in a row the host was put off.
        """
        pause = min(self.pauses.down * 2.0 ** min(failures, 8), self.pauses.longest_down)
        return min(now + pause * (0.5 + self._random()), self.last_moment(state))
