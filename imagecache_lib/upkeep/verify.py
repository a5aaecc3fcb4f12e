# SPDX-License-Identifier: Apache-2.0
"""The periodic pass: inventory, references, plan, evict, and a report that says why for each base."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Collection, Sequence

from imagecache_lib import durable, errors, events, evidence, model, store
from imagecache_lib.upkeep import disks, evict, inventory, policy, recover
from imagecache_lib.upkeep import references as reference_module
from imagecache_lib.upkeep.hosts import Hosts

LOG = logging.getLogger(__name__)


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


class Upkeep:
    """Everything that is done to the cache as a whole. Safe to share between threads."""

    def __init__(self, cache: store.CacheStore, observers: events.Observers) -> None:
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

    def verify(self, instances: Sequence[model.Instance] | None, *, dry_run: bool) -> VerifyReport:
        """Evict what nobody needs any more.

        :param instances: all instances on this host; on shared storage those of all hosts. None: unknown.
        """
        now = self._cache.filesystem_now()
        found = inventory.take(self._cache)
        if not dry_run:
            recover.recover(self._cache, self._observers)
            recover.sweep_unfinished_disks(self._cache, self._observers, now=now)
            evict.sweep_foreign_stages(
                self._cache, self._observers, [entry.name for entry in found.foreign_stages], now=now
            )
        read = self._reader(instances, now)
        references = read([entry.name for entry in found.bases])
        self._cache.host.trace("verify:read")
        plan = policy.plan(
            found.bases, references, policy.Limits.of(self._cache.config), now=now, space=self._space(found)
        )
        outcomes: list[evict.Outcome] = []
        if not dry_run:
            self._remember(references)
            self._refresh(plan)
            outcomes = evict.evict(plan.victims, read, self._cache, self._hosts, self._observers)
        return self._report(plan, outcomes, references, found, dry_run=dry_run)

    def evict_one(
        self, name: str, reason: str, *, floor_age: float = 0.0, locked: bool = False
    ) -> str | None:
        """Evict one base if nobody needs it. None: it is gone; otherwise why it stays, as a clause.

        Without the driver's report: an instance that has no disk yet loses nothing but time.

        :param floor_age: seconds of disuse below which it stays all the same.
        :param locked: the caller holds its lock.
        """
        now = self._cache.filesystem_now()
        entry = next((each for each in inventory.take(self._cache).bases if each.name == name), None)
        if entry is None:
            return None
        read = self._reader((), now)
        needed = policy.needed(entry, read([name]))
        if needed is not None:
            return needed
        if now - entry.last_use < floor_age:
            return "it was fetched or used a moment ago"
        victim = policy.Decision(entry, True, reason)
        outcomes = evict.evict([victim], read, self._cache, self._hosts, self._observers, locked=locked)
        return next((each.reason for each in outcomes if each.name == name and not each.gone), None)

    def evict_unfit(self, name: str, reason: str) -> bool:
        """Evict a base that does not serve, under its exclusive lock. False: it stays."""
        floor_age = self._cache.config.space_minimum_age_seconds
        return self.evict_one(name, reason, floor_age=floor_age, locked=True) is None

    # -- the steps -----------------------------------------------------------------------------------

    def _reader(self, instances: Sequence[model.Instance] | None, now: float) -> evict.Reading:
        memory = self._recall()

        def read(names: Collection[str]) -> reference_module.References:
            return reference_module.collect(self._cache, names, instances, memory, now=now)

        return read

    def _recall(self) -> reference_module.Memory:
        data = durable.read_file(self._cache.layout.readings(self._hosts.id), limit=2**30)
        return reference_module.Memory(disks.load(data), self._hosts.own().roots)

    def _remember(self, references: reference_module.References) -> None:
        """Keep what was read, for the day on which a disk cannot be read or a root is not mounted."""
        own = self._hosts.own()
        if dict(own.roots) != dict(references.roots):
            self._hosts.write(dataclasses.replace(own, roots=dict(references.roots)))
        path = self._cache.layout.readings(self._hosts.id)
        data = disks.dump(references.readings)
        if data != durable.read_file(path, limit=2**30):
            durable.write_file(path, data)

    def _refresh(self, plan: policy.EvictionPlan) -> None:
        """Note the use of what is in use, so that its age counts from now, for Nova too."""
        for decision in plan.decisions:
            if decision.evict or not decision.in_use:
                continue
            with contextlib.suppress(errors.CacheEntryError):
                opened = self._cache.open_base(decision.entry.name)
                if opened is not None:
                    with contextlib.closing(opened):
                        self._cache.note_use(opened)

    def _space(self, found: inventory.Inventory) -> policy.Space:
        status = os.statvfs(self._cache.layout.base_path)
        return policy.Space(
            used=sum(entry.allocated for entry in found.bases), free=status.f_bavail * status.f_frsize
        )

    def _report(
        self,
        plan: policy.EvictionPlan,
        outcomes: Sequence[evict.Outcome],
        references: reference_module.References,
        found: inventory.Inventory,
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
            bases.append(BaseReport(entry.name, evicted, reason, entry.allocated, self.image_id(entry.name)))
        for outcome in became.values():
            bases.append(BaseReport(outcome.name, outcome.gone, outcome.reason, outcome.allocated))
        odd = [
            f"{self._cache.layout.base(name)} is nothing that belongs into the cache. Move it away."
            for name in found.odd
        ]
        return VerifyReport(
            tuple(sorted(bases, key=lambda base: base.name)), (*references.problems, *odd), dry_run
        )

    def image_id(self, name: str) -> str | None:
        """Return the image a base was made from, as its record says."""
        data = durable.read_file(self._cache.layout.record(name))
        record = evidence.parse(data) if data is not None else None
        return record.image_id if record is not None else None
