# SPDX-License-Identifier: Apache-2.0
"""What a crash left behind: publications to finish, stage files whose owner is dead, small leftovers."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Container, Iterable

from imagecache_lib import errors, events
from imagecache_lib.store import disk_roots, history, layout, pins, publish, stage, trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import atomic_file, durable, holders, locks
from imagecache_lib.system.descriptor import Descriptor

LOG = logging.getLogger(__name__)

#: A time that lies ahead by more seconds than this was noted by a wrong clock.
_AHEAD = 300

#: What an NFS client renames a file to that is unlinked while it is open.
_SILLY = re.compile(r"\.nfs[0-9a-f]+")

_STAGE = re.compile(r"[0-9a-f]{32}")
_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LEFTOVER = re.compile(r"clock\.[0-9a-f]{32}|.+\.[0-9a-f]{32}\.new|.+\.failed|.+\.waits")


def recover(cache: CacheStore, observers: events.Observers) -> None:
    """Repair what can be repaired without knowing the references of any host.

    Harmless beside any number of other processes. What lies in the trash needs references, and is left to the
    next pass, and to the next request for it.
    """
    now = cache.filesystem_now()
    for path in stage.unreadable(cache):
        LOG.warning(
            "%s cannot be read. Nothing is evicted until it goes; make it readable, or remove it", path
        )
    unfinished = _finish_publications(cache, observers)
    _sweep_stages(cache, observers, now, unfinished=unfinished)
    _sweep_leftovers(cache, now)
    pins.sweep(cache, now=now)
    _sweep_records(cache, now)
    _sweep_outside(cache, observers, now)
    _sweep_silly(cache, now)
    trash.sweep(cache, now=now)
    history.sweep(cache, now=now)


def _finish_publications(cache: CacheStore, observers: events.Observers) -> set[str]:
    """Write the records that are missing. Returns the stages whose evidence has no other place yet."""
    unfinished = set()
    for stage_id, note in list(stage.iter_stages(cache)):
        if note.record is None or layout.classify(note.name) is layout.Kind.UNKNOWN:
            continue
        # What cannot be finished now, for lack of room say, is finished by the base's next user or next time.
        try:
            opened = cache.open_base(note.name)
            if opened is None:
                continue
            with contextlib.closing(opened):
                if cache.record_of(opened) is None and publish.finish(cache, opened) is not None:
                    image_id = note.record.image_id
                    observers(events.Recovered(note.name, image_id, what="its publication is finished"))
        except errors.CacheEntryError:
            continue
        except OSError:
            unfinished.add(stage_id)
    return unfinished


def _sweep_stages(
    cache: CacheStore, observers: events.Observers, now: float, *, unfinished: Container[str]
) -> None:
    """Remove stages whose owner is dead.

    :param unfinished: hold a base's only evidence. Not for ever: while they lie there, the base cannot be
        evicted, which may be what a full filesystem needs.
    """
    for entry in os.listdir(cache.layout.stages):
        stage_id = entry.partition(".")[0]
        if not _STAGE.fullmatch(stage_id) or entry.endswith(atomic_file.NOTE_SUFFIX):
            continue
        path = cache.layout.stage(stage_id)
        if entry != stage_id:
            # Its data went first: a crash of the sweep, or of a discard.
            if not os.path.lexists(path):
                _unlink_if_idle(os.path.join(cache.layout.stages, entry), cache, now)
        elif stage_id in unfinished and _is_recent(path, cache, now):
            continue
        elif sweep_if_dead(path, cache, now, stuck_after=cache.config.foreign_stage_idle_seconds):
            for beside in cache.layout.beside_stage(stage_id):
                with contextlib.suppress(OSError):
                    os.unlink(beside)
            observers(events.Recovered(stage_id, what="removed, a leftover of an interrupted fetch"))


def _is_recent(path: str, cache: CacheStore, now: float) -> bool:
    try:
        changed = os.stat(path, follow_symlinks=False).st_mtime
    except OSError:
        return True
    return now - changed < cache.config.foreign_stage_idle_seconds


def sweep_if_dead(
    path: str, cache: CacheStore, now: float, *, marked: bool = False, stuck_after: float = math.inf
) -> bool:
    """Unlink a file in flight whose owner is dead: its lock is free, and it was not touched for long.

    Both are asked for, since the owner may not have its lock yet, and since locks may not work at all. The
    lock is taken for the unlink, and the file checked to be still at its path. Returns whether the file was
    unlinked.

    :param marked: whether only a file that says of itself that it was made here may go.
    :param stuck_after: seconds without a touch after which it goes though its lock is held: its owner is
        stopped, or on a host that hangs, and makes it anew should it go on.
    """
    own = holders.try_own
    try:
        held = locks.HeldDescriptor(path, _OPEN | os.O_RDWR)
    except PermissionError:
        # It got its final name too before its owner died, and libvirt gave that file to QEMU's user. A lock
        # cannot be taken through a descriptor for reading; but whether a process holds one can be asked.
        own = _is_free
        try:
            held = locks.HeldDescriptor(path, _OPEN | os.O_RDONLY)
        except OSError:
            return False
    except OSError:
        return False
    fd = held.fd
    try:
        found = os.fstat(fd)
        if now - found.st_mtime < cache.config.stage_idle_seconds:
            _date_anew(path, found, cache, now)
            return False
        if cache.host.locking and not own(fd) and now - found.st_mtime < stuck_after:
            return False
        if marked and not atomic_file.is_made_here(fd, path):
            return False
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path, follow_symlinks=False), found):
                os.unlink(path)
                return True
        return False
    finally:
        held.close()


def _is_free(fd: int) -> bool:
    return not holders.has_owner(fd)


def _sweep_leftovers(cache: CacheStore, now: float) -> None:
    """Remove small files that were being written when their writer died, and that nobody waits for."""
    where = cache.layout
    of_pins = [where.pins_of(name) for name in pins.names(cache)]
    for directory in (where.private, where.records, where.stages, where.hosts, where.pins, *of_pins):
        for entry in _entries(directory):
            if _LEFTOVER.fullmatch(entry):
                _unlink_if_idle(os.path.join(directory, entry), cache, now)


def _entries(directory: str) -> list[str]:
    """Return the names in a directory: none if it is not there, as where only an earlier release has pins, or
    cannot be listed: what lies in it stays then."""
    try:
        return os.listdir(directory)
    except OSError as error:
        LOG.debug("Leftovers in %s are not looked for: %s", directory, error.strerror)
        return []


def _sweep_records(cache: CacheStore, now: float) -> None:
    """Remove what lies beside bases that are gone: an evictor died in between, or Nova evicted."""
    kept = {entry.name for entry in trash.find(cache)}
    for entry in os.listdir(cache.layout.records):
        name, _, kind = entry.rpartition(".")
        known = kind in ("json", "sums", "pieces") and layout.classify(name) is not layout.Kind.UNKNOWN
        if known and name not in kept and not os.path.lexists(cache.layout.base(name)):
            _unlink_if_idle(os.path.join(cache.layout.records, entry), cache, now)


def _unlink_if_idle(path: str, cache: CacheStore, now: float) -> None:
    with contextlib.suppress(OSError):
        found = os.stat(path, follow_symlinks=False)
        if now - found.st_mtime >= cache.config.stage_idle_seconds:
            os.unlink(path)
        else:
            _date_anew(path, found, cache, now)


def _date_anew(path: str, found: os.stat_result, cache: CacheStore, now: float) -> None:
    """Let the age of a leftover count from now if a wrong clock dated it ahead: it would stay till then.

    Its owner, should it live after all, dates it itself with each write.
    """
    if found.st_mtime > now + max(cache.config.stage_idle_seconds, _AHEAD):
        with contextlib.suppress(OSError):
            os.utime(path, (now, now), follow_symlinks=False)


def sweep_unfinished_disks(
    cache: CacheStore, observers: events.Observers, paths: Iterable[str], *, now: float
) -> None:
    """Remove disks in the making whose maker is dead.

    :param paths: where such files were seen.
    """
    for path in paths:
        made = atomic_file.UNFINISHED.fullmatch(os.path.basename(path))
        # Below a root the name is this library's own. Behind a link any program's files may lie.
        foreign = not disk_roots.is_below_roots(path, cache.config)
        if made is not None and sweep_if_dead(path, cache, now, marked=foreign):
            observers(events.Recovered(made["target"], what="an unfinished disk is removed"))


def _sweep_outside(cache: CacheStore, observers: events.Observers, now: float) -> None:
    """Remove files in the making outside of all disk roots, of which notes in the stage directory tell."""
    for entry in os.listdir(cache.layout.stages):
        if not entry.endswith(atomic_file.NOTE_SUFFIX):
            continue
        note = os.path.join(cache.layout.stages, entry)
        with contextlib.suppress(OSError):
            data = durable.read_file(note)
            path = os.fsdecode(data or b"")
            named = os.path.basename(path).endswith(f".{entry.removesuffix(atomic_file.NOTE_SUFFIX)}.new")
            if os.path.isabs(path) and named:
                if not cache.elsewhere.call(lambda path=path: os.path.lexists(path)):  # type: ignore[misc]
                    continue  # it is on a mount that does not answer
                if sweep_if_dead(path, cache, now):
                    observers(events.Recovered(os.path.basename(path), what="an unfinished file is removed"))
                # A directory that is not there now may be on a filesystem that is not mounted.
                if os.path.lexists(path) or not os.path.isdir(os.path.dirname(path)):
                    continue
            _unlink_if_idle(note, cache, now)


def _sweep_silly(cache: CacheStore, now: float) -> None:
    """Remove what an NFS client left that died while a file was open there which had been unlinked.

    Such a file is not removed by its age alone: a guest on another host may have it open. A day after the
    last change it goes, unless a process, QEMU included, holds a lock on it.
    """
    places = [cache.layout.stages, *(entry.directory for entry in trash.entries(cache))]
    for directory in places:
        with contextlib.suppress(OSError):
            for entry in os.listdir(directory):
                if _SILLY.fullmatch(entry):
                    _unlink_silly(os.path.join(directory, entry), directory, cache, now)


def _unlink_silly(path: str, directory: str, cache: CacheStore, now: float) -> None:
    # A base keeps its own time of change in the trash: its directory tells when it was unlinked.
    dated = path if directory == cache.layout.stages else directory
    if now - os.stat(dated, follow_symlinks=False).st_mtime < cache.config.foreign_stage_idle_seconds:
        return
    with Descriptor(path, _OPEN | os.O_RDONLY) as fd:
        if not (cache.host.locking and locks.is_locked(fd)):
            os.unlink(path)
