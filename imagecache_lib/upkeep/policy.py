# SPDX-License-Identifier: Apache-2.0
"""Which bases may go. Values in, a plan out: no clock, no disk, no surprise.

:func:`decide` is the whole of it. A dry run returns what it says, and a pass carries that out; what lies in
the trash is decided once more by :func:`decide_trash`, from the references that are read after the renames.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping

from imagecache_lib import dates
from imagecache_lib.config import CacheConfig
from imagecache_lib.store import layout
from imagecache_lib.store.hosts import HostRef
from imagecache_lib.upkeep.inventory import Entry
from imagecache_lib.upkeep.outcomes import Kept
from imagecache_lib.upkeep.references import References

#: Why a base goes that an older pass renamed away.
LEFT = "left in the trash, and nothing needs it"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the operator allows. Bytes and seconds; a size of 0 is no limit.

    :param remove: False if nothing goes.
    :param original_age: unused bases go once they are this old.
    :param resized_age: the same for legacy resized bases.
    :param floor_age: under pressure of space unused bases may go earlier, but none younger than this: it
        may have been fetched for a disk that is still on its way from another host.
    :param max_size: allocated bytes that the cache may have.
    :param free_low: bytes of the filesystem below which there is pressure.
    :param free_high: bytes that shall be free again then.
    """

    remove: bool = True
    original_age: float = 86400
    resized_age: float = 3600
    floor_age: float = 3600
    max_size: int = 0
    free_low: int = 0
    free_high: int = 0

    @classmethod
    def of(cls, config: CacheConfig) -> Limits:
        return cls(
            remove=config.remove_unused_base_images,
            original_age=config.remove_unused_original_minimum_age_seconds,
            resized_age=config.remove_unused_resized_minimum_age_seconds,
            floor_age=config.space_minimum_age_seconds,
            max_size=config.max_cache_size,
            free_low=config.free_space_low,
            free_high=max(config.free_space_high, config.free_space_low),
        )

    def for_prune(self, *, older_than: float, until_free: int) -> Limits:
        """Return the limits of an operator's request to make room now.

        :param older_than: seconds since its last use for which a base stays; never less than ``floor_age``.
        :param until_free: bytes of the filesystem at which it is enough. 0: everything goes that may.
        """
        age = max(older_than, self.floor_age)
        return Limits(
            remove=self.remove,
            original_age=math.inf if until_free else age,
            resized_age=math.inf if until_free else age,
            floor_age=age,
            free_low=until_free,
            free_high=until_free,
        )

    def age(self, entry: Entry) -> float:
        """Seconds after its last use at which this base goes without any pressure."""
        return self.age_of(entry.kind)

    def age_of(self, kind: layout.Kind) -> float:
        """Seconds after its last use at which a base of that kind goes without any pressure."""
        return self.resized_age if kind is layout.Kind.RESIZED else self.original_age


