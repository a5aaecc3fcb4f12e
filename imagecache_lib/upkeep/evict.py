# SPDX-License-Identifier: Apache-2.0
"""Carrying a plan out: rename into the trash, read all references again, and only then unlink.

The second reading is what makes eviction safe without locks. A spawn makes its overlay and then looks
whether its base still has its name; an evictor takes the name and then looks whether there are overlays.
Whichever comes second sees the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from imagecache_lib import errors, events
from imagecache_lib.store import trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import HostRef, Hosts
from imagecache_lib.system import locks
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.upkeep.policy import Decision
from imagecache_lib.upkeep.references import References

LOG = logging.getLogger(__name__)

#: Why a base stays that somebody holds.
LEASED = "leased: it is being used or fetched now"

#: Why a base goes that an older pass renamed away.
LEFT = "left in the trash, and nobody needs it"

#: Reads all references to these names.
Reading = Callable[[Collection[str]], References]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a base that was to go.

    :param name: the base.
    :param gone: it was unlinked.
    :param reason: why it went or stayed, as a clause.
    :param allocated: bytes on disk that it took.
    :param blocked_by: hosts that did not look at it for a whole pass, and so keep it in the trash.
    """

    name: str
    gone: bool
    reason: str
    allocated: int = 0
    blocked_by: tuple[HostRef, ...] = ()


def evict(
    victims: Iterable[Decision],
    read: Reading,
    cache: CacheStore,
    hosts: Hosts,
    observers: events.Observers,
    *,
    locked: bool = False,
    only: Collection[str] | None = None,
    remove: bool = True,
) -> list[Outcome]:
    """Remove the victims of a plan that nobody needs after all, and what older passes left in the trash.

    One base that cannot be removed stops no other.

    :param read: reads all references anew; called once, after the renames.
    :param locked: the caller holds the victims' locks.
    :param only: leave everything else in the trash alone.
    :param remove: False: whatever is in the trash gets its name back.
    """
    outcomes = []
    reasons = {}
    for victim in victims:
        name = victim.entry.name
        try:
            entry = _move_in(name, cache, hosts, locked=locked)
        except OSError as error:
            outcomes.append(Outcome(name, False, f"it cannot be removed: {error.strerror}"))
            continue
        except errors.BackendError as error:
            outcomes.append(Outcome(name, False, f"it cannot be locked: {error}"))
            continue
        if isinstance(entry, trash.TrashEntry):
            cache.host.trace(TracePoint.EVICT_RENAMED)
            reasons[entry.id] = victim.reason
        elif entry is not None:
            outcomes.append(Outcome(name, False, entry))
    found = [each for each in trash.find(cache) if only is None or each.name in only]
    return outcomes + _empty(found, read, cache, hosts, observers, reasons, remove=remove)


def _move_in(name: str, cache: CacheStore, hosts: Hosts, *, locked: bool) -> trash.TrashEntry | str | None:
    """Rename a base into the trash. Text: why it stays. None: it is gone already."""
    with contextlib.ExitStack() as stack:
        if not locked:
            lock = locks.without_waiting(cache.layout.lock(name), host=cache.host)
            if not stack.enter_context(lock):
                return LEASED
        entry = trash.move_in(cache, name, mark=hosts.mark)
    if entry is None and os.path.lexists(cache.layout.base(name)):
        return "leased: it is being published now"
    return entry


