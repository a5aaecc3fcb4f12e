# SPDX-License-Identifier: Apache-2.0
"""Carrying a plan out: rename into the trash, read all references again, and only then unlink.

The second reading is what makes eviction safe without locks. A spawn makes its overlay and then looks
whether its base still has its name; an evictor takes the name and then looks whether there are overlays.
Whichever comes second sees the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterable

from imagecache_lib import events, store, trash
from imagecache_lib.spawn import locks
from imagecache_lib.spawn import stage as stages
from imagecache_lib.upkeep.hosts import Hosts
from imagecache_lib.upkeep.policy import Decision
from imagecache_lib.upkeep.references import References

#: Reads all references to these names.
Reading = Callable[[Collection[str]], References]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a base that was to go.

    :param name: the base.
    :param gone: it was unlinked.
    :param reason: why it went or stayed, as a clause.
    :param allocated: bytes on disk that it took.
    """

    name: str
    gone: bool
    reason: str
    allocated: int = 0


def evict(
    victims: Iterable[Decision],
    read: Reading,
    cache: store.CacheStore,
    hosts: Hosts,
    observers: events.Observers,
    *,
    locked: bool = False,
) -> list[Outcome]:
    """Remove the victims of a plan that nobody needs after all, and what older passes left in the trash.

    :param read: reads all references anew; called once, after the renames.
    :param locked: the caller holds the victims' locks.
    """
    outcomes = []
    reasons = {}
    for victim in victims:
        name = victim.entry.name
        with contextlib.ExitStack() as stack:
            lock = locks.without_waiting(cache.layout.lock(name), host=cache.host)
            if not locked and not stack.enter_context(lock):
                outcomes.append(Outcome(name, False, "leased: it is being used or fetched now"))
                continue
            with stages.translated(cache.layout.base(name)):
                thrown = trash.throw(cache, name)
        cache.host.trace("evict:renamed")
        if thrown is not None:
            reasons[thrown.entry] = victim.reason
    return outcomes + empty_trash(read, cache, hosts, observers, reasons)


def empty_trash(
    read: Reading,
    cache: store.CacheStore,
    hosts: Hosts,
    observers: events.Observers,
    reasons: dict[str, str] | None = None,
) -> list[Outcome]:
    """Link back or unlink everything in the trash, by references that are read now."""
    found = trash.find(cache)
    if not found:
        return []
    references = read({thrown.name for thrown in found})
    cache.host.trace("evict:read")
    needed = {thrown.entry: reason for thrown in found if (reason := _needed(thrown, references, cache))}
    _clear(hosts, [thrown.entry for thrown in found if thrown.entry not in needed])
    reasons = reasons or {}
    outcomes = []
    for thrown in found:
        with contextlib.suppress(FileNotFoundError), stages.translated(thrown.path):
            if thrown.entry in needed:
                outcomes.append(_put_back(thrown, needed[thrown.entry], cache))
            else:
                why = reasons.get(thrown.entry, "left in the trash, and nobody needs it")
                outcomes.append(_unlink(thrown, why, cache, hosts, observers))
    return outcomes


def _needed(thrown: trash.Trashed, references: References, cache: store.CacheStore) -> str | None:
    if trash.is_restored(cache, thrown):
        return "somebody who wanted it linked it back"
    if (user := references.users.get(thrown.name)) is not None:
        return user
    if references.unknown is not None:
        return references.unknown
    with contextlib.suppress(FileNotFoundError):
        if os.stat(thrown.path, follow_symlinks=False).st_nlink > 1:
            return "another hard link refers to it"
    return None


def _put_back(thrown: trash.Trashed, reason: str, cache: store.CacheStore) -> Outcome:
    if trash.restore(cache, thrown):
        return Outcome(thrown.name, False, f"put back: {reason}")
    return Outcome(
        thrown.name, False, f"kept in the trash, since its name is taken by another file: {reason}"
    )


def _clear(hosts: Hosts, entries: list[str]) -> None:
    """Say that nothing here refers to these entries, which were in the trash before the references were read."""
    own = hosts.own()
    if frozenset(entries) != own.cleared:
        hosts.write(dataclasses.replace(own, cleared=frozenset(entries)))


def _unlink(
    thrown: trash.Trashed, reason: str, cache: store.CacheStore, hosts: Hosts, observers: events.Observers
) -> Outcome:
    if waiting_for := hosts.not_cleared_by(thrown.entry):
        return Outcome(
            thrown.name, False, f"in the trash until these hosts have looked too: {', '.join(waiting_for)}"
        )
    cache.host.trace("evict:unlink")
    allocated = os.stat(thrown.path, follow_symlinks=False).st_blocks * 512
    trash.unlink(cache, thrown)
    observers(events.Evicted(thrown.name, reason=reason, allocated=allocated))
    return Outcome(thrown.name, True, reason, allocated)


def sweep_foreign_stages(
    cache: store.CacheStore, observers: events.Observers, names: Iterable[str], *, now: float
) -> None:
    """Remove what a crash of Nova left half-fetched: its lock is free, and nobody wrote for a day."""
    for name in names:
        base = name.removesuffix(".part").removesuffix(".converted")
        path = cache.layout.base(name)
        with locks.without_waiting(cache.layout.lock(base), host=cache.host) as got:
            if not got:
                continue
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(path, follow_symlinks=False)
                if now - found.st_mtime >= cache.config.foreign_stage_idle_seconds and found.st_nlink == 1:
                    os.unlink(path)
                    observers(events.Recovered(name, what="removed, a leftover of an interrupted fetch"))
