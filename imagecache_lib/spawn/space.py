# SPDX-License-Identifier: Apache-2.0
"""The space ledger: what is in flight never promises more of the filesystem than it has.

Each stage note says how many bytes its owner will need in all; what it has allocated already is the
filesystem's to count. The ledger is the sum over the notes whose owner is alive, so it lapses by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from imagecache_lib import errors, store
from imagecache_lib.spawn import locks
from imagecache_lib.spawn import stage as stages

#: Lock under which the ledger is read and added to.
LOCK = "imagecache-space"


def outstanding(cache: store.CacheStore) -> int:
    """Return the bytes that living owners have reserved and not yet allocated."""
    return sum(
        _owed(cache, stage_id, note.reserved) for stage_id, note in stages.notes(cache) if note.reserved
    )


def _owed(cache: store.CacheStore, stage_id: str, reserved: int) -> int:
    try:
        fd = os.open(cache.layout.stage(stage_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        found = os.fstat(fd)
        # Its owner may have been without working locks; then only time tells that it is dead.
        fresh = cache.host.clock() - found.st_mtime < cache.config.stage_idle_seconds
        alive = locks.has_owner(fd) or (not cache.host.locking and fresh)
    finally:
        os.close(fd)
    return max(0, reserved - found.st_blocks * 512) if alive else 0


def free(cache: store.CacheStore) -> int:
    """Return the bytes of the cache's filesystem that an unprivileged process may still allocate."""
    found = os.statvfs(cache.layout.base_path)
    return found.f_bavail * found.f_frsize


def reserve(stage: stages.Stage, needed: int, cache: store.CacheStore, *, check: Callable[[], None]) -> None:
    """Raise what a stage has reserved to ``needed`` bytes in all. Lowering it does nothing.

    :raises NoSpaceError: the filesystem has less than that left, what others have reserved counted in.
    """
    if needed <= stage.reserved:
        return
    with locks.waiting(
        cache.layout.lock(LOCK),
        shared=False,
        host=cache.host,
        patience=cache.config.lock_timeout,
        check=check,
    ):
        ours = max(0, stage.reserved - stage.allocated)
        room = free(cache) - (outstanding(cache) - ours) - cache.config.free_space_low
        wanted = needed - stage.allocated
        if wanted > room:
            raise errors.NoSpaceError(
                f"it needs {wanted} bytes more and {max(0, room)} are left",
                path=cache.layout.base_path,
                next_step="make room, evict images, or choose a larger filesystem",
            )
        stage.reserved = needed
        stage.note()
