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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from imagecache_lib import errors, events
from imagecache_lib.store import stage, trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import HostRef, Hosts
from imagecache_lib.store.membership import HostFile
from imagecache_lib.system import locks
from imagecache_lib.system.maker import Maker
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.upkeep import members, policy
from imagecache_lib.upkeep.outcomes import Evicted, Kept
from imagecache_lib.upkeep.policy import Decided, Decision, Fate, InTrash, TrashDecision
from imagecache_lib.upkeep.references import LEASED, ReferenceReader, is_leased

LOG = logging.getLogger(__name__)

#: Why a base stays that a process is about to publish.
PUBLISHED_NOW = "leased: it is being published now"

#: Lock that an evictor of a host shares for as long as a base may lie in the trash only because of it.
_LOCK = "imagecache-evict-{mark}"

#: How long an evictor waits for a start of the same host that looks for leftovers, in seconds.
_PATIENCE = 1.0


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


def foresee(decided: Decided, others: tuple[HostRef, ...]) -> list[Outcome]:
    """Return the outcomes that :func:`evict` has if nothing happens meanwhile.

    :param others: the other hosts, which have to look at what is renamed away now.
    """
    outcomes = []
    for victim in decided.plan.victims:
        name, allocated = victim.entry.name, victim.entry.allocated
        if others:
            outcomes.append(Outcome(name, False, policy.until(others), allocated))
        else:
            outcomes.append(Outcome(name, True, victim.reason, allocated))
    for decision in decided.trash:
        outcomes.append(_outcome(decision, {}))
    return outcomes


def _outcome(decision: TrashDecision, reasons: Mapping[str, str]) -> Outcome:
    """Return what becomes of a base in the trash once its decision is carried out.

    :param reasons: why those were renamed that this eviction renamed, by entry.
    """
    entry = decision.entry
    if decision.fate is Fate.PUT_BACK:
        return Outcome(entry.name, False, f"put back: {decision.reason}")
    if decision.fate is Fate.WAITS:
        # A host that had a whole pass to look and did not may be lost.
        silent = () if entry.id in reasons else entry.waiting
        return Outcome(entry.name, False, decision.reason, entry.allocated, silent)
    return Outcome(entry.name, True, reasons.get(entry.id, decision.reason), entry.allocated)


def evict(
    victims: Iterable[Decision],
    reader: ReferenceReader,
    cache: CacheStore,
    hosts: Hosts,
    observers: events.Observers,
    *,
    locked: bool = False,
    only: Collection[str] | None = None,
    remove: bool = True,
) -> list[Outcome]:
    """Remove the victims of a plan that nothing needs after all, and what older passes left in the trash.

    One base that cannot be removed stops no other. If anything ends this early, an interrupt included, what
    was renamed here is put back. Returns what became of each base.

    :param reader: reads all references anew, once, after the renames.
    :param locked: the caller holds the victims' locks.
    :param only: leave everything else in the trash alone.
    :param remove: False if whatever is in the trash gets its name back.
    """
    outcomes = []
    reasons = {}
    moved: list[trash.TrashEntry] = []
    maker = Maker()
    lock = cache.layout.lock(_LOCK.format(mark=hosts.mark))
    with locks.waiting(lock, shared=True, host=cache.host, stall_timeout=_PATIENCE, needed=False):
        try:
            for victim in victims:
                name = victim.entry.name
                went = _move_in(name, cache, hosts, moved, locked=locked)
                if isinstance(went, trash.TrashEntry):
                    cache.host.trace(TracePoint.EVICT_RENAMED)
                    observers(events.MovedToTrash(name, reason=victim.reason))
                    reasons[went.id] = victim.reason
                elif isinstance(went, Kept):
                    outcomes.append(Outcome(name, False, went.reason))
            found = [each for each in trash.find(cache) if only is None or each.name in only]
            return outcomes + _empty(found, reader, cache, hosts, observers, reasons, remove=remove)
        except BaseException:
            for entry in moved if maker.is_here else ():
                # A guest whose base lies in the trash cannot start. What cannot be put back now is, by the
                # next start or pass.
                with contextlib.suppress(OSError):
                    if trash.restore(cache, entry):
                        observers(events.Restored(entry.name, reason="its eviction ended early"))
            raise


