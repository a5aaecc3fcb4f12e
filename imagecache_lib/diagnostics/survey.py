# SPDX-License-Identifier: Apache-2.0
"""The whole cache at a glance, for people and for metrics: each base's state, and where the space went.

What may go is the eviction's to say, under locks and with a second reading; this only looks, changes
nothing, and says of each base image what the eviction's rules say of it now.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
from collections.abc import Iterator, Mapping, Sequence

from imagecache_lib import dates, events, model
from imagecache_lib.diagnostics import catalog
from imagecache_lib.store import layout, pins, reservations
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import locks
from imagecache_lib.upkeep import inventory, policy, references
from imagecache_lib.upkeep.references import ReferenceReader, References


class State(enum.Enum):
    """What keeps a base image, the strongest first."""

    #: A disk, an instance, a running QEMU, a lease or another hard link needs it.
    IN_USE = "in_use"
    #: An operator or a driver pinned it.
    PINNED = "pinned"
    #: Something could not be read that may refer to it.
    UNKNOWN = "unknown"
    #: Nothing needs it, and it is younger than its minimum age.
    YOUNG = "young"
    #: Nothing needs it: the next pass removes it, if it removes anything.
    RECLAIMABLE = "reclaimable"


@dataclasses.dataclass(frozen=True)
class Reason:
    """One thing that keeps a base image.

    :param code: ``disk``, ``instance``, ``qemu``, ``leased``, ``hard_link``, ``elsewhere`` (another
        host's disk), ``pinned``, ``unknown`` or
        ``young``.
    :param text: it as a clause.
    :param facts: more about it: ``path`` of the disk, ``instance``, ``owner`` and ``until`` of the pin,
        ``until`` of the age, ``links``. Times are epoch seconds.
    """

    code: str
    text: str
    facts: Mapping[str, str | float | int | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SurveyedBase:
    """A base image and what keeps it.

    :param base: what is known of it.
    :param state: the strongest of what keeps it.
    :param reasons: everything that keeps it.
    :param users: how many disks refer to it, or, if more, how many reported instances use its image.
    """

    base: catalog.CachedBase
    state: State
    reasons: tuple[Reason, ...]
    users: int

    @property
    def shown_state(self) -> str:
        """The state, unless the base image is damaged, which matters more."""
        return "damaged" if self.base.damaged else self.state.value


@dataclasses.dataclass(frozen=True)
class Survey:
    """The cache and its filesystem. All sizes are bytes.

    :param bases: every base image, sorted by name.
    :param size: of the filesystem.
    :param free: what an unprivileged process may still allocate.
    :param reserved: promised to images in flight and not allocated yet.
    :param trash: allocated by base images that are being evicted.
    :param stage: allocated by images in flight.
    :param now: when this was, in epoch seconds.
    :param last_scrub: when a scrub of the whole cache last ended, in epoch seconds, or None if none did.
    :param problems: what could not be determined, a sentence each with what to do.
    :param last_pass: when this host's last pass looked at its disks, in epoch seconds, or None if none did.
    """

    bases: tuple[SurveyedBase, ...]
    size: int
    free: int
    reserved: int
    trash: int
    stage: int
    now: float
    last_scrub: float | None
    problems: tuple[str, ...]
    last_pass: float | None = None

    def bytes_of(self, state: State) -> int:
        """Return what the base images in a state have allocated."""
        return sum(each.base.allocated for each in self.bases if each.state is state)

    @property
    def allocated(self) -> int:
        """What all base images have allocated."""
        return sum(each.base.allocated for each in self.bases)

    @property
    def damaged(self) -> tuple[SurveyedBase, ...]:
        """The base images that a scrub found damaged."""
        return tuple(each for each in self.bases if each.base.damaged)

    def as_event(self) -> events.Surveyed:
        """Return it in figures."""
        allocated = {state.value: self.bytes_of(state) for state in State}
        return events.Surveyed(
            "",
            size=self.size,
            free=self.free,
            reserved=self.reserved,
            allocated={**allocated, "trash": self.trash, "in_flight": self.stage},
            images={
                state.value: len([each for each in self.bases if each.state is state]) for state in State
            },
            damaged=len(self.damaged),
            last_scrub=self.last_scrub,
        )


def take(cache: CacheStore, reader: ReferenceReader, instances: Sequence[model.Instance]) -> Survey:
    """Look at the whole cache, which need not exist yet.

    :param reader: reads all references.
    :param instances: those that the reader knows.
    :raises OSError: the cache or its filesystem cannot be read.
    """
    where = cache.layout.base_path if cache.exists() else cache.config.instances_path
    status = os.statvfs(where)
    bases = catalog.listed(cache)
    found = reader.read([base.name for base in bases]) if bases else References({})
    now = cache.host.clock()
    look = _Look(cache, found, instances, now)
    return Survey(
        bases=tuple(look.at(base) for base in bases),
        size=status.f_blocks * status.f_frsize,
        free=status.f_bavail * status.f_frsize,
        reserved=reservations.outstanding(cache),
        trash=inventory.allocated_under(cache.layout.trash),
        stage=inventory.allocated_under(cache.layout.stages),
        now=now,
        last_scrub=_changed(cache.layout.scrubbed),
        problems=found.problems,
        last_pass=_changed(cache.layout.last_scan(cache.host_id)),
    )


class _Look:
    def __init__(
        self, cache: CacheStore, found: References, instances: Sequence[model.Instance], now: float
    ) -> None:
        self._cache = cache
        self._found = found
        self._now = now
        self._limits = policy.Limits.of(cache.config)
        self._disks: dict[str, list[str]] = {}
        for disk in found.seen.all_disks():
            for name in disk.names:
                self._disks.setdefault(name, []).append(disk.path)
        self._instances: dict[str, list[str]] = {}
        for instance in instances:
            for name, _user in references.reported(found.users, [instance], []):
                self._instances.setdefault(name, []).append(instance.uuid)

    def at(self, base: catalog.CachedBase) -> SurveyedBase:
        reasons = tuple(self._reasons(base))
        users = max(len(self._disks.get(base.name, ())), len(set(self._instances.get(base.name, ()))))
        return SurveyedBase(base, _state(reasons), reasons, users)

    def _reasons(self, base: catalog.CachedBase) -> Iterator[Reason]:
        name = base.name
        for path in sorted(self._disks.get(name, ())):
            yield Reason("disk", f"used by the disk {path}", {"path": path})
        for uuid in sorted(set(self._instances.get(name, ()))):
            yield Reason("instance", f"used by instance {uuid}", {"instance": uuid})
        user = self._found.users.get(name)
        pinned = pins.look(self._cache, name, self._now)
        if user == references.OPEN_IN_QEMU:
            yield Reason("qemu", user)
        elif (
            user is not None
            and user != references.LEASED
            and (pinned is None or user != pinned.reason)
            and name not in self._disks
            and name not in self._instances
        ):
            yield Reason("elsewhere", user)
        fetched = locks.is_taken(self._cache.layout.lock(name), host=self._cache.host)
        if fetched or references.is_leased(self._cache.layout.base(name)):
            yield Reason("leased", references.LEASED)
        if base.links > 1:
            yield Reason(
                "hard_link",
                f"the file has {base.links} names: another hard link refers to it",
                {"links": base.links},
            )
        yield from self._pins(base)
        if self._found.unknown is not None:
            yield Reason("unknown", self._found.unknown)
        if (rest := self._limits.age_of(layout.classify(name)) - (self._now - base.last_use)) > 0:
            yield Reason("young", f"too young by {dates.span(rest)}", {"until": self._now + rest})

    def _pins(self, base: catalog.CachedBase) -> Iterator[Reason]:
        if (found := pins.look(self._cache, base.name, self._now)) is None:
            return
        held = [pin for pin in base.pins if pin.owner != pins.UNREADABLE and not pin.is_over(self._now)]
        if not held or any(pin.owner == pins.UNREADABLE for pin in base.pins):
            yield Reason("pinned", found.reason, {"owner": None, "until": None})
        for pin in held:
            until = f" until {dates.date(pin.expires)}" if pin.expires is not None else ""
            yield Reason(
                "pinned", f"pinned by {pin.owner}{until}", {"owner": pin.owner, "until": pin.expires}
            )


#: What each kind of reason makes of a base image.
_STATES = {"pinned": State.PINNED, "unknown": State.UNKNOWN, "young": State.YOUNG}


def _state(reasons: Sequence[Reason]) -> State:
    found = {_STATES.get(reason.code, State.IN_USE) for reason in reasons}
    return next((state for state in State if state in found), State.RECLAIMABLE)


def _changed(path: str) -> float | None:
    """Return when a file was written last, in epoch seconds, or None if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(path, follow_symlinks=False).st_mtime
    return None