def _empty(
    found: Sequence[trash.TrashEntry],
    read: Reading,
    cache: CacheStore,
    hosts: Hosts,
    observers: events.Observers,
    reasons: Mapping[str, str],
    *,
    remove: bool,
) -> list[Outcome]:
    """Put back or unlink what lies in the trash, by references that are read now."""
    if not found:
        return []
    references = read({entry.name for entry in found})
    cache.host.trace(TracePoint.EVICT_READ)
    stays = None if remove else "remove_unused_base_images is off"
    needed = {
        entry.id: reason
        for entry in found
        if (reason := who_needs(entry, references, cache) or stays) is not None
    }
    unneeded = [entry.id for entry in found if entry.id not in needed]
    try:
        hosts.acknowledge(unneeded, revoked=needed, among=trash.find(cache))
    except OSError as error:
        # On a full filesystem nothing can be written, and what all cleared before is what can go.
        LOG.warning("The other hosts cannot be told what is not needed here: %s", error)
    others = hosts.all()
    outcomes = []
    for entry in found:
        try:
            if entry.id in needed:
                outcomes.append(_put_back(entry, needed[entry.id], cache))
            else:
                waiting = hosts.pending_acks(entry.id, others)
                outcomes.append(_unlink(entry, reasons, waiting, cache, observers))
        except FileNotFoundError:
            continue  # somebody else put it back, or unlinked it
        except OSError as error:
            why = f"in the trash, and cannot be moved: {error.strerror}"
            outcomes.append(Outcome(entry.name, False, why))
    return outcomes


def who_needs(entry: trash.TrashEntry, references: References, cache: CacheStore) -> str | None:
    """Return who needs a file in the trash, as a clause. None: nobody does."""
    if trash.is_restored(cache, entry):
        return "somebody who wanted it linked it back"
    if (user := references.users.get(entry.name)) is not None:
        return user
    if references.unknown is not None:
        return references.unknown
    with contextlib.suppress(FileNotFoundError):
        if os.stat(entry.path, follow_symlinks=False).st_nlink > 1:
            return "another hard link refers to it"
    return None


def _put_back(entry: trash.TrashEntry, reason: str, cache: CacheStore) -> Outcome:
    if trash.restore(cache, entry):
        return Outcome(entry.name, False, f"put back: {reason}")
    return Outcome(entry.name, False, f"kept in the trash, since its name is taken by another file: {reason}")


def _unlink(
    entry: trash.TrashEntry,
    reasons: Mapping[str, str],
    waiting: Sequence[HostRef],
    cache: CacheStore,
    observers: events.Observers,
) -> Outcome:
    allocated = os.stat(entry.path, follow_symlinks=False).st_blocks * 512
    if waiting:
        names = ", ".join(host.name for host in waiting)
        # A host that had a whole pass to look and did not may be lost.
        silent = () if entry.id in reasons else tuple(waiting)
        return Outcome(
            entry.name, False, f"in the trash until these hosts have looked too: {names}", allocated, silent
        )
    cache.host.trace(TracePoint.EVICT_UNLINK)
    trash.unlink(cache, entry)
    reason = reasons.get(entry.id, LEFT)
    observers(events.Evicted(entry.name, reason=reason, allocated=allocated))
    return Outcome(entry.name, True, reason, allocated)


def put_back_own(cache: CacheStore, hosts: Hosts) -> list[str]:
    """Put back what this host renamed away and had not cleared when it was killed. Returns the names.

    A guest whose base lies in the trash cannot start. References are read again by the next pass.
    """
    cleared = hosts.own().cleared
    return [
        entry.name
        for entry in trash.find(cache)
        if entry.id.rpartition(".")[2].startswith(hosts.mark)
        and entry.id not in cleared
        and trash.restore(cache, entry)
    ]


def sweep_foreign_stages(
    cache: CacheStore, observers: events.Observers, names: Iterable[str], *, now: float
) -> None:
    """Remove what a crash of Nova left half-fetched: its lock is free, and nobody wrote for a day."""
    for name in names:
        base = name.removesuffix(".part").removesuffix(".converted")
        path = cache.layout.base(name)
        # What cannot be locked or removed now is, in a later pass.
        with contextlib.suppress(OSError, errors.BackendError), contextlib.ExitStack() as stack:
            if not stack.enter_context(locks.without_waiting(cache.layout.lock(base), host=cache.host)):
                continue
            found = os.stat(path, follow_symlinks=False)
            if now - found.st_mtime >= cache.config.foreign_stage_idle_seconds and found.st_nlink == 1:
                os.unlink(path)
                observers(events.Recovered(name, what="removed, a leftover of an interrupted fetch"))
