# SPDX-License-Identifier: Apache-2.0
"""The space ledger: what is in flight never promises more of the filesystem than it has.

Each stage note says how many bytes its owner will need in all; what it has allocated already is the
filesystem's to count. The ledger is the sum over the notes whose owner is alive, so it lapses by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from imagecache_lib import errors
from imagecache_lib.store import stage as stages
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.stage import Stage
from imagecache_lib.system import locks
from imagecache_lib.system.trace import TracePoint

#: Lock under which the ledger is read and added to.
LOCK = "imagecache-space"

#: Lock under which room is made: of several that lack it, each evicts only what the others left it short of.
ROOM_LOCK = "imagecache-room"

#: What a fetch takes beside its data: notes, record, checksums, and the filesystem's own maps of them.
ALLOWANCE = 128 * 1024

#: How often one that waits for room looks again, in seconds.
_SLICE = 0.5

#: Frees at least so many bytes if that may be, and returns how many it freed.
MakeRoom = Callable[[int], int]


def nothing_to_free(_wanted: int) -> int:
    """Make no room."""
    return 0


def outstanding(cache: CacheStore) -> int:
    """Return the bytes that living owners have reserved and not yet allocated."""
    return sum(_living(cache))


def _living(cache: CacheStore) -> list[int]:
    """Return what each living owner has reserved and not yet allocated."""
    owed = (
        _owed(cache, stage_id, note.reserved) for stage_id, note in stages.iter_stages(cache) if note.reserved
    )
    return [each for each in owed if each is not None]


def _owed(cache: CacheStore, stage_id: str, reserved: int) -> int | None:
    """Return what a stage has reserved and not yet allocated. None: its owner is dead."""
    try:
        fd = os.open(cache.layout.stage(stage_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        alive = locks.has_owner(fd) if cache.host.locking else None
        if alive is None:
            # Its owner has no working locks either, and only time tells that it is dead.
            alive = cache.host.clock() - found.st_mtime < cache.config.stage_idle_seconds
    finally:
        os.close(fd)
    return max(0, reserved - found.st_blocks * 512) if alive else None


def free(cache: CacheStore) -> int:
    """Return the bytes of the cache's filesystem that an unprivileged process may still allocate."""
    found = os.statvfs(cache.layout.base_path)
    return found.f_bavail * found.f_frsize


def reserve(
    stage: Stage,
    needed: int,
    cache: CacheStore,
    *,
    check: Callable[[], None],
    make_room: MakeRoom = nothing_to_free,
    deadline: float | None = None,
) -> None:
    """Raise what a stage has reserved to ``needed`` bytes in all. Lowering it does nothing.

    :param make_room: asked to evict what is short.
    :param deadline: epoch seconds until which it is worth waiting for others in flight to end.
    :raises NoSpaceError: the filesystem has less than that left, what others have reserved counted in.
    """
    while needed > stage.reserved:
        refusal = _try(stage, needed, cache, check)
        if refusal is None or (refusal := _try_harder(stage, needed, cache, check, make_room)) is None:
            return
        now = cache.host.clock()
        if deadline is None or now >= deadline or not refusal.others:
            raise refusal.error(cache)
        check()
        cache.host.trace(TracePoint.SPACE_WAITING)
        cache.host.sleep(min(_SLICE, deadline - now))


class _Refusal:
    """There is no room.

    :ivar short: bytes that are lacking.
    :ivar others: bytes that others have reserved, and may give back.
    """

    def __init__(self, wanted: int, room: int, others: int) -> None:
        self._wanted = wanted
        self._room = max(0, room)
        self.short = wanted - room
        self.others = others

    def error(self, cache: CacheStore) -> errors.NoSpaceError:
        return errors.NoSpaceError(
            f"it needs {self._wanted} bytes more and {self._room} are left",
            path=cache.layout.base_path,
            next_step="make room, evict images, or choose a larger filesystem",
        )


def _try_harder(
    stage: Stage,
    needed: int,
    cache: CacheStore,
    check: Callable[[], None],
    make_room: MakeRoom,
) -> _Refusal | None:
    """Have room made and try again, one after another. None: it is reserved."""
    with locks.waiting(
        cache.layout.lock(ROOM_LOCK),
        shared=False,
        host=cache.host,
        patience=cache.config.lock_timeout,
        check=check,
    ):
        while True:
            # Whoever held this lock before may have freed more than it took.
            refusal = _try(stage, needed, cache, check)
            if refusal is None or make_room(refusal.short) <= 0:
                return refusal


def _try(stage: Stage, needed: int, cache: CacheStore, check: Callable[[], None]) -> _Refusal | None:
    with locks.waiting(
        cache.layout.lock(LOCK),
        shared=False,
        host=cache.host,
        patience=cache.config.lock_timeout,
        check=check,
    ):
        living = _living(cache)
        ours = max(0, stage.reserved - stage.allocated)
        others = sum(living) - ours
        allowance = ALLOWANCE * (len(living) + (stage.reserved == 0))
        room = free(cache) - others - allowance - cache.config.free_space_low
        wanted = needed - stage.allocated
        if wanted > room:
            return _Refusal(wanted, room, others)
        stage.reserved = needed
        stage.write_info()
        return None
