# SPDX-License-Identifier: Apache-2.0
"""Which host is looked at next. Decides only: no calls, no clock."""

from __future__ import annotations

import dataclasses
import enum
import heapq
import itertools
from collections.abc import Iterable

from imagecache_lib.precache.calls import Stop


class Lane(enum.Enum):
    """Where a host stands in line, in the order in which the lines are served."""

    #: It holds no slot, and is to be told to stop.
    STOPPING = 0
    #: It holds a slot, and answers.
    AT_WORK = 1
    #: It holds a slot, and has stopped answering.
    SILENT = 2
    #: It holds no slot, and nothing is known against it.
    WAITING = 3
    #: It holds no slot, and did not answer, or had too many tasks, when it was asked last.
    PUT_OFF = 4


#: Calls on these mostly wait for their timeout. They get half of the calls at most, so that other hosts need
#: not wait for them.
_SLOW = (Lane.SILENT, Lane.PUT_OFF)


@dataclasses.dataclass(eq=False)
class HostState:
    """A host that is not done. All moments are by the conductor's monotonic clock.

    :param not_before: when to make its first call.
    :param begun: it has the task, as far as is known.
    :param down_since: since when it does not answer, or None if it answers.
    :param busy_since: since when it has too many tasks, or None if it has not.
    :param trouble: what keeps it from working, as a clause; empty if nothing does.
    :param failures: how often in a row it was put off.
    :param restarts: how often its agent forgot the task since it finished an image.
    :param instances: the instances of the agents that answered by its name, in order, without repetitions in
        a row.
    :param stop: how to stop it with the next call, or None not to stop it.
    :param skew_told: whether the log already says that its clock is off.
    :param reports: whether its agent reports by itself, and its reports arrive.
    :param ask_by: by when it is asked in any case.
    :param numbers: by instance, the number of the last report that was heard of it.
    """

    name: str
    not_before: float
    begun: bool = False
    down_since: float | None = None
    busy_since: float | None = None
    trouble: str = ""
    failures: int = 0
    restarts: int = 0
    instances: list[str] = dataclasses.field(default_factory=list)
    stop: Stop | None = None
    skew_told: bool = False
    reports: bool = False
    ask_by: float = 0.0
    numbers: dict[str, int] = dataclasses.field(default_factory=dict)
    lane: Lane = Lane.WAITING
    entry: int | None = None

    @property
    def is_scheduled(self) -> bool:
        """Whether its next call is planned."""
        return self.entry is not None


class Slots:
    """The hosts of a run. Used by one thread.

    :param states: of the hosts that are not done.
    :param slots: how many may be at work at a time.
    :param calls: how many calls may be under way at a time.
    """

    def __init__(self, states: Iterable[HostState], *, slots: int, calls: int) -> None:
        self._states = {state.name: state for state in states}
        self._free_slots = slots
        self._most_calls = calls
        self._under_way: dict[str, bool] = {}
        self._slow_calls = 0
        self._hurry = False
        self._numbers = itertools.count()
        self._lines: dict[Lane, list[tuple[float, int, HostState]]] = {lane: [] for lane in Lane}
        for state in self._states.values():
            self._push(state, Lane.WAITING, state.not_before)

    @property
    def hosts_left(self) -> int:
        """How many hosts are not done."""
        return len(self._states)

    @property
    def calls_under_way(self) -> int:
        """How many calls were taken and have not returned."""
        return len(self._under_way)

    def find(self, name: str) -> HostState | None:
        """Return the state of a host that is not done, or None for any other host."""
        return self._states.get(name)

    def is_called(self, name: str) -> bool:
        """Return whether a call on a host is under way."""
        return name in self._under_way

    def waiting(self) -> list[HostState]:
        """Return the hosts that hold no slot, and on which no call is under way."""
        lines = self._lines[Lane.WAITING] + self._lines[Lane.PUT_OFF]
        return [state for _moment, number, state in lines if state.entry == number]

    def stop(self, state: HostState, moment: float) -> None:
        """Plan a call on a host that holds no slot, and needs none, since it is only told to stop."""
        self._push(state, Lane.STOPPING, moment)

    def hurry(self) -> None:
        """Let every host be due now, without a slot if need be."""
        self._hurry = True

    def take(self, now: float) -> HostState | None:
        """Return a host that is due for a call, or None if no call can be made now."""
        if len(self._under_way) >= self._most_calls:
            return None
        for lane in Lane:
            line = self._lines[lane]
            if not self._is_open(lane) or not self._tidy(line):
                continue
            moment, _number, state = line[0]
            if moment <= now or self._hurry:
                heapq.heappop(line)
                state.entry = None
                if lane in (Lane.WAITING, Lane.PUT_OFF):
                    self._free_slots -= 1
                    state.lane = Lane.AT_WORK
                self._under_way[state.name] = lane in _SLOW
                self._slow_calls += lane in _SLOW
                return state
        return None

    def returned(self, name: str) -> HostState:
        """Take note that the call on a host is over. It goes on holding a slot."""
        self._slow_calls -= self._under_way.pop(name)
        return self._states[name]

    def keep(self, state: HostState, moment: float) -> None:
        """Plan the next call on a host that keeps its slot."""
        self._push(state, Lane.AT_WORK if state.down_since is None else Lane.SILENT, moment)

    def give_away(self, state: HostState, moment: float) -> None:
        """Plan the next call on a host that gives its slot to another."""
        self._free_slots += 1
        self._push(state, Lane.PUT_OFF, moment)

    def wake(self, state: HostState, moment: float) -> None:
        """Plan the next call on a host that turned out to be there, anew, whether it holds a slot or not."""
        if state.lane is Lane.PUT_OFF:
            self._push(state, Lane.WAITING, moment)
        elif state.lane not in (Lane.WAITING, Lane.STOPPING):
            self.keep(state, moment)

    def remove(self, state: HostState) -> None:
        """Remove a host that is done."""
        state.entry = None
        if state.lane in (Lane.AT_WORK, Lane.SILENT):
            self._free_slots += 1
        self._states.pop(state.name)

    def next_due(self, now: float) -> float:
        """Return when the next call could be made, or the far future if another call has to end first."""
        never = now + 1e9
        if len(self._under_way) >= self._most_calls:
            return never
        moments = [
            line[0][0] for lane, line in self._lines.items() if self._is_open(lane) and self._tidy(line)
        ]
        return (now if self._hurry else min(moments)) if moments else never

    def _is_open(self, lane: Lane) -> bool:
        if lane in _SLOW and self._slow_calls >= max(1, self._most_calls // 2):
            return False
        return lane in (Lane.STOPPING, Lane.AT_WORK, Lane.SILENT) or self._free_slots > 0 or self._hurry

    def _tidy(self, line: list[tuple[float, int, HostState]]) -> bool:
        """Drop what is no longer so from the front of a line. Returns whether anything is left."""
        while line and line[0][2].entry != line[0][1]:
            heapq.heappop(line)
        return bool(line)

    def _push(self, state: HostState, lane: Lane, moment: float) -> None:
        state.lane, state.entry = lane, next(self._numbers)
        heapq.heappush(self._lines[lane], (moment, state.entry, state))
