# SPDX-License-Identifier: Apache-2.0
"""The periodic pass, and what else is done to the cache as a whole: overview, plan, eviction, report."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from imagecache_lib import errors, events, model
from imagecache_lib.nova import compute_nodes
from imagecache_lib.store import recover
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import Hosts
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated
from imagecache_lib.upkeep import evict, inventory, policy
from imagecache_lib.upkeep import make_room as room
from imagecache_lib.upkeep.last_pass import LastPass
from imagecache_lib.upkeep.make_room import SpaceReport
from imagecache_lib.upkeep.outcomes import Evicted, Kept
from imagecache_lib.upkeep.overview import Overview
from imagecache_lib.upkeep.references import ReferenceReader
from imagecache_lib.upkeep.report import Explanation, VerifyReport, describe_pass

if TYPE_CHECKING:
    from imagecache_lib.upkeep.scrub import ScrubReport

LOG = logging.getLogger(__name__)

#: What the kernel says of a filesystem or a quota that is full.
_FULL = (errno.ENOSPC, errno.EDQUOT)

#: A last use that lies ahead by more seconds than this was noted by a wrong clock.
_AHEAD = 300


class Upkeep:
    """Everything that is done to the cache as a whole. Safe to share between threads.

    It is the :class:`~imagecache_lib.store.evictor.Evictor` of the fetches that need room, or a name.
    """

    def __init__(self, cache: CacheStore) -> None:
        self._cache = cache
        self._observers = cache.observers
        self._hosts = Hosts(cache)
        self._last_pass = LastPass(cache, self._hosts)

    @property
    def hosts(self) -> Hosts:
        return self._hosts

    def begin(self) -> None:
        """Put right what a crash left, and register this host."""
        recover.recover(self._cache, self._observers)
        self._hosts.register()
        for name in evict.put_back_own(self._cache, self._hosts):
            self._observers(events.Recovered(name, what="put back, since its eviction was interrupted"))

    def verify(self, instances: Iterable[model.Instance] | None, *, dry_run: bool) -> VerifyReport:
        """Evict the bases that nothing needs any more. Returns what was found and done.

        :param instances: all instances on this host, on shared storage those of all hosts; or None if they
            are unknown.
        :param dry_run: change nothing, and return what would be done.
        :raises NoSpaceError, BackendError: the filesystem failed.
        """
        reported = None if instances is None else model.reported(instances)
        with translated(self._cache.layout.base_path):
            if dry_run:
                overview = self._take_overview(reported, self._cache.filesystem_now())
                decided = overview.decide()
                return describe_pass(
                    overview, decided, evict.foresee(decided, overview.situation.others), dry_run=True
                )
            return self._verify(reported)

    def _verify(self, instances: tuple[model.Instance, ...] | None) -> VerifyReport:
        now = self._cache.filesystem_now()
        self._tidy(now)
        overview = self._take_overview(instances, now)
        recover.sweep_unfinished_disks(self._cache, self._observers, overview.references.unfinished, now=now)
        read = overview.references
        unsaved = self._last_pass.save(overview.reader.last, read, now)
        if unsaved is not None and unsaved.errno not in _FULL:
            path = self._cache.layout.last_scan(self._hosts.id)
            overview = dataclasses.replace(overview, references=read.not_remembered(path, unsaved))
        for name, why in read.removed.items():
            self._observers(events.Unreferenced(name, reason=why))
        decided = overview.decide()
        self._refresh(decided.plan, now)
        outcomes = evict.evict(
            decided.plan.victims,
            overview.reader,
            self._cache,
            self._hosts,
            self._observers,
            remove=overview.limits.remove,
        )
        # On a full filesystem eviction made room for it.
        if unsaved is not None and unsaved.errno in _FULL:
            self._last_pass.save(overview.reader.last, read, now)
        return describe_pass(overview, decided, outcomes, dry_run=False)

    def _tidy(self, now: float) -> None:
        """Everything that needs no references."""
        foreign = inventory.foreign_stages(self._cache)
        recover.recover(self._cache, self._observers)
        self._hosts.register()
        try:
            compute_nodes.refresh(self._cache)
        except (OSError, errors.BackendError) as error:
            LOG.warning("Nova's registry of hosts that share this storage cannot be written: %s", error)
        evict.sweep_foreign_stages(self._cache, self._observers, foreign, now=now)

    def prune(
        self,
        instances: tuple[model.Instance, ...] | None,
        *,
        older_than: float,
        until_free: int,
        dry_run: bool,
    ) -> VerifyReport:
        """Evict, as an operator asks, base images that no disk needs and that have not reached their age.

        :param instances: as for :meth:`verify`. None: as the driver last reported them.
        :param older_than: seconds since its last use for which a base stays.
        :param until_free: bytes of the filesystem at which it is enough. 0: everything goes that may.
        :raises NoSpaceError, BackendError: the filesystem failed.
        """
        limits = policy.Limits.of(self._cache.config)
        limits = limits.for_prune(older_than=older_than, until_free=until_free)
        with translated(self._cache.layout.base_path):
            now = self._cache.filesystem_now()
            overview = dataclasses.replace(self._take_overview_anytime(instances, now), limits=limits)
            decided = overview.decide()
            if dry_run:
                outcomes = evict.foresee(decided, overview.situation.others)
            else:
                outcomes = evict.evict(
                    decided.plan.victims,
                    overview.reader,
                    self._cache,
                    self._hosts,
                    self._observers,
                    remove=limits.remove,
                )
            return describe_pass(overview, decided, outcomes, dry_run=dry_run)

    def reader_now(
        self, instances: tuple[model.Instance, ...] | None
    ) -> tuple[ReferenceReader, tuple[model.Instance, ...]]:
        """Return what reads all references now, and the instances that it knows. Changes nothing.

        :param instances: as for :meth:`verify`. None: as the driver last reported them.
        """
        now = self._cache.host.clock()
        if instances is not None:
            return self._last_pass.reader(instances, now), instances
        return self._last_pass.reader_between_passes(now), tuple(self._last_pass.load().report or ())

    def evict_one(
        self, name: str, reason: str, *, floor_age: float = 0.0, locked: bool = False
    ) -> Evicted | Kept:
        """Evict one base if nothing needs it, the driver's last report included.

        Returns that it was evicted, or why it stays.

        :param floor_age: seconds of disuse below which it stays all the same.
        :param locked: the caller holds its lock.
        :raises NoSpaceError, BackendError: the filesystem failed.
        """
        with translated(self._cache.layout.base(name)):
            now = self._cache.filesystem_now()
            entry = inventory.look(self._cache, name)
            if entry is None:
                return Evicted()
            reader = self._last_pass.reader_between_passes(now)
            needed = policy.needed(entry, reader.read([name]))
            if needed is not None:
                return needed
            if now - entry.last_use < floor_age:
                return Kept("it was fetched or used a moment ago")
            self._cache.host.trace(TracePoint.VERIFY_READ)
            victim = policy.Decision(entry, True, reason)
            outcomes = evict.evict(
                [victim], reader, self._cache, self._hosts, self._observers, locked=locked, only={name}
            )
        return next((Kept(each.reason) for each in outcomes if not each.gone), Evicted())

    def explain(self, name: str, instances: tuple[model.Instance, ...] | None) -> Explanation | None:
        """Say what a pass would do with a base now, and why. Returns None if it is not there."""
        overview = self._take_overview(instances, self._cache.filesystem_now())
        decided = overview.decide()
        outcomes = evict.foresee(decided, overview.situation.others)
        report = describe_pass(overview, decided, outcomes, dry_run=True)
        base = next((each for each in report.bases if each.name == name), None)
        entry = next((each for each in overview.situation.bases if each.name == name), None)
        if base is None or entry is None:
            return None
        obstacles = policy.obstacles(entry, overview.references, overview.limits, now=overview.reader.now)
        return Explanation(base, obstacles, report.problems)

    def evict_unfit(self, name: str, reason: str) -> bool:
        """Evict a base that does not serve, under its exclusive lock. Returns False if it stays."""
        floor_age = self._cache.config.space_minimum_age_seconds
        return isinstance(self.evict_one(name, reason, floor_age=floor_age, locked=True), Evicted)

    def scrub(
        self, *, rate: int | None, names: Collection[str] | None, cancel: model.CancelToken | None
    ) -> ScrubReport:
        """Check the content of bases, and evict those that are damaged and unused. Returns what was found."""
        from imagecache_lib.upkeep import scrub

        return scrub.scrub(self._cache, self._observers, self, rate=rate, names=names, cancel=cancel)

    def make_room(self, wanted: int) -> int:
        """Evict what a fetch needs the room of, as far as policy allows. Returns the bytes freed."""
        with translated(self._cache.layout.base_path):
            now = self._cache.filesystem_now()
            reader = self._last_pass.reader_between_passes(now)
            return room.make(wanted, reader, self._cache, self._hosts, self._observers, now=now)

    def space(self) -> SpaceReport:
        """Return how full the cache's filesystem is, in bytes."""
        now = self._cache.filesystem_now()
        return room.report(self._last_pass.reader_between_passes(now), self._cache, now=now)

    def forget_disks(self, path: str) -> int:
        """Forget the disks that were seen at a path and below it, and the disk root if it is one.

        Returns how many disks are forgotten. What is there is seen again by the next pass.
        """
        return self._last_pass.forget(path)

    # -- the steps -----------------------------------------------------------------------------------

    def _take_overview_anytime(self, instances: tuple[model.Instance, ...] | None, now: float) -> Overview:
        """Read everything that a pass decides by, with the driver's last report if there is no other."""
        if instances is not None:
            return self._take_overview(instances, now)
        # The bases come first, as in a pass.
        found = inventory.take(self._cache)
        return Overview.take(found, self._last_pass.reader_between_passes(now), self._hosts)

    def _take_overview(self, instances: tuple[model.Instance, ...] | None, now: float) -> Overview:
        """Read everything that a pass decides by."""
        # The bases come first: what is remembered of their disks is then no older than they are.
        found = inventory.take(self._cache)
        return Overview.take(found, self._last_pass.reader(instances, now), self._hosts)

    def _refresh(self, plan: policy.EvictionPlan, now: float) -> None:
        """Note the use of what is in use, so that its age counts from now, for Nova too.

        A time that lies ahead, from a host whose clock was wrong, would keep a base until then.
        """
        for decision in plan.decisions:
            if decision.evict or not (decision.in_use or decision.entry.last_use > now + _AHEAD):
                continue
            with contextlib.suppress(errors.CacheEntryError):
                opened = self._cache.open_base(decision.entry.name)
                if opened is not None:
                    with contextlib.closing(opened):
                        self._cache.touch(opened)
