# SPDX-License-Identifier: Apache-2.0
"""The periodic pass: inventory, references, plan, evict, and a report that says why for each base."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Collection, Sequence

from imagecache_lib import errors, events, model
from imagecache_lib.nova import compute_nodes
from imagecache_lib.store import recover, trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import HostRef, Hosts
from imagecache_lib.system import durable, locks
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated
from imagecache_lib.upkeep import evict, inventory, policy, scan, scrub
from imagecache_lib.upkeep import make_room as room
from imagecache_lib.upkeep import references as reference_module
from imagecache_lib.upkeep.make_room import SpaceReport
from imagecache_lib.upkeep.references import Memory, References

LOG = logging.getLogger(__name__)

#: A last use that lies ahead by more seconds than this was noted by a wrong clock.
_AHEAD = 300


@dataclasses.dataclass(frozen=True)
class BaseReport:
    """What became of one base.

    :param name: its name in the cache.
    :param evicted: it is gone; in a dry run: it would be.
    :param reason: why, as a clause: in use by what, too young by how much, over which limit.
    :param allocated: bytes on disk.
    :param image_id: the image it was made from, where a record says so.
    """

    name: str
    evicted: bool
    reason: str
    allocated: int
    image_id: str | None = None


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What a pass found and did.

    :param bases: every base, sorted by name.
    :param problems: what needs an operator, a sentence each, the worst first.
    :param dry_run: nothing was changed.
    """

    bases: tuple[BaseReport, ...]
    problems: tuple[str, ...]
    dry_run: bool

    @property
    def evicted(self) -> tuple[BaseReport, ...]:
        """The bases that are gone, or would be."""
        return tuple(base for base in self.bases if base.evicted)

    @property
    def reclaimed(self) -> int:
        """Bytes that eviction gave back, or would."""
        return sum(base.allocated for base in self.evicted)

    def as_event(self) -> events.PassFinished:
        """Return it in figures."""
        kept = [base for base in self.bases if not base.evicted]
        return events.PassFinished(
            "",
            kept=len(kept),
            allocated=sum(base.allocated for base in kept),
            evicted=len(self.evicted),
            reclaimed=self.reclaimed,
            problems=self.problems,
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the next pass would do with a base, and why.

    :param base: as a dry run reports it.
    :param obstacles: everything that keeps it: what it is, and what would change it, a clause each.
    :param problems: what needs an operator before anything can go, a sentence each.
    """

    base: BaseReport
    obstacles: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]


class Upkeep:
    """Everything that is done to the cache as a whole. Safe to share between threads."""

    def __init__(self, cache: CacheStore, observers: events.Observers) -> None:
        self._cache = cache
        self._observers = observers
        self._hosts = Hosts(cache)

    @property
    def hosts(self) -> Hosts:
        return self._hosts

    def begin(self) -> None:
        """Put right what a crash left, and register this host."""
        recover.recover(self._cache, self._observers)
        self._hosts.register()
        for name in evict.put_back_own(self._cache, self._hosts):
            self._observers(events.Recovered(name, what="put back, since its eviction was interrupted"))

    def verify(self, instances: Sequence[model.Instance] | None, *, dry_run: bool) -> VerifyReport:
        """Evict what nobody needs any more.

        :param instances: all instances on this host; on shared storage those of all hosts. None: unknown.
        :raises NoSpaceError, BackendError: the filesystem failed.
        """
        with translated(self._cache.layout.base_path):
            return self._verify(instances, dry_run=dry_run)

    def _verify(self, instances: Sequence[model.Instance] | None, *, dry_run: bool) -> VerifyReport:
        now = self._cache.filesystem_now()
        found = inventory.take(self._cache)
        trashed = trash.find(self._cache)
        if not dry_run:
            self._tidy(found, now)
        read = self._reader(instances, now)
        references = read({*(base.name for base in found.bases), *(each.name for each in trashed)})
        self._cache.host.trace(TracePoint.VERIFY_READ)
        limits = policy.Limits.of(self._cache.config)
        plan = policy.plan(found.bases, references, limits, now=now, space=self._space(found))
        # Their records go with them.
        going = {*(victim.entry.name for victim in plan.victims), *(each.name for each in trashed)}
        image_ids = {name: self.image_id(name) for name in going}
        if dry_run:
            outcomes = self._foresee(plan, trashed, references)
        else:
            recover.sweep_unfinished_disks(self._cache, self._observers, references.unfinished, now=now)
            self._remember(references)
            self._refresh(plan, now)
            outcomes = evict.evict(
                plan.victims, read, self._cache, self._hosts, self._observers, remove=limits.remove
            )
        return self._report(plan, outcomes, references, found, image_ids, dry_run=dry_run)

    def _tidy(self, found: inventory.Inventory, now: float) -> None:
        """Everything that needs no references."""
        recover.recover(self._cache, self._observers)
        self._hosts.register()
        try:
            compute_nodes.refresh(self._cache)
        except OSError as error:
            LOG.warning("Nova's registry of hosts that share this storage cannot be written: %s", error)
        evict.sweep_foreign_stages(
            self._cache, self._observers, [entry.name for entry in found.foreign_stages], now=now
        )

    def evict_one(
        self, name: str, reason: str, *, floor_age: float = 0.0, locked: bool = False
    ) -> str | None:
        """Evict one base if nobody needs it. None: it is gone; otherwise why it stays, as a clause.

        Without the driver's report: an instance that has no disk yet loses nothing but time.

        :param floor_age: seconds of disuse below which it stays all the same.
        :param locked: the caller holds its lock.
        :raises NoSpaceError, BackendError: the filesystem failed.
        """
        with translated(self._cache.layout.base(name)):
            now = self._cache.filesystem_now()
            entry = inventory.look(self._cache, name)
            if entry is None:
                return None
            read = self._reader((), now)
            needed = policy.needed(entry, read([name]))
            if needed is not None:
                return needed
            if now - entry.last_use < floor_age:
                return "it was fetched or used a moment ago"
            self._cache.host.trace(TracePoint.VERIFY_READ)
            victim = policy.Decision(entry, True, reason)
            outcomes = evict.evict(
                [victim], read, self._cache, self._hosts, self._observers, locked=locked, only={name}
            )
        return next((each.reason for each in outcomes if not each.gone), None)

    def explain(self, name: str, instances: Sequence[model.Instance] | None) -> Explanation | None:
        """Say what a pass would do with a base now, and why. None: it is not there."""
        report = self.verify(instances, dry_run=True)
        base = next((each for each in report.bases if each.name == name), None)
        entry = inventory.look(self._cache, name)
        if base is None or entry is None:
            return None
        now = self._cache.filesystem_now()
        references = self._reader(instances, now)([name])
        limits = policy.Limits.of(self._cache.config)
        obstacles = policy.obstacles(entry, references, limits, now=now)
        return Explanation(base, obstacles, report.problems)

    def evict_unfit(self, name: str, reason: str) -> bool:
        """Evict a base that does not serve, under its exclusive lock. False: it stays."""
        floor_age = self._cache.config.space_minimum_age_seconds
        return self.evict_one(name, reason, floor_age=floor_age, locked=True) is None

    def scrub(
        self, *, rate: int | None, names: Collection[str] | None, cancel: model.CancelToken | None
    ) -> scrub.ScrubReport:
        """Check the content of bases, and evict those that are damaged and unused."""

        def evict_locked(name: str, reason: str) -> str | None:
            return self.evict_one(name, reason, locked=True)

        return scrub.scrub(self._cache, self._observers, evict_locked, rate=rate, names=names, cancel=cancel)

    def make_room(self, wanted: int) -> int:
        """Evict what a fetch needs the room of, as far as policy allows. Returns the bytes freed."""
        now = self._cache.filesystem_now()
        read = self._reader((), now)
        return room.make(wanted, read, self._cache, self._hosts, self._observers, now=now)

    def space(self) -> SpaceReport:
        """Look how full the cache's filesystem is."""
        now = self._cache.filesystem_now()
        return room.report(self._reader((), now), self._cache, now=now)

    # -- the steps -----------------------------------------------------------------------------------

    def _reader(self, instances: Sequence[model.Instance] | None, now: float) -> evict.Reading:
        memory = self._recall()

        def read(names: Collection[str]) -> References:
            return reference_module.collect(self._cache, names, instances, memory, now=now)

        return read

    def _recall(self) -> Memory:
        data = durable.read_file(self._cache.layout.readings(self._hosts.id), limit=2**30)
        return Memory(scan.load(data), self._hosts.own().roots)

    def _remember(self, references: References) -> None:
        """Keep what was read, for the day on which a disk cannot be read or a root is not mounted."""
        try:
            own = self._hosts.own()
            if dict(own.roots) != dict(references.roots):
                self._hosts.write(dataclasses.replace(own, roots=dict(references.roots)))
            path = self._cache.layout.readings(self._hosts.id)
            data = scan.dump(references.readings)
            if data != durable.read_file(path, limit=2**30):
                durable.write_file(path, data)
        except OSError as error:
            # Most likely the disk is full, which must not stop what makes room.
            LOG.warning("What was read in the instance directories cannot be remembered: %s", error)

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

    def _foresee(
        self,
        plan: policy.EvictionPlan,
        trashed: Sequence[trash.TrashEntry],
        references: References,
    ) -> list[evict.Outcome]:
        """Return what :func:`evict.evict` would do now."""
        outcomes = [
            evict.Outcome(victim.entry.name, False, evict.LEASED)
            for victim in plan.victims
            if locks.is_taken(self._cache.layout.lock(victim.entry.name), host=self._cache.host)
        ]
        for each in trashed:
            if (reason := evict.who_needs(each, references, self._cache)) is not None:
                outcomes.append(evict.Outcome(each.name, False, f"put back: {reason}"))
            elif self._cache.config.remove_unused_base_images:
                allocated = os.stat(each.path, follow_symlinks=False).st_blocks * 512
                outcomes.append(evict.Outcome(each.name, True, evict.LEFT, allocated))
        return outcomes

    def _space(self, found: inventory.Inventory) -> policy.Space:
        status = os.statvfs(self._cache.layout.base_path)
        return policy.Space(
            used=sum(entry.allocated for entry in found.bases), free=status.f_bavail * status.f_frsize
        )

    def _report(
        self,
        plan: policy.EvictionPlan,
        outcomes: Sequence[evict.Outcome],
        references: References,
        found: inventory.Inventory,
        image_ids: dict[str, str | None],
        *,
        dry_run: bool,
    ) -> VerifyReport:
        became = {outcome.name: outcome for outcome in outcomes}
        bases = []
        for decision in plan.decisions:
            entry = decision.entry
            outcome = became.pop(entry.name, None)
            evicted = outcome.gone if outcome is not None else decision.evict and dry_run
            reason = outcome.reason if outcome is not None else decision.reason
            image_id = image_ids.get(entry.name) or self.image_id(entry.name)
            bases.append(BaseReport(entry.name, evicted, reason, entry.allocated, image_id))
        for outcome in became.values():
            image_id = image_ids.get(outcome.name)
            bases.append(BaseReport(outcome.name, outcome.gone, outcome.reason, outcome.allocated, image_id))
        unknown = [
            f"{self._cache.layout.base(name)} is nothing that belongs into the cache. Move it away."
            for name in found.unknown
        ]
        problems = (*references.problems, *self._silent(outcomes), *unknown)
        return VerifyReport(tuple(sorted(bases, key=lambda base: base.name)), problems, dry_run)

    def _silent(self, outcomes: Sequence[evict.Outcome]) -> list[str]:
        """Return a sentence for each host that keeps bases in the trash by silence."""
        held: dict[HostRef, list[int]] = {}
        for outcome in outcomes:
            for host in outcome.blocked_by:
                held.setdefault(host, []).append(outcome.allocated)
        return [
            f"Host {host.name} has not looked at {len(sizes)} evicted base images, which hold"
            f" {sum(sizes)} bytes. Let its periodic pass run; if it will not come back, run:"
            f" imagecache host forget {host.id}"
            for host, sizes in sorted(held.items())
        ]

    def image_id(self, name: str) -> str | None:
        """Return the image a base was made from, as its record says."""
        record = self._cache.read_record(name)
        return record.image_id if record is not None else None