@dataclasses.dataclass(frozen=True)
class Space:
    """How full the cache and its filesystem are, in allocated bytes.

    :param used: by the cache.
    :param free: on the filesystem.
    :param wanted: bytes that a fetch needs now beside what is free.
    """

    used: int = 0
    free: int = 2**63
    wanted: int = 0

    def pressure(self, limits: Limits) -> tuple[int, str]:
        """Return how many bytes must go, and which limit says so."""
        over = [(self.wanted, "an image that is fetched now needs the room")]
        if limits.max_size:
            over.append((self.used - limits.max_size, "the cache is larger than max_cache_size"))
        if self.free < limits.free_low:
            over.append((limits.free_high - self.free, "fewer bytes are free than free_space_low"))
        return max(over, key=lambda each: each[0])


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is to happen to one base, and why."""

    entry: Entry
    evict: bool
    reason: str
    #: Something refers to it, as far as is known.
    in_use: bool = False


@dataclasses.dataclass(frozen=True)
class InTrash:
    """A base that lies in the trash.

    :param name: the base it was.
    :param id: the entry's name in the trash.
    :param allocated: bytes on disk.
    :param links: how many names the file has.
    :param restored: it has its base name back, beside the one in the trash.
    :param waiting: other hosts that have not said yet that nothing of theirs refers to it.
    """

    name: str
    id: str
    allocated: int = 0
    links: int = 1
    restored: bool = False
    waiting: tuple[HostRef, ...] = ()


class Fate(enum.Enum):
    """What is to happen to a base in the trash."""

    #: It gets its name back.
    PUT_BACK = "put back"
    #: It stays in the trash until other hosts have looked.
    WAITS = "waits"
    #: It is unlinked.
    GOES = "goes"


@dataclasses.dataclass(frozen=True)
class TrashDecision:
    """What is to happen to one base in the trash, and why."""

    entry: InTrash
    fate: Fate
    reason: str


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a pass decides about, beside the references.

    :param bases: the base images that have their names.
    :param trash: those that were renamed away.
    :param space: how full it is.
    :param held: for bases that are in use this moment, by whom, as a clause.
    :param others: the other hosts, each of which has to look before anything is unlinked.
    """

    bases: tuple[Entry, ...]
    trash: tuple[InTrash, ...] = ()
    space: Space = dataclasses.field(default_factory=Space)
    held: Mapping[str, str] = dataclasses.field(default_factory=dict)
    others: tuple[HostRef, ...] = ()


@dataclasses.dataclass(frozen=True)
class EvictionPlan:
    """A decision for each base, sorted by name."""

    decisions: tuple[Decision, ...]

    @property
    def victims(self) -> tuple[Decision, ...]:
        return tuple(decision for decision in self.decisions if decision.evict)


@dataclasses.dataclass(frozen=True)
class Decided:
    """What a pass does.

    :param plan: with the bases that have their names.
    :param trash: with those in the trash, in the order of :attr:`Situation.trash`.
    """

    plan: EvictionPlan
    trash: tuple[TrashDecision, ...]


def decide(situation: Situation, references: References, limits: Limits, *, now: float) -> Decided:
    """Decide what a pass does with every base.

    :param now: epoch seconds of the filesystem's clock.
    """
    planned = plan(situation.bases, references, limits, now=now, space=situation.space)
    decisions = tuple(
        dataclasses.replace(decision, evict=False, reason=situation.held[decision.entry.name])
        if decision.evict and decision.entry.name in situation.held
        else decision
        for decision in planned.decisions
    )
    trash = tuple(decide_trash(entry, references, remove=limits.remove) for entry in situation.trash)
    return Decided(EvictionPlan(decisions), trash)


def decide_trash(entry: InTrash, references: References, *, remove: bool) -> TrashDecision:
    """Decide what happens to a base in the trash.

    :param remove: False if nothing goes.
    """
    if (kept := _needed_in_trash(entry, references)) is not None:
        return TrashDecision(entry, Fate.PUT_BACK, kept.reason)
    if not remove:
        return TrashDecision(entry, Fate.PUT_BACK, "remove_unused_base_images is off")
    if entry.waiting:
        return TrashDecision(entry, Fate.WAITS, until(entry.waiting))
    return TrashDecision(entry, Fate.GOES, LEFT)


def _needed_in_trash(entry: InTrash, references: References) -> Kept | None:
    """Return why a base in the trash gets its name back, or None if nothing needs it."""
    if entry.restored:
        return Kept("a request that wanted it linked it back")
    if (user := references.users.get(entry.name)) is not None:
        return Kept(user)
    if references.unknown is not None:
        return Kept(references.unknown)
    return Kept("another hard link refers to it") if entry.links > 1 else None


def until(hosts: Iterable[HostRef]) -> str:
    """Return why a base that nothing on this host refers to is not unlinked yet, as a clause."""
    names = ", ".join(host.name for host in hosts)
    return f"in the trash until these hosts have looked too: {names}"


