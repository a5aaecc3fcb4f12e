# SPDX-License-Identifier: Apache-2.0
"""Which host receives images from which: chains of hosts, site by site. Decides only: no calls, no clock.

The first hosts of a site, its *heads*, ask the image service; each of the others receives from the host
before it. When a host leaves or is moved, the host behind it continues with the one before it. Every host
knows some of those before it, the nearest first, and the head, so that it need not wait for this plan when
one of them fails.

The same rules run in the conductor and in ``benchmarks/relay_model.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

#: How many hosts of a site ask the image service, unless a job says otherwise.
HEADS = 2

#: A site with so many hosts or fewer needs no chain: all of them ask the image service. Measured: with two
#: hosts a chain takes as long, from three on it takes less.
FEW = 2

#: How many hosts before it, beside its head, a host knows.
_NEAREST = 3


@dataclasses.dataclass(frozen=True)
class HostRoute:
    """Whom a host asks for the bytes of images.

    :param parents: names of hosts, the nearest first.
    :param origin: whether it may ask the image service when none of them serves.
    """

    parents: tuple[str, ...] = ()
    origin: bool = False


@dataclasses.dataclass(eq=False)
class _Chain:
    head: str
    tail: str
    length: int = 1


class Chains:
    """The chains of one job.

    :param heads: how many hosts of a site ask the image service.
    """

    def __init__(self, *, heads: int = HEADS) -> None:
        self._heads = heads
        self._chains: dict[str, list[_Chain]] = {}
        self._site_of: dict[str, str] = {}
        self._chain_of: dict[str, _Chain] = {}
        self._above: dict[str, str | None] = {}
        self._below: dict[str, str | None] = {}

    def __contains__(self, host: str) -> bool:
        return host in self._chain_of

    def __len__(self) -> int:
        return len(self._chain_of)

    def join(self, host: str, site: str = "", *, site_size: int | None = None) -> None:
        """Put a host at the end of the shortest chain of its site, or let it begin one.

        :param site_size: how many hosts the site has in the job, or None if that is not known.
        """
        if host in self._chain_of:
            return
        chains = self._chains.setdefault(site, [])
        self._site_of[host] = site
        is_few = site_size is not None and site_size <= FEW
        if len(chains) < self._heads or is_few:
            chain = _Chain(host, host)
            chains.append(chain)
            self._above[host] = self._below[host] = None
            self._chain_of[host] = chain
        else:
            self._append(host, min(chains, key=lambda chain: chain.length))

    def leave(self, host: str) -> None:
        """Take a host out: those behind it continue with those before it."""
        if host not in self._chain_of:
            return
        chain, above, below = self._chain_of.pop(host), self._above.pop(host), self._below.pop(host)
        site = self._site_of.pop(host)
        chain.length -= 1
        if above is not None:
            self._below[above] = below
        if below is not None:
            self._above[below] = above
        if chain.length == 0:
            self._chains[site].remove(chain)
            return
        if above is None:
            assert below is not None
            chain.head = below
        if below is None:
            assert above is not None
            chain.tail = above

    def move_to_end(self, host: str) -> bool:
        """Move a host behind all others of its chain. Returns False if it is there already."""
        chain = self._chain_of.get(host)
        if chain is None or chain.tail == host:
            return False
        site = self._site_of[host]
        self.leave(host)
        self._site_of[host] = site
        self._append(host, chain)
        return True

    def _append(self, host: str, chain: _Chain) -> None:
        self._below[chain.tail] = host
        self._above[host], self._below[host] = chain.tail, None
        self._chain_of[host] = chain
        chain.tail = host
        chain.length += 1

    # -- what it comes to ----------------------------------------------------------------------------

    def route(self, host: str) -> HostRoute:
        """Return whom a host asks."""
        before = self._before(host)
        nearest = [name for name, _ in zip(before, range(_NEAREST), strict=False)]
        head = self._chain_of[host].head
        if head != host and head not in nearest:
            nearest.append(head)
        return HostRoute(tuple(nearest), origin=self.is_head(host))

    def is_head(self, host: str) -> bool:
        """Whether a host asks the image service."""
        return self._above[host] is None

    def parent(self, host: str) -> str | None:
        """Return the host before a host, or None for a head."""
        return self._above.get(host)

    def child(self, host: str) -> str | None:
        """Return the host behind a host, or None for the last one."""
        return self._below.get(host)

    def site_of(self, host: str) -> str:
        return self._site_of[host]

    def affected_by(self, host: str | None) -> Iterator[str]:
        """Yield a host and those behind it that know it, apart from those that know it as their head."""
        for _step in range(_NEAREST + 1):
            if host is None or host not in self._chain_of:
                return
            yield host
            host = self._below[host]

    def heads(self, site: str | None = None) -> list[str]:
        """Return the heads of a site, or of all sites."""
        sites = self._chains if site is None else (site,)
        return [chain.head for each in sites for chain in self._chains.get(each, ())]

    def all(self) -> list[list[str]]:
        """Return all chains, each from its head to its end."""
        return [list(self._from(head)) for head in self.heads()]

    def _before(self, host: str) -> Iterator[str]:
        above = self._above[host]
        while above is not None:
            yield above
            above = self._above[above]

    def _from(self, head: str) -> Iterator[str]:
        host: str | None = head
        while host is not None:
            yield host
            host = self._below[host]


def culprit(host: str, before: Mapping[str, str | None]) -> str | None:
    """Return who sent the wrong bytes that a host received: an image that is not what its digest says.

    Those behind a host that received wrong bytes received them too. So it is the one before the topmost of
    them. A head that received them has them from the image service, and no host is the culprit.

    :param before: the hosts that received wrong bytes, each with the host before it when it said so.
    """
    above, seen = before[host], {host}
    while above is not None and above in before and above not in seen:
        seen.add(above)
        above = before[above]
    return None if above in seen else above
