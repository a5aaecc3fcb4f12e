# SPDX-License-Identifier: Apache-2.0
"""A base's content as it lies on the disk: read past the page cache, and compared with what was written.

A bit that flipped on the disk, or a write that the disk lost, is invisible as long as the page cache holds
the right bytes, and every reader gets wrong bytes afterwards. What is read is compared with the checksums
that were taken of the data in flight (:mod:`imagecache_lib.store.checksums`), or with the source's digest.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import mmap
import os
from collections.abc import Iterator

from imagecache_lib import dates, model
from imagecache_lib.store import checksums
from imagecache_lib.store.directory import OpenBase
from imagecache_lib.system import sparse
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.rate import Pace

#: Read so much at once: a whole number of granules, and of every device's blocks.
_PIECE = 2**20

#: What O_DIRECT wants lengths to be a multiple of, on any device that ext4 and xfs run on.
_ALIGNMENT = 4096


@dataclasses.dataclass(frozen=True)
class Matches:
    """A base's content is what was written. ``how`` tells by what that is known, as a clause."""

    how: str


@dataclasses.dataclass(frozen=True)
class Differs:
    """A base's content is not what was written. ``how`` tells where it differs, as a clause."""

    how: str


class StoredContent:
    """A base's content as it lies on the disk.

    :ivar read: bytes that were read so far.
    """

    def __init__(self, opened: OpenBase, limit: Pace) -> None:
        self._limit = limit
        self._size = opened.stat.st_size
        self.read = 0
        # O_DIRECT wants memory that is aligned to the device's blocks, which whole pages are.
        self._buffer = mmap.mmap(-1, _PIECE)
        self._cached = opened.fd
        try:
            # The very file that is open, whatever has its name now.
            self._direct: Descriptor | None = Descriptor(
                f"/proc/self/fd/{opened.fd}", os.O_RDONLY | os.O_DIRECT
            )
        except OSError:
            self._direct = None  # tmpfs, some network filesystems, no /proc

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()

    def compare_with_sums(self, sums: checksums.Checksums) -> Matches | Differs:
        """Compare it with checksums of what was written."""
        now = checksums.Checksums()
        for offset, data in self._pieces():
            now.add(data, offset)
        wrong = now.differing(sums)
        if not wrong:
            return Matches("its checksums match")
        first = wrong[0] * checksums.GRANULE
        return Differs(
            f"{len(wrong)} of its granules of {dates.size(checksums.GRANULE)} are wrong, "
            f"the first at byte {first}"
        )

    def compare_with_digest(self, digest: model.Digest) -> Matches | Differs:
        """Compare it with the source's digest."""
        algorithm = digest.algorithm
        hashed = hashlib.new(algorithm, usedforsecurity=False)
        end = 0
        for offset, data in self._pieces():
            _hash_zeros(hashed, offset - end)
            hashed.update(data)
            end = offset + len(data)
        _hash_zeros(hashed, self._size - end)
        if hashed.hexdigest() == digest.value.lower():
            return Matches("its digest matches")
        return Differs(f"its {algorithm} is {hashed.hexdigest()}, the source's was {digest.value}")

    def _pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Yield everything that is no hole, by offset. The data is valid until the next piece."""
        for start, end in self._extents():
            offset = start
            while offset < end:
                count = self._read(offset, min(_PIECE, end - offset))
                self.read += count
                self._limit.took(count)
                yield offset, memoryview(self._buffer)[:count]
                offset += count

    def _extents(self) -> list[tuple[int, int]]:
        try:
            return list(sparse.data_extents(self._cached))
        except OSError as error:
            _require_second_try(error)
        return list(sparse.data_extents(self._cached))

    def _read(self, offset: int, length: int) -> int:
        try:
            return self._read_once(offset, length)
        except OSError as error:
            _require_second_try(error)
        return self._read_once(offset, length)

    def _read_once(self, offset: int, length: int) -> int:
        if self._direct is not None:
            whole = -(-length // _ALIGNMENT) * _ALIGNMENT
            try:
                with memoryview(self._buffer)[:whole] as room:
                    count = os.preadv(self._direct.fd, [room], offset)
                return _some(min(count, length))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct.close()
                self._direct = None
        # Clean pages are dropped first, unless a process has them mapped, so that they come from the disk.
        os.posix_fadvise(self._cached, offset, length, os.POSIX_FADV_DONTNEED)
        with memoryview(self._buffer)[:length] as room:
            count = os.preadv(self._cached, [room], offset)
        os.posix_fadvise(self._cached, offset, length, os.POSIX_FADV_DONTNEED)
        return _some(count)


def _require_second_try(error: OSError) -> None:
    """Raise an error again unless it is EIO. One may be the cable's or the path's, a second is the disk's."""
    if error.errno != errno.EIO:
        raise error


def _some(count: int) -> int:
    if count == 0:
        raise OSError(errno.EIO, "it ends early")
    return count


def _hash_zeros(hashed: hashlib._Hash, count: int) -> None:
    zeros = bytes(min(count, _PIECE))
    while count > 0:
        hashed.update(zeros[:count])
        count -= len(zeros)
