# SPDX-License-Identifier: Apache-2.0
"""A discrete-event model of hosts that pass an image on, for more hosts than one machine has room for.

What decides is the conductor's own: :class:`imagecache_lib.precache.relaying.Relaying`, unchanged, with the
chains and rates below it. What is modelled:

* Bytes flow like a fluid, in steps of the time that a hop takes: a host has what the one before it had a hop
  ago, as far as its own link, the share of that one's link, and its site's link allow. A link carries
  :data:`GOODPUT` of its line rate: the rest is headers.
* A host reports every 1.5 seconds, and a report or a call takes :data:`CALL` seconds on its way. The
  conductor makes one call after the other, each of which costs it :data:`CONDUCTOR` seconds; a host needs two
  to begin.
* A host that dies answers no more. The one behind it notices when nothing comes in time, and goes on with the
  next that it knows; the conductor is told with its next report.
* Hosts decode as fast as they receive, and nothing else uses the links.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import statistics
from collections.abc import Generator
from typing import Any

import simpy

from imagecache_lib.precache import client, job
from imagecache_lib.precache.relaying import Relaying
from imagecache_lib.sources.route import ORIGIN, RouteState

#: The part of a link's rate that is data: 1,448 of 1,538 bytes of each frame.
GOODPUT = 0.94
#: Seconds of a call or report on its way, and of the conductor's processor for each.
CALL = 0.1
CONDUCTOR = 0.0007
#: What a process of the model yields.
Steps = Generator[simpy.Event, Any, None]

_REPORT = 1.5
_IMAGE = "image"
_WHO = client.AgentInfo("modelled", 0.0, reports=True, relays=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fleet:
    """What is modelled. Rates are in bits per second, sizes in bytes, times in seconds.

    :param sites: how many sites the hosts are spread over.
    :param wan: what the link of a site carries, or None if the sites are one network.
    :param hop: what a hop takes.
    :param noticed: after how long a host notices that the one before it has died: what its reads and
        connections wait for, if the machine is gone, and next to nothing if only the process is.
    :param slow: hosts whose link is slower, by number, and how much of a link's rate they have.
    :param dying: hosts that die, by number, and when.
    :param late: hosts that come later, by number, and when.
    """

    hosts: int
    size: int
    link: float = 1e9
    origin: float = 1e9
    heads: int = 2
    sites: int = 1
    wan: float | None = None
    hop: float = 0.05
    noticed: float = 6.0
    slow: dict[int, float] = dataclasses.field(default_factory=dict)
    dying: dict[int, float] = dataclasses.field(default_factory=dict)
    late: dict[int, float] = dataclasses.field(default_factory=dict)

    def with_faults(self, share: float, *, seed: int = 16) -> Fleet:
        """Return the same fleet with so many of its hosts slow, as many dying and as many late."""
        chance = random.Random(seed)
        count = max(1, int(share * self.hosts))
        odd = chance.sample(range(self.hosts), 3 * count)
        usual = 8 * self.size / self.link
        return dataclasses.replace(
            self,
            slow=dict.fromkeys(odd[:count], 0.1),
            dying={number: chance.uniform(0, 2 * usual) for number in odd[count : 2 * count]},
            late={number: chance.uniform(0, 2 * usual) for number in odd[2 * count :]},
        )


@dataclasses.dataclass
class Outcome:
    """What became of a fleet.

    :param times: by number of a host, when it had the image, in seconds from the begin.
    :param origin: what the origin sent, in images.
    :param moved: how often a host was moved to the end of its chain.
    """

    fleet: Fleet
    times: dict[int, float]
    origin: float
    moved: int

    def sound(self) -> list[float]:
        """Return the times of the hosts that were neither slow nor late nor died, sorted."""
        odd = {*self.fleet.slow, *self.fleet.dying, *self.fleet.late}
        return sorted(time for number, time in self.times.items() if number not in odd)

    @property
    def median(self) -> float:
        return statistics.median(self.sound())

    @property
    def p99(self) -> float:
        found = self.sound()
        return found[min(len(found) - 1, int(0.99 * len(found)))]

    @property
    def last(self) -> float:
        return self.sound()[-1]


class _Host:
    """One modelled host."""

    def __init__(self, number: int, fleet: Fleet) -> None:
        self.number = number
        self.name = f"host-{number:05}"
        self.site = number * fleet.sites // fleet.hosts
        self.rate = fleet.link * GOODPUT / 8 * fleet.slow.get(number, 1.0)
        self.have = 0.0
        self.before = 0.0
        self.source: str | None = None
        self.parents: tuple[str, ...] = ()
        self.origin = False
        self.dies_at = fleet.dying.get(number, float("inf"))
        self.done_at: float | None = None
        self.leaves_at: float | None = None


class Model:
    """Runs one fleet. Use :func:`run`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._env = simpy.Environment()
        self._hosts = [_Host(number, fleet) for number in range(fleet.hosts)]
        self._by_name = {host.name: host for host in self._hosts}
        counts = [0] * fleet.sites
        for host in self._hosts:
            counts[host.site] += 1
        sites = tuple((f"site-{site}", count) for site, count in enumerate(counts))
        terms = job.Terms(relay=job.RelayTerms(heads=fleet.heads, sites=sites))
        cells = {host.name: {_IMAGE: job.OPEN} for host in self._hosts}
        self._relaying = Relaying(job.Job("modelled", "", (_IMAGE,), terms, cells))
        self._conductor = simpy.Resource(self._env, capacity=1)
        self._sent = 0.0
        self._moved = 0

    def run(self) -> Outcome:
        """Let all hosts that live receive the image, and return what became of it."""
        self._env.process(self._flow())
        self._env.process(self._decide())
        for host in self._hosts:
            self._env.process(self._live(host))
        self._env.run(until=self._env.process(self._end()))
        times = {host.number: host.done_at for host in self._hosts if host.done_at is not None}
        return Outcome(self._fleet, times, self._sent / self._fleet.size, self._moved)

    def _end(self) -> Steps:
        limit = 100 * 8 * self._fleet.size / self._fleet.link + 600
        while self._env.now < limit and any(
            host.done_at is None and host.dies_at > self._env.now for host in self._hosts
        ):
            yield self._env.timeout(0.5)

    # -- the network ---------------------------------------------------------------------------------

    def _flow(self) -> Steps:
        fleet, step = self._fleet, self._fleet.hop
        origin = fleet.origin * GOODPUT / 8
        wan = None if fleet.wan is None else fleet.wan * GOODPUT / 8
        open_hosts = list(self._hosts)
        while True:
            now = self._env.now
            open_hosts = [host for host in open_hosts if host.done_at is None and host.dies_at > now]
            active = [host for host in open_hosts if host.source is not None]
            asking = collections.Counter(host.site for host in active if host.source == ORIGIN)
            children = collections.Counter(host.source for host in active)
            heads = children[ORIGIN]
            for host in active:
                host.before = host.have
            for host in active:
                if host.source == ORIGIN:
                    most = min(host.rate, origin / heads)
                    if wan is not None:
                        most = min(most, wan / asking[host.site])
                    taken = min(most * step, fleet.size - host.have)
                    self._sent += taken
                else:
                    parent = self._by_name[host.source or ""]
                    if parent.dies_at <= now:
                        self._lose(host, now)
                        continue
                    most = min(host.rate, parent.rate / children[parent.name])
                    taken = max(0.0, min(most * step, parent.before - host.have))
                host.have += taken
                if host.have >= fleet.size - 0.5:
                    host.done_at = now + step
                    host.before = fleet.size
            yield self._env.timeout(step)

    def _lose(self, host: _Host, now: float) -> None:
        """Let a host notice, after a while, that the one before it has died, and take another."""
        if host.leaves_at is None:
            host.leaves_at = now + self._fleet.noticed
        elif host.leaves_at <= now:
            host.leaves_at = None
            self._choose(host, now)

    def _choose(self, host: _Host, now: float) -> None:
        living = [name for name in host.parents if self._by_name[name].dies_at + self._fleet.noticed > now]
        if host.source in living and self._by_name[host.source or ""].dies_at <= now:
            living.remove(host.source or "")
        host.source = living[0] if living else (ORIGIN if host.origin else None)

    # -- agents --------------------------------------------------------------------------------------

    def _live(self, host: _Host) -> Steps:
        yield self._env.timeout(self._fleet.late.get(host.number, 0.0))
        yield from self._call()
        if host.dies_at <= self._env.now:
            return
        self._relaying.met(host.name, _WHO)
        yield from self._tell(host)
        yield self._env.timeout(_REPORT * (host.number % 97) / 97)
        while host.dies_at > self._env.now:
            is_over = host.done_at is not None
            result = job.Result.CACHED if is_over else None
            cells = {_IMAGE: job.Cell(result, "", int(host.have), self._fleet.size)}
            state = RouteState(host.source, host.source is None and not is_over)
            yield self._env.timeout(CALL)
            self._relaying.heard(host.name, cells, state, now=self._env.now)
            if is_over:
                self._relaying.ended(host.name, failed=False)
                return
            yield self._env.timeout(_REPORT)
        # Nobody hears it any more: the conductor asks after a while.
        yield self._env.timeout(15.0)
        self._relaying.down(host.name)

    def _call(self) -> Steps:
        with self._conductor.request() as mine:
            yield mine
            yield self._env.timeout(CONDUCTOR)
        yield self._env.timeout(CALL)

    def _tell(self, host: _Host) -> Steps:
        route = self._relaying.route(host.name)
        yield from self._call()
        if route is not None and host.dies_at > self._env.now:
            self._relaying.told(host.name, route)
            host.parents, host.origin = route.parents, route.origin
            self._choose(host, self._env.now)

    # -- the conductor -------------------------------------------------------------------------------

    def _decide(self) -> Steps:
        while True:
            yield self._env.timeout(0.5)
            for name in self._relaying.stale(self._env.now):
                host = self._by_name[name]
                if host.parents or host.origin:
                    self._env.process(self._tell(host))
            self._moved = self._relaying.moves


def run(fleet: Fleet) -> Outcome:
    """Return what becomes of a fleet."""
    return Model(fleet).run()
