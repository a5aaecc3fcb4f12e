# SPDX-License-Identifier: Apache-2.0
"""The periodic pass: inventory, references, plan, evict, and a report that says why for each base."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from imagecache_lib import dates, errors, events, model
from imagecache_lib.nova import compute_nodes
from imagecache_lib.store import last_scan, named_roots, recover, trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import HostRef, Hosts
from imagecache_lib.store.seen import LastScan
from imagecache_lib.system import locks
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated
from imagecache_lib.upkeep import evict, inventory, members, policy
from imagecache_lib.upkeep import make_room as room
from imagecache_lib.upkeep.follow import Follower
from imagecache_lib.upkeep.make_room import SpaceReport
from imagecache_lib.upkeep.outcomes import Evicted, Kept
from imagecache_lib.upkeep.references import LEASED, ReferenceReader, References

if TYPE_CHECKING:
    from imagecache_lib.upkeep.scrub import ScrubReport

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
        """Return this report as an event, in figures."""
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


@dataclasses.dataclass(frozen=True)
class _Look:
    """Everything that a pass decides by, read once."""

    inventory: inventory.Inventory
    situation: policy.Situation
    references: References
    limits: policy.Limits
    reader: ReferenceReader
    last: LastScan
    image_ids: dict[str, str | None]
    now: float

    def decide(self) -> policy.Decided:
        return policy.decide(self.situation, self.references, self.limits, now=self.now)


class Upkeep:
    """Everything that is done to the cache as a whole. Safe to share between threads.

    It is the :class:`~imagecache_lib.store.evictor.Evictor` of the fetches that need room, or a name.
    """

    def __init__(self, cache: CacheStore) -> None:
        self._cache = cache
        self._observers = cache.observers
        self._hosts = Hosts(cache)
        self._follower = Follower()
        self._parsed = last_scan.Parsed()

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
                look = self._look(reported, self._cache.filesystem_now())
                decided = look.decide()
                return self._report(
                    look, decided, evict.foresee(decided, look.situation.others), dry_run=True
                )
            return self._verify(reported)

    def _verify(self, instances: tuple[model.Instance, ...] | None) -> VerifyReport:
        now = self._cache.filesystem_now()
        self._tidy(now)
        look = self._look(instances, now)
        decided = look.decide()
        recover.sweep_unfinished_disks(self._cache, self._observers, look.references.unfinished, now=now)
        self._save_scan(look)
        self._refresh(decided.plan, now)
        outcomes = evict.evict(
            decided.plan.victims,
            look.reader,
            self._cache,
            self._hosts,
            self._observers,
            remove=look.limits.remove,
        )
        return self._report(look, decided, outcomes, dry_run=False)

    def _tidy(self, now: float) -> None:
        """Everything that needs no references."""
        foreign = inventory.foreign_stages(self._cache)
        recover.recover(self._cache, self._observers)
        self._hosts.register()
        try:
            compute_nodes.refresh(self._cache)
        except OSError as error:
            LOG.warning("Nova's registry of hosts that share this storage cannot be written: %s", error)
        evict.sweep_foreign_stages(self._cache, self._observers, foreign, now=now)

    def prune(
        self,
        instances: Iterable[model.Instance] | None,
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
            look = dataclasses.replace(self._look_anytime(instances, now), limits=limits)
            decided = look.decide()
            if dry_run:
                outcomes = evict.foresee(decided, look.situation.others)
            else:
                outcomes = evict.evict(
                    decided.plan.victims,
                    look.reader,
                    self._cache,
                    self._hosts,
                    self._observers,
                    remove=limits.remove,
                )
            return self._report(look, decided, outcomes, dry_run=dry_run)

    def reader_now(
        self, instances: Iterable[model.Instance] | None
    ) -> tuple[ReferenceReader, tuple[model.Instance, ...]]:
        """Return what reads all references now, and the instances that it knows. Changes nothing.

        :param instances: as for :meth:`verify`. None: as the driver last reported them.
        """
        now = self._cache.host.clock()
        if instances is not None:
            reported = model.reported(instances)
            return self._reader(reported, self._load_last_scan(), now), reported
        return self._reader_between_passes(now), tuple(self._load_last_scan().report or ())

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
            reader = self._reader_between_passes(now)
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

    def explain(self, name: str, instances: Iterable[model.Instance] | None) -> Explanation | None:
        """Say what a pass would do with a base now, and why. Returns None if it is not there."""
        look = self._look(
            None if instances is None else model.reported(instances), self._cache.filesystem_now()
        )
        decided = look.decide()
        outcomes = evict.foresee(decided, look.situation.others)
        report = self._report(look, decided, outcomes, dry_run=True)
        base = next((each for each in report.bases if each.name == name), None)
        entry = next((each for each in look.situation.bases if each.name == name), None)
        if base is None or entry is None:
            return None
        obstacles = policy.obstacles(entry, look.references, look.limits, now=look.now)
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
            reader = self._reader_between_passes(now)
            return room.make(wanted, reader, self._cache, self._hosts, self._observers, now=now)

    def space(self) -> SpaceReport:
        """Return how full the cache's filesystem is, in bytes."""
        now = self._cache.filesystem_now()
        return room.report(self._reader_between_passes(now), self._cache, now=now)

    def forget_disks(self, path: str) -> int:
        """Forget the disks that were seen at a path and below it, and the disk root if it is one.

        Returns how many disks are forgotten. What is there is seen again by the next pass.
        """
        before = self._load_last_scan()
        after = before.without(path)
        gone = before.disks.keys() - after.disks.keys()
        for name in sorted({name for disk in gone for name in before.disks[disk].names}):
            self._observers(events.Forgotten(name, reason=f"disks at {path}, as an operator said"))
        self._hosts.forget_roots(after.roots)
        named_roots.forget(self._cache.layout, self._hosts.id, path)
        last_scan.replace(self._cache.layout, self._hosts.id, after)
        return len(before.disks) - len(after.disks)

    # -- the steps -----------------------------------------------------------------------------------

    def _look_anytime(self, instances: Iterable[model.Instance] | None, now: float) -> _Look:
        """Read everything that a pass decides by, with the driver's last report if there is no other."""
        if instances is not None:
            return self._look(model.reported(instances), now)
        return self._look(None, now, reader=self._reader_between_passes(now))

    def _look(
        self,
        instances: tuple[model.Instance, ...] | None,
        now: float,
        *,
        reader: ReferenceReader | None = None,
    ) -> _Look:
        """Read everything that a pass decides by.

        :param reader: reads all references. None: one that knows these instances.
        """
        found = inventory.take(self._cache)
        last = self._load_last_scan()
        reader = reader or self._reader(instances, last, now)
        trashed = trash.find(self._cache)
        references = reader.read({*(base.name for base in found.bases), *(each.name for each in trashed)})
        self._cache.host.trace(TracePoint.VERIFY_READ)
        registered = members.of(self._cache, self._hosts)
        situation = policy.Situation(
            bases=found.bases,
            trash=tuple(
                described
                for _entry, described in evict.describe(trashed, self._cache, registered, self._hosts)
            ),
            space=self._space(found),
            held=self._held(base.name for base in found.bases if base.name not in references.users),
            others=tuple(self._hosts.pending_acks("", registered)),
        )
        names = {*(base.name for base in found.bases), *(each.name for each in trashed)}
        image_ids = {name: self.image_id(name) for name in names}
        limits = policy.Limits.of(self._cache.config)
        return _Look(found, situation, references, limits, reader, last, image_ids, now)

    def _held(self, names: Iterable[str]) -> dict[str, str]:
        """Return why bases are in use this moment, as a clause by name: locked, or about to be published."""
        locked = {
            name: LEASED
            for name in names
            if locks.is_taken(self._cache.layout.lock(name), host=self._cache.host)
        }
        return {**dict.fromkeys(trash.being_published(self._cache), evict.PUBLISHED_NOW), **locked}

    def _reader(
        self, instances: tuple[model.Instance, ...] | None, last: LastScan, now: float
    ) -> ReferenceReader:
        return ReferenceReader(self._cache, instances, last, self._follower, now)

    def _reader_between_passes(self, now: float) -> ReferenceReader:
        """Return a reader that knows the driver's last report."""
        last = self._load_last_scan()
        if last.report_unknown is not None:
            last = dataclasses.replace(last, unreadable=last.unreadable or last.report_unknown)
        return self._reader(tuple(last.report or ()), last, now)

    def _load_last_scan(self) -> LastScan:
        where, host_id = self._cache.layout, self._hosts.id
        return last_scan.load_last_scan(where, host_id, self._hosts.own().roots, parsed=self._parsed)

    def _save_scan(self, look: _Look) -> None:
        """Keep what was seen, for the day on which a disk cannot be read or a root is not mounted."""
        seen = look.references.seen
        if look.last.unreadable is not None:
            return  # what cannot be read now may be read again, and must not be replaced by less
        try:
            own = self._hosts.own()
            roots = {path: (root.device, root.fsid) for path, root in seen.roots.items()}
            if dict(own.roots) != roots:
                self._hosts.write(dataclasses.replace(own, roots=roots))
            last_scan.save_last_scan(self._cache.layout, self._hosts.id, look.last, seen)
        except OSError as error:
            # Most likely the disk is full, which must not stop what makes room.
            LOG.warning("What was seen in the instance directories cannot be remembered: %s", error)

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

    def _space(self, found: inventory.Inventory) -> policy.Space:
        status = os.statvfs(self._cache.layout.base_path)
        return policy.Space(
            used=sum(entry.allocated for entry in found.bases), free=status.f_bavail * status.f_frsize
        )

    def _report(
        self, look: _Look, decided: policy.Decided, outcomes: Sequence[evict.Outcome], *, dry_run: bool
    ) -> VerifyReport:
        became = {outcome.name: outcome for outcome in outcomes}
        bases = []
        for decision in decided.plan.decisions:
            entry = decision.entry
            outcome = became.pop(entry.name, None)
            evicted = outcome.gone if outcome is not None else decision.evict and dry_run
            reason = dates.plain(outcome.reason if outcome is not None else decision.reason)
            image_id = look.image_ids.get(entry.name)
            bases.append(BaseReport(entry.name, evicted, reason, entry.allocated, image_id))
        for outcome in became.values():
            image_id = look.image_ids.get(outcome.name)
            reason = dates.plain(outcome.reason)
            bases.append(BaseReport(outcome.name, outcome.gone, reason, outcome.allocated, image_id))
        unknown = [
            f"{self._cache.layout.base(name)} is nothing that belongs into the cache. Move it away."
            for name in look.inventory.unknown
        ]
        unknown += [
            f"{self._cache.layout.base(name)} cannot be looked at ({cause}), and stays. Check the filesystem."
            for name, cause in look.inventory.unreadable
        ]
        problems = (*look.references.problems, *_silent(outcomes), *unknown)
        told = tuple(dates.plain(problem) for problem in problems)
        return VerifyReport(tuple(sorted(bases, key=lambda base: base.name)), told, dry_run)

    def image_id(self, name: str) -> str | None:
        """Return the id of the image a base was made from, or None if no record says so."""
        record = self._cache.read_record(name)
        return record.image_id if record is not None else None


def _silent(outcomes: Sequence[evict.Outcome]) -> list[str]:
    """Return a sentence for each host that keeps bases in the trash by silence."""
    held: dict[HostRef, list[int]] = {}
    for outcome in outcomes:
        for host in outcome.blocked_by:
            held.setdefault(host, []).append(outcome.allocated)
    return [
        _says_nothing(host, f"{len(sizes)} evicted base images, which hold {dates.size(sum(sizes))}")
        for host, sizes in sorted(held.items())
    ]


def _says_nothing(host: HostRef, what: str) -> str:
    """Return a sentence on a host that has not looked at bases, and on what an operator can do.

    :param what: the bases, as a phrase.
    """
    if host.id == members.UNTOLD:
        return (
            f"Hosts may not have looked at {what}: {host.name}. Nova writes its registry anew in its next"
            " pass; if no Nova runs here, remove it."
        )
    return (
        f"Host {host.name} has not looked at {what}. Let its periodic pass run; if it will not come back, "
        + _how_to_forget(host)
    )


def _how_to_forget(host: HostRef) -> str:
    if host.id.startswith(members.BY_NOVA):
        return f"take it out of {compute_nodes.NAME}, where Nova last named it within a day"
    return f"run: imagecache host forget {host.id}"
