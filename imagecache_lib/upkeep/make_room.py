# SPDX-License-Identifier: Apache-2.0
"""Room on the cache's filesystem: how much there is, and making more of it for an image that is fetched."""

from __future__ import annotations

import dataclasses

from imagecache_lib import events
from imagecache_lib.store import reservations
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import Hosts
from imagecache_lib.upkeep import evict, inventory, policy
from imagecache_lib.upkeep.references import ReferenceReader


@dataclasses.dataclass(frozen=True)
class SpaceReport:
    """The cache's filesystem as its users should see it, in bytes.

    A driver that reports free disk space may take ``reserved`` off what is free: it is promised already.
    What is ``reclaimable`` is in use now and comes back by itself when a fetch needs it.

    :param used: allocated by the cache, files in flight and in the trash included.
    :param reserved: promised to images in flight and not allocated yet.
    :param free: what an unprivileged process may still allocate.
    :param reclaimable: allocated by images that nothing needs, and that lack of space would remove now.
    :param limit: ``max_cache_size``, or 0 if there is no limit.
    """

    used: int
    reserved: int
    free: int
    reclaimable: int
    limit: int


def make(
    wanted: int,
    reader: ReferenceReader,
    cache: CacheStore,
    hosts: Hosts,
    observers: events.Observers,
    *,
    now: float,
) -> int:
    """Evict unused bases until ``wanted`` bytes are freed, the least recently used first.

    Where all unused bases together are too small, none is evicted: a server may say anything of an image's
    length, and the cache would be emptied for a fetch that fails all the same. Returns the bytes that were
    freed.

    :param reader: reads all references.
    """
    if not cache.config.remove_unused_base_images:
        return 0  # not even what an earlier pass left in the trash
    freed = _freed(evict.evict((), reader, cache, hosts, observers))
    if freed < wanted:
        relief = _plan(wanted - freed, reader, cache, now)
        if sum(decision.entry.allocated for decision in relief.victims) >= wanted - freed:
            freed += _freed(evict.evict(relief.victims, reader, cache, hosts, observers))
    return freed


def report(reader: ReferenceReader, cache: CacheStore, *, now: float) -> SpaceReport:
    """Return how full the cache's filesystem is, in bytes.

    :param reader: reads all references.
    """
    everything = _plan(2**63, reader, cache, now)
    return SpaceReport(
        used=inventory.allocated(cache),
        reserved=reservations.outstanding(cache),
        free=reservations.free(cache),
        reclaimable=sum(decision.entry.allocated for decision in everything.victims),
        limit=cache.config.max_cache_size,
    )


def _plan(wanted: int, reader: ReferenceReader, cache: CacheStore, now: float) -> policy.EvictionPlan:
    bases = inventory.take(cache).bases
    references = reader.read([entry.name for entry in bases])
    return policy.relieve(bases, references, policy.Limits.of(cache.config), now=now, wanted=wanted)


def _freed(outcomes: list[evict.Outcome]) -> int:
    return sum(outcome.allocated for outcome in outcomes if outcome.gone)
