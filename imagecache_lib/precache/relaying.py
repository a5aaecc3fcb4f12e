# SPDX-License-Identifier: Apache-2.0
"""Which route each host of a running job has, and which may ask the image service meanwhile. Decides only.

A host joins its site's chains once its agent has answered, and says that it relays: so hosts that are down
are left out, and those that come late go to the end. Agents that do not relay ask the image service
themselves, as many at a time as the job's concurrency allows.

A host that none of its parents serves asks for leave to ask the image service. At a time as many hosts of a
site have leave as it has heads.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Collection, Mapping

from imagecache_lib.precache import client, job
from imagecache_lib.precache.chains import Chains, HostRoute, culprit
from imagecache_lib.precache.replan import Replanner
from imagecache_lib.sources.parents import HOST_NAME
from imagecache_lib.sources.relay import NOT_THE_IMAGE
from imagecache_lib.sources.route import ORIGIN, RouteState

LOG = logging.getLogger(__name__)


#: Seconds between two looks at the rates of all hosts.
_DECIDE_EVERY = 1.0


class Unicast:
    """The routes of a run in which every host asks its own image service. Decides nothing."""

    def knows(self, host: str) -> bool:
        return True

    def met(self, host: str, who: client.AgentInfo | None) -> None:
        return

    def admits(self, host: str) -> bool:
        return True

    def heard(
        self, host: str, cells: Mapping[str, job.Cell], state: RouteState | None, *, now: float
    ) -> None:
        return

    def explained(
        self, host: str, cells: Mapping[str, job.Cell], state: RouteState | None
    ) -> Mapping[str, job.Cell]:
        return cells

    def down(self, host: str) -> None:
        return

    def ended(self, host: str, *, failed: bool) -> None:
        return

    def route(self, host: str) -> HostRoute | None:
        return None

    def told(self, host: str, route: HostRoute | None) -> None:
        return

    def is_stale(self, host: str) -> bool:
        return False

    def stale(self, now: float) -> list[str]:
        return []

    def rate(self, host: str, terms: job.Terms, hosts: int) -> int:
        return terms.rate(hosts)

    def relaying(self) -> Collection[str]:
        return ()


class Relaying(Unicast):
    """The routes of a run in which hosts pass images on to each other. Used by one thread.

    :param work: the job, whose terms say that its hosts relay.
    """

    def __init__(self, work: job.Job) -> None:
        super().__init__()
        assert work.terms.relay is not None
        self._relay = work.terms.relay
        self._concurrency = work.terms.concurrency
        self._sites = self._relay.sites_of(work.hosts)
        self._sizes = collections.Counter(self._sites.values())
        self._chains = Chains(heads=self._relay.heads)
        self._replanner = Replanner(self._chains)
        self._relays: dict[str, bool] = {}
        self._by_themselves: set[str] = set()
        self._leave: set[str] = set()
        self._wanting: dict[str, None] = {}
        #: Hosts that received wrong bytes, and the host before each of them when it first said so.
        self._mismatched: dict[str, str | None] = {}
        self._silent: set[str] = set()
        self._told: dict[str, HostRoute] = {}
        self._doubtful: set[str] = set()
        self._decided_at = 0.0
        #: How often a host was moved since it held up others.
        self.moves = 0

    # -- what hosts say ------------------------------------------------------------------------------

    def knows(self, host: str) -> bool:
        """Whether an agent of a host has answered, so that it is known whether it relays."""
        return host in self._relays

    def met(self, host: str, who: client.AgentInfo | None) -> None:
        """Take note of the agent that answered for a host; None is one of the first release."""
        # Others are told its name, and make an address of it.
        self._relays[host] = who is not None and who.relays and HOST_NAME.fullmatch(host) is not None
        self._silent.discard(host)
        if self._relays[host]:
            if host not in self._chains:
                site = self._sites.get(host, "")
                self._chains.join(host, site, site_size=self._sizes[site])
                self._doubtful.add(host)
        else:
            self._leaves(host)

    def admits(self, host: str) -> bool:
        """Whether a host may begin now. Those that do not relay are as many as the concurrency allows."""
        if self._relays.get(host, True) or host in self._by_themselves:
            return True
        if len(self._by_themselves) >= self._concurrency:
            return False
        self._by_themselves.add(host)
        return True

    def heard(
        self, host: str, cells: Mapping[str, job.Cell], state: RouteState | None, *, now: float
    ) -> None:
        """Take note of how far a host is.

        :param cells: all cells of the host.
        """
        if host not in self._chains:
            return
        received = sum(cell.received for cell in cells.values())
        is_over = all(cell.result is not None for cell in cells.values())
        self._replanner.heard(host, received, now=now, is_over=is_over)
        if any(cell.result is job.Result.EXISTING for cell in cells.values()):
            # It may have nothing to pass on: what it has was converted.
            self._to_end(host)
        if state is not None:
            self._follow(host, state)

    def explained(
        self, host: str, cells: Mapping[str, job.Cell], state: RouteState | None
    ) -> Mapping[str, job.Cell]:
        """Return what a host says of its images, completed by who passed on wrong bytes, if one did.

        The host itself knows only whom it had them from.
        """
        if state is not None and state.mismatched and host in self._chains:
            self._mismatched.setdefault(host, self._chains.parent(host))
        found = culprit(host, self._mismatched) if host in self._mismatched else None
        if found is None:
            return cells
        return {
            image_id: dataclasses.replace(cell, reason=f"{cell.reason}; host {found} sent wrong bytes first")
            if cell.result is job.Result.ERROR and NOT_THE_IMAGE in cell.reason
            else cell
            for image_id, cell in cells.items()
        }

    def _follow(self, host: str, state: RouteState) -> None:
        """Take note of whom a host receives from, and who it says sent wrong bytes."""
        self._ask_for_leave(host, state)
        parent = self._chains.parent(host)
        if parent in self._silent and state.parent not in (None, parent):
            # Its child has left it, too: it is not the message bus alone that does not reach it.
            LOG.warning("Host %s is left out of its chain", parent)
            self._leaves(parent)
        for wrong in state.wrong:
            if wrong in self._chains and self._to_end(wrong):
                LOG.warning("Host %s passed on wrong bytes, says %s: it goes to the end", wrong, host)

    def down(self, host: str) -> None:
        """Take note that a host does not answer. Those behind it find out whether it still passes on."""
        self._silent.add(host)

    def ended(self, host: str, *, failed: bool) -> None:
        """Take note that every image has a result on a host. One that failed passes nothing on."""
        self._by_themselves.discard(host)
        self._leave.discard(host)
        self._wanting.pop(host, None)
        if not failed:
            return
        wrong = culprit(host, self._mismatched) if host in self._mismatched else None
        if wrong is not None and wrong in self._chains and self._to_end(wrong):
            LOG.warning("What host %s passed on is not the image: it goes to the end", wrong)
        self._leaves(host)

    # -- what they are to do -------------------------------------------------------------------------

    def route(self, host: str) -> HostRoute | None:
        """Return the route of a host, or None for one that does not relay."""
        if host not in self._chains:
            return None
        found = self._chains.route(host)
        return HostRoute(found.parents, found.origin or host in self._leave)

    def told(self, host: str, route: HostRoute | None) -> None:
        """Take note that a host has taken a route."""
        if route is not None:
            self._told[host] = route

    def is_stale(self, host: str) -> bool:
        """Whether a host has another route than it was told."""
        return host in self._chains and self._told.get(host) != self.route(host)

    def stale(self, now: float) -> list[str]:
        """Change the chains if rates ask for it, give leave, and return the hosts that have to be told."""
        is_due = now - self._decided_at >= _DECIDE_EVERY
        if is_due:
            self._decided_at = now
        for host in self._replanner.decide(now) if is_due else ():
            LOG.warning("Host %s holds up those behind it, and goes to the end of its chain", host)
            self.moves += 1
            self._doubtful.update(next(chain for chain in self._chains.all() if chain[-1] == host))
        self._give_leave()
        found = [host for host in self._doubtful if self.is_stale(host)]
        self._doubtful.clear()
        return found

    def rate(self, host: str, terms: job.Terms, hosts: int) -> int:
        """Return how many bytes per second a host may fetch; 0 for no limit. The total bounds the heads."""
        asks = host not in self._chains or self._chains.is_head(host)
        heads = len(self._chains.heads()) or 1
        share = max(1, terms.total_rate // heads) if terms.total_rate and asks else 0
        return min((limit for limit in (terms.host_rate, share) if limit), default=0)

    def relaying(self) -> Collection[str]:
        """Return the hosts that keep images for others."""
        return [host for host, relays in self._relays.items() if relays]

    # -- the chains ----------------------------------------------------------------------------------

    def _leaves(self, host: str) -> None:
        if host in self._chains:
            child = self._chains.child(host)
            self._chains.leave(host)
            self._doubtful.update(self._chains.affected_by(child))
        self._replanner.forget(host)
        self._leave.discard(host)
        self._wanting.pop(host, None)
        self._told.pop(host, None)

    def _to_end(self, host: str) -> bool:
        child = self._chains.child(host)
        if not self._chains.move_to_end(host):
            return False
        self._doubtful.update({host, *self._chains.affected_by(child)})
        return True

    def _ask_for_leave(self, host: str, state: RouteState) -> None:
        if state.wants_origin and host not in self._leave:
            self._wanting.setdefault(host)
        elif not state.wants_origin:
            self._wanting.pop(host, None)
            if host in self._leave and state.parent not in (None, ORIGIN):
                self._leave.discard(host)
                self._doubtful.add(host)

    def _give_leave(self) -> None:
        given = collections.Counter(self._chains.site_of(host) for host in self._leave)
        for host in list(self._wanting):
            site = self._chains.site_of(host)
            if given[site] < self._relay.heads:
                LOG.info("Host %s may ask the image service", host)
                given[site] += 1
                del self._wanting[host]
                self._leave.add(host)
                self._doubtful.add(host)
