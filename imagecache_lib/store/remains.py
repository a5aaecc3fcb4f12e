# SPDX-License-Identifier: Apache-2.0
"""What is left of a download that broke off: its source's bytes, as far as they came, for the next one.

Such bytes lie in a stage file (:mod:`imagecache_lib.store.stage`) whose owner is dead and whose note says of
which data they are. Who takes them over owns the file from then on. They prove nothing: the digest of the
whole is computed from the first byte on, as of any other data. Remains that nobody takes over are swept as
all stage files are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from imagecache_lib.store import stage as stages
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.stage import StageInfo
from imagecache_lib.system import durable, holders, locks
from imagecache_lib.system.maker import Maker

_CHUNK = 2**20


class Remains:
    """The first bytes of an image's data, in a file that this process owns now.

    :ivar id: of the stage file.
    :ivar length: how many bytes there are.
    """

    def __init__(self, cache: CacheStore, stage_id: str, owner: holders.OwnerLock) -> None:
        self._cache = cache
        self._maker = Maker()
        self.id = stage_id
        self.owner = owner
        self.length = os.fstat(owner.fd).st_size

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in order. They end early where the disk cannot read them."""
        offset = 0
        while offset < self.length:
            try:
                data = os.pread(self.owner.fd, min(_CHUNK, self.length - offset), offset)
            except OSError:
                return
            if not data:
                return
            offset += len(data)
            yield data

    def remove(self) -> None:
        """Remove the file. A forked child leaves it to its parent."""
        if not self._maker.is_here:
            return
        where = self._cache.layout
        for path in (*where.beside_stage(self.id), where.stage(self.id)):
            with contextlib.suppress(OSError):
                os.unlink(path)
        self.leave()

    def leave(self) -> None:
        """Leave the file where it is, for another process or until it is swept."""
        with contextlib.suppress(OSError):
            self.owner.close()


def find(cache: CacheStore, name: str, source: str) -> Remains | None:
    """Take over what is left of downloads of a base's data: the longest one. The others are removed.

    :param source: of the data, as :class:`~imagecache_lib.store.stage.StageInfo` has it; empty for data of
        which nothing is ever left.
    """
    # Where locks do not work, only time tells that an owner is dead.
    if not source or not cache.host.locking:
        return None
    notes = [
        (stage_id, note)
        for stage_id, note in stages.iter_stages(cache)
        if (note.name, note.source) == (name, source)
    ]
    found = [
        remains for stage_id, note in notes if (remains := _take_over(cache, stage_id, note)) is not None
    ]
    found.sort(key=lambda each: each.length)
    for shorter in found[:-1]:
        shorter.remove()
    return found[-1] if found else None


def _take_over(cache: CacheStore, stage_id: str, note: StageInfo) -> Remains | None:
    """Own a stage file whose owner is dead. Returns None if its owner lives, or it is gone or empty."""
    path = cache.layout.stage(stage_id)
    try:
        held = locks.HeldDescriptor(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    owner = None
    try:
        # On a filesystem without locks the answer is neither yes nor no.
        if holders.has_owner(held.fd) is False and holders.try_own(held.fd):
            seen = os.fstat(held.fd)
            # It may have been swept meanwhile, or be a base already whose record is still to be written.
            if seen.st_size and seen.st_nlink == 1 and os.path.samestat(os.stat(path), seen):
                # What it lacked is no longer coming: who takes it over reserves for that.
                freed = StageInfo(note.name, origin=note.origin, source=note.source)
                durable.write_file(cache.layout.stage_record(stage_id), freed.to_json(), sync=False)
                owner = holders.OwnerLock(held, cache.host)
                return Remains(cache, stage_id, owner)
    except OSError:
        return None
    finally:
        if owner is None:
            held.close()
    return None