def _move_in(
    name: str, cache: CacheStore, hosts: Hosts, moved: list[trash.TrashEntry], *, locked: bool
) -> trash.TrashEntry | Kept | Evicted:
    """Rename a base into the trash.

    :param moved: gets the entry.
    :returns: the entry; or why the base stays; or that another process evicted it.
    """
    try:
        with contextlib.ExitStack() as stack:
            if not locked:
                lock = locks.without_waiting(cache.layout.lock(name), host=cache.host)
                if not stack.enter_context(lock):
                    return Kept(LEASED)
            if is_leased(cache.layout.base(name)):
                return Kept(LEASED)
            entry = trash.move_in(cache, name, mark=hosts.mark)
            if entry is not None:
                moved.append(entry)
    except OSError as error:
        return Kept(f"it cannot be removed: {error.strerror}")
    except errors.BackendError as error:
        return Kept(f"it cannot be locked: {error}")
    if entry is not None:
        return entry
    if not os.path.lexists(cache.layout.base(name)):
        return Evicted()
    if name in trash.being_published(cache):
        return Kept(PUBLISHED_NOW)
    return in_flight(cache) or Kept(PUBLISHED_NOW)


def in_flight(cache: CacheStore) -> Kept | None:
    """Return why any base may be about to be published, or None if it is told which are."""
    paths = stage.unreadable(cache)
    if not paths:
        return None
    return Kept(
        f"it may be what is in flight, of which {paths[0]} cannot be read; make it readable, or remove it"
    )


def _empty(
    found: Sequence[trash.TrashEntry],
    reader: ReferenceReader,
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
    references = reader.read_again({entry.name for entry in found})
    cache.host.trace(TracePoint.EVICT_READ)
    judged = {
        entry.id: policy.decide_trash(described, references, remove=remove)
        for entry, described in describe(found, cache, {}, hosts)
    }
    needed = {id for id, decision in judged.items() if decision.fate is Fate.PUT_BACK}
    try:
        if len(members.of(cache, hosts)) > 1:
            hosts.acknowledge(judged.keys() - needed, revoked=needed, among=trash.find(cache))
    except OSError as error:
        # On a full filesystem nothing can be written, and what all acknowledged before is what can go.
        LOG.warning("The other hosts cannot be told what is not needed here: %s", error)
    outcomes = []
    for entry, described in describe(found, cache, members.of(cache, hosts), hosts):
        decision = judged.get(entry.id)
        if decision is None:
            continue
        if decision.fate is not Fate.PUT_BACK:
            decision = policy.decide_trash(described, references, remove=remove)
        with contextlib.suppress(FileNotFoundError):  # another process put it back, or unlinked it
            outcomes.append(_carry_out(entry, decision, reasons, cache, observers))
    return outcomes


def describe(
    found: Iterable[trash.TrashEntry],
    cache: CacheStore,
    registered: Mapping[str, HostFile | None],
    hosts: Hosts,
) -> Iterator[tuple[trash.TrashEntry, InTrash]]:
    """Yield what has to be known of entries of the trash to decide about them.

    One that is gone, or cannot be looked at, is left out.

    :param registered: the hosts that have to look, as :func:`members.of` returned them.
    """
    for entry in found:
        try:
            status = os.stat(entry.path, follow_symlinks=False)
        except OSError:
            continue  # it is gone, or cannot be looked at, and stays
        yield (
            entry,
            InTrash(
                entry.name,
                entry.id,
                allocated=status.st_blocks * 512,
                links=status.st_nlink,
                restored=trash.is_restored(cache, entry),
                waiting=tuple(hosts.pending_acks(entry.id, registered)),
            ),
        )


def _carry_out(
    entry: trash.TrashEntry,
    decision: TrashDecision,
    reasons: Mapping[str, str],
    cache: CacheStore,
    observers: events.Observers,
) -> Outcome:
    outcome = _outcome(decision, reasons)
    try:
        if decision.fate is Fate.PUT_BACK:
            if trash.restore(cache, entry):
                observers(events.Restored(entry.name, reason=decision.reason))
                return outcome
            taken = f"kept in the trash, since its name is taken by another file: {decision.reason}"
            return Outcome(entry.name, False, taken)
        if decision.fate is Fate.GOES:
            cache.host.trace(TracePoint.EVICT_UNLINK)
            trash.unlink(cache, entry)
            observers(events.Evicted(entry.name, reason=outcome.reason, allocated=outcome.allocated))
    except FileNotFoundError:
        raise
    except OSError as error:
        why = f"in the trash, and cannot be moved: {error.strerror}"
        return Outcome(entry.name, False, why)
    return outcome


def put_back_own(cache: CacheStore, hosts: Hosts) -> list[str]:
    """Put back what this host renamed away and had not cleared when it was killed. Returns the names.

    A guest whose base lies in the trash cannot start. References are read again by the next pass. While
    another process of this host evicts, what is in the trash is that one's.
    """
    lock = cache.layout.lock(_LOCK.format(mark=hosts.mark))
    with contextlib.ExitStack() as stack:
        try:
            alone = stack.enter_context(locks.without_waiting(lock, host=cache.host))
        except errors.BackendError as error:
            LOG.warning("What lies in the trash waits for the next pass: %s", error)
            return []
        if not alone:
            return []
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
    """Remove what a crash of Nova left half-fetched: its lock is free, and no process wrote it for a day."""
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