def plan(
    entries: Iterable[Entry],
    references: References,
    limits: Limits,
    *,
    now: float,
    space: Space | None = None,
) -> EvictionPlan:
    """Decide for each base whether it goes.

    A base goes if nothing refers to it, nothing is unknown, and it was not used for its age; under
    pressure of space earlier, the least recently used first, until the pressure is gone.

    :param now: epoch seconds of the filesystem's clock.
    """
    decisions = {entry.name: _decide(entry, references, limits, now) for entry in entries}
    if limits.remove:
        _relieve(decisions, references, limits, now, space or Space())
    return EvictionPlan(tuple(decisions[name] for name in sorted(decisions)))


def relieve(
    entries: Iterable[Entry], references: References, limits: Limits, *, now: float, wanted: int
) -> EvictionPlan:
    """Decide what goes for an image that needs room now: only as much as that, the least recently used first.

    :param now: epoch seconds of the filesystem's clock.
    :param wanted: bytes.
    """
    decisions = {}
    for entry in entries:
        kept = needed(entry, references) or Kept(
            "there is room enough without it, or it was used a moment ago"
        )
        decisions[entry.name] = Decision(entry, False, kept.reason, in_use=entry.name in references.users)
    if limits.remove:
        only_wanted = dataclasses.replace(limits, max_size=0, free_low=0)
        _relieve(decisions, references, only_wanted, now, Space(wanted=wanted))
    return EvictionPlan(tuple(decisions[name] for name in sorted(decisions)))


def _decide(entry: Entry, references: References, limits: Limits, now: float) -> Decision:
    if (kept := needed(entry, references)) is not None:
        return Decision(entry, False, kept.reason, in_use=entry.name in references.users)
    age = now - entry.last_use
    if limits.age(entry) == math.inf:
        return Decision(
            entry, False, "unused, and there is room enough without it, or it was used a moment ago"
        )
    if age < limits.age(entry):
        return Decision(entry, False, f"unused, too young by {dates.span(limits.age(entry) - age)}")
    unused = f"unused since {dates.date(entry.last_use)}"
    if not limits.remove:
        return Decision(entry, False, f"{unused}, and remove_unused_base_images is off")
    return Decision(entry, True, unused)


def _relieve(
    decisions: dict[str, Decision], references: References, limits: Limits, now: float, space: Space
) -> None:
    """Add victims until the pressure is gone."""
    pressure, reason = space.pressure(limits)
    pressure -= sum(decision.entry.allocated for decision in decisions.values() if decision.evict)
    young = (decision.entry for decision in decisions.values() if not decision.evict)
    for entry in sorted(young, key=lambda each: (each.last_use, each.name)):
        if pressure <= 0:
            return
        if needed(entry, references) is None and now - entry.last_use >= limits.floor_age:
            decisions[entry.name] = Decision(
                entry, True, f"unused since {dates.date(entry.last_use)}, and {reason}"
            )
            pressure -= entry.allocated


def needed(entry: Entry, references: References) -> Kept | None:
    """Return what keeps a base, whatever its age, or None if nothing does."""
    if (user := references.users.get(entry.name)) is not None:
        return Kept(user)
    if references.unknown is not None:
        return Kept(references.unknown)
    if entry.links > 1:
        return Kept(f"the file has {entry.links} names: another hard link refers to it")
    return None


def obstacles(
    entry: Entry, references: References, limits: Limits, *, now: float
) -> tuple[tuple[str, str], ...]:
    """Return everything that keeps a base, not only the first: what it is, and what would change it.

    :param now: epoch seconds of the filesystem's clock.
    """
    found = []
    if (user := references.users.get(entry.name)) is not None:
        found.append((user, "it goes no earlier than that ends"))
    if references.unknown is not None:
        found.append((references.unknown, "find that out, or report the instances"))
    if entry.links > 1:
        found.append((f"the file has {entry.links} names", "remove the other hard links"))
    if (rest := limits.age(entry) - (now - entry.last_use)) > 0:
        found.append(
            (
                f"it was used {dates.date(entry.last_use)} and is too young by {dates.span(rest)}",
                f"wait until {dates.date(now + rest)}, or evict it by name",
            )
        )
    if not limits.remove:
        found.append(("remove_unused_base_images is off", "turn it on, or evict it by name"))
    return tuple(found)
