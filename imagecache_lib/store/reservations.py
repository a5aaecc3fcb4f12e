# SPDX-License-Identifier: Apache-2.0
"""The space ledger: what is in flight never promises more of the filesystem than it has.

Each stage note says how many bytes its owner will need in all; what it has allocated already is the
filesystem's to count. The ledger is the sum over the notes whose owner is alive, so it lapses by itself.
"""

from __future__ import annotations

import contextlib
import os

from imagecache_lib import dates, errors
from imagecache_lib.store import stage as stages
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.evictor import Evictor
from imagecache_lib.store.stage import Stage
from imagecache_lib.system import holders, locks
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

#: Lock under which the ledger is read and added to.
LOCK = "imagecache-space"

#: Lock under which room is made: of several that lack it, each evicts only what the others left it short of.
ROOM_LOCK = "imagecache-room"

#: What a fetch takes beside its data: notes, record, checksums, and the filesystem's own maps of them.
ALLOWANCE = 128 * 1024

#: How often one that waits for room looks again, in seconds.
_SLICE = 0.5

#: How many slices the blocks of evicted bases may take to become free.
_LATE_TURNS = 3

#: Of what evicted files had allocated, one part in so many has to become free, or eviction ends: a record and
#: checksums are freed with a base that shares all its blocks.
_LEAST_SHARE = 4


def outstanding(cache: CacheStore) -> int:
    """Return the bytes that living owners have reserved and not yet allocated."""
    return sum(_living(cache))


def _living(cache: CacheStore) -> list[int]:
    """Return the bytes that each living owner has reserved and not yet allocated."""
    owed = (
        _owed(cache, stage_id, note.reserved) for stage_id, note in stages.iter_stages(cache) if note.reserved
    )
    return [each for each in owed if each is not None]


def _owed(cache: CacheStore, stage_id: str, reserved: int) -> int | None:
    """Return the bytes that a stage has reserved and not yet allocated, or None if its owner is dead."""
    try:
        stage = Descriptor(cache.layout.stage(stage_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with stage as fd:
        found = os.fstat(fd)
        alive = holders.has_owner(fd) if cache.host.locking else None
        if alive is None:
            # Its owner has no working locks either, and only time tells that it is dead.
            alive = cache.host.clock() - found.st_mtime < cache.config.stage_idle_seconds
    return max(0, reserved - found.st_blocks * 512) if alive else None


def free(cache: CacheStore) -> int:
    """Return the bytes of the cache's filesystem that an unprivileged process may still allocate."""
    found = os.statvfs(cache.layout.base_path)
    return found.f_bavail * found.f_frsize


class Reservation:
    """What one stage file may take of the filesystem.

    :param stage: whose note says how much is reserved.
    :param evictor: asked to evict what is short.
    :param waiter: until its deadline it is worth waiting for others in flight to end.
    """

    def __init__(self, stage: Stage, cache: CacheStore, evictor: Evictor, waiter: Waiter) -> None:
        self._stage = stage
        self._cache = cache
        self._evictor = evictor
        self._waiter = waiter

    def of(self, stage: Stage) -> Reservation:
        """Return the reservation of another stage file of the same caller."""
        return Reservation(stage, self._cache, self._evictor, self._waiter)

    @property
    def reserved(self) -> int:
        """Bytes that the stage has reserved in all."""
        return self._stage.reserved

    def raise_to(self, needed: int) -> None:
        """Raise what the stage has reserved to ``needed`` bytes in all. Lowering it does nothing.

        :raises NoSpaceError: the filesystem has less than that left, what others have reserved counted in.
        :raises CancelledError, LockTimeoutError: the caller no longer waits.
        """
        cache, deadline = self._cache, self._waiter.deadline
        while needed > self._stage.reserved:
            refusal = self._try(needed)
            if refusal is None or (refusal := self._try_harder(needed)) is None:
                return
            now = cache.host.clock()
            if deadline is None or now >= deadline or not refusal.others:
                raise refusal.error(cache)
            self._waiter.check()
            cache.host.trace(TracePoint.SPACE_WAITING)
            cache.host.sleep(min(_SLICE, deadline - now))

    def fits(self, needed: int) -> bool:
        """Raise what the stage has reserved to ``needed`` bytes in all if there is room without an eviction.

        Returns whether there is.

        :raises CancelledError, LockTimeoutError: the caller no longer waits.
        """
        return needed <= self._stage.reserved or self._try(needed) is None

    def _try_harder(self, needed: int) -> _Refusal | None:
        """Have room made and try again, one caller after another.

        Returns why there is no room, or None once the bytes are reserved.
        """
        with self._locked(ROOM_LOCK):
            # The process that held this lock before may have freed more than it took.
            refusal = self._try(needed)
            while refusal is not None and (freed := self._evictor.make_room(refusal.short)) > 0:
                enough = refusal.short - freed // _LEAST_SHARE
                refusal = self._try_after_eviction(needed, enough)
                # What evicted files share with snapshots stays allocated, however many are evicted.
                if refusal is not None and refusal.short > enough:
                    break
            return refusal

    def _try_after_eviction(self, needed: int, enough: int) -> _Refusal | None:
        """Try again, for a moment until an eviction shows: XFS frees the blocks after unlink(2) returned.

        :param enough: bytes that are lacking at most once it shows.
        """
        for _turn in range(_LATE_TURNS):
            refusal = self._try(needed)
            if refusal is None or refusal.short <= enough:
                return refusal
            self._waiter.check()
            self._cache.host.sleep(_SLICE)
        return self._try(needed)

    def _try(self, needed: int) -> _Refusal | None:
        stage, cache = self._stage, self._cache
        with self._locked(LOCK), translated(cache.layout.stages):
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

    def _locked(self, name: str) -> contextlib.AbstractContextManager[bool]:
        return locks.waiting(
            self._cache.layout.lock(name),
            shared=False,
            host=self._cache.host,
            stall_timeout=self._cache.config.lock_timeout,
            waiter=self._waiter,
            needed=False,
        )


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
            f"it needs {dates.size(self._wanted)} more and {dates.size(self._room)} are left",
            path=cache.layout.base_path,
            next_step="make room with imagecache prune, or choose a larger filesystem",
        )
