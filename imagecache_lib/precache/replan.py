# SPDX-License-Identifier: Apache-2.0
"""When a chain of hosts is changed, from how fast its hosts say that they receive. Decides only.

A host that receives less than half as fast as those before it, and falls behind the one before it, holds up
everyone behind it. It is moved to the end, where it holds up no other. If its successor is as slow, it was
not the host but what the one before it can send: then that one is moved.

A host that has all that the one before it has, waits for it: it is not slow, however little it receives.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics

from imagecache_lib.precache.chains import Chains

#: Seconds over which a rate is measured, and the fewest that are enough.
_WINDOW = 6.0
_ENOUGH = 3.0

#: A host is slow below this part of the rate of those before it.
_SLOW = 0.5

#: And only if it is so many seconds, at the rate of those before it, behind the one before it.
_BEHIND = 1.5

#: Seconds after a change in which a chain is left alone: what changed has to show first.
_SETTLE = 5.0

#: Seconds for which a host remains accused of sending too slowly.
_ACCUSED = 60.0

#: How many hosts before a host its rate is compared with.
_COMPARED = 16


@dataclasses.dataclass
class _Told:
    """What one host told of itself: how many bytes it had at which moments, and how that went."""

    samples: collections.deque[tuple[float, int]] = dataclasses.field(default_factory=collections.deque)
    rate: float | None = None
    is_over: bool = False

    @property
    def received(self) -> int:
        return self.samples[-1][1] if self.samples else 0


class Replanner:
    """Watches the rates of one job's hosts, and changes its chains."""

    def __init__(self, chains: Chains) -> None:
        self._chains = chains
        self._told: dict[str, _Told] = {}
        self._moved_at: dict[str, float] = {}
        #: Which host was slow behind which, and when.
        self._accused: dict[str, tuple[str, float]] = {}

    def heard(self, host: str, received: int, *, now: float, is_over: bool) -> None:
        """Take what a host told: how many bytes it received in all, and whether that is all of them."""
        told = self._told.setdefault(host, _Told())
        if told.is_over:
            return
        # It began again, or has not begun: how long it waits for its first byte says nothing of its link.
        if told.samples and (received < told.received or not told.received or now <= told.samples[-1][0]):
            told.samples.clear()
        told.samples.append((now, received))
        while told.samples[-1][0] - told.samples[0][0] > _WINDOW and len(told.samples) > 2:
            told.samples.popleft()
        span = told.samples[-1][0] - told.samples[0][0]
        if span >= _ENOUGH and not (is_over and told.rate is not None):
            told.rate = (received - told.samples[0][1]) / span
        told.is_over = is_over

    def forget(self, host: str) -> None:
        """Forget a host that left, or takes bytes from another one from now on."""
        self._told.pop(host, None)

    def decide(self, now: float) -> list[str]:
        """Change the chains, each once at most. Returns the hosts that were moved."""
        moved = []
        recent = {host for host, moment in self._moved_at.items() if now - moment < _SETTLE}
        for chain in self._chains.all():
            if not recent.isdisjoint(chain):
                continue
            host = self._slow_host(chain, now)
            if host is not None and self._chains.move_to_end(host):
                self._moved_at[host] = now
                for each in chain[chain.index(host) :]:
                    self.forget(each)
                moved.append(host)
        return moved

    def _slow_host(self, chain: list[str], now: float) -> str | None:
        """Return the host to move: the first slow one, or the one before it if others were slow behind it."""
        if self._is_slow_head(chain[0]):
            return chain[0]
        before: collections.deque[float] = collections.deque(maxlen=_COMPARED)
        for above, host in itertools.pairwise(chain):
            if (rate := self._rate(above)) is not None:
                before.append(rate)
            if host == chain[-1] or not before or not self._is_slow(host, above, statistics.median(before)):
                continue
            accuser, when = self._accused.get(above, (host, now))
            self._accused[above] = (host, now)
            return above if accuser != host and now - when < _ACCUSED else host
        return None

    def _is_slow(self, host: str, above: str, usual: float) -> bool:
        told, sender = self._told.get(host), self._told.get(above)
        if told is None or sender is None or told.is_over or told.rate is None:
            return False
        return told.rate < _SLOW * usual and sender.received - told.received > _BEHIND * usual

    def _is_slow_head(self, head: str) -> bool:
        told = self._told.get(head)
        others = [
            rate
            for other in self._chains.heads(self._chains.site_of(head))
            if other != head and (rate := self._rate(other)) is not None
        ]
        if told is None or told.is_over or told.rate is None or not others:
            return False
        return told.rate < _SLOW * statistics.median(others) and self._chains.child(head) is not None

    def _rate(self, host: str) -> float | None:
        told = self._told.get(host)
        return None if told is None else told.rate
