# SPDX-License-Identifier: Apache-2.0
"""Where decoded clusters go: each to its place on the disk, without its zeros."""

from __future__ import annotations

from collections.abc import Sequence

from imagecache_lib.formats.qcow2 import tables
from imagecache_lib.formats.qcow2.pool import InflatePool
from imagecache_lib.system.sparse import Piece

#: Contiguous clusters are written in runs of at most this.
RUN_BYTES = 2**20
_FULL = 0xFFFF_FFFF


class Output:
    """Has written what a mapping's next entries say. The caller moves the mapping on. Errors come later."""

    def __init__(self, geometry: tables.Geometry, pool: InflatePool) -> None:
        self._geometry = geometry
        self._pool = pool

    @property
    def room(self) -> int:
        """How many compressed clusters are handed over at once at most."""
        return self._pool.room

    def inflate(self, mapping: tables.Mapping, clusters: Sequence[bytes | memoryview], passed: int) -> None:
        """Hand over the next clusters, which are compressed, no more than there is room for.

        :param passed: bytes of the stream since the cluster before.
        """
        size, first, left = self._geometry.cluster_size, mapping.first, self._geometry.virtual_size
        indexes = mapping.indexes[mapping.next : mapping.next + len(clusters)]
        self._pool.submit(
            [
                (guest := (first + index) * size, min(size, left - guest), data)
                for index, data in zip(indexes, clusters, strict=True)
            ],
            passed,
        )

    def inflate_now(self, mapping: tables.Mapping, data: bytes) -> None:
        """Inflate and write the next cluster, which is compressed, before it returns.

        :raises ImageRejected: it does not inflate.
        """
        guest, length = self._place(mapping)
        self._pool.inflate_now(guest, length, data)

    def run(self, mapping: tables.Mapping, available: int) -> tuple[int, int]:
        """Return how many of the next standard clusters are contiguous in file and disk, and their bytes.

        At least one, and no more than are available and fit a run.
        """
        size, position = self._geometry.cluster_size, mapping.next
        descriptors, indexes, bitmaps = mapping.descriptors, mapping.indexes, mapping.bitmaps
        limit = min(len(mapping) - position, min(available, RUN_BYTES) // size)
        start, first = descriptors[position], indexes[position]
        count = 1
        while (
            count < limit
            and descriptors[position + count] == start + count * size
            and indexes[position + count] == first + count
            and (bitmaps is None or bitmaps[position + count] == _FULL == bitmaps[position])
        ):
            count += 1
        last = position + count - 1
        bitmap = None if bitmaps is None else bitmaps[last]
        rest = tables.data_length(self._geometry, mapping.first + indexes[last], bitmap)
        return count, (count - 1) * size + rest

    def write(self, mapping: tables.Mapping, length: int, pieces: Sequence[Piece]) -> None:
        """Write a run of standard clusters, of which ``pieces`` holds so many bytes."""
        guest, _ = self._place(mapping)
        bitmap = _FULL if mapping.bitmaps is None else mapping.bitmaps[mapping.next]
        if bitmap == _FULL:
            self._pool.place(_part(pieces, guest, 0, length))
            return
        size = self._geometry.cluster_size // 32
        for first, number in tables.subclusters(bitmap):
            begin, stop = first * size, min((first + number) * size, length)
            if begin < stop:
                self._pool.place(_part(pieces, guest, begin, stop))

    def drain(self) -> None:
        """Wait until everything is written. Raises as :meth:`InflatePool.submit`."""
        self._pool.drain()

    def close(self) -> None:
        """Stop the threads; clusters that they have not begun are dropped."""
        self._pool.close()

    def _place(self, mapping: tables.Mapping) -> tuple[int, int]:
        """Return where on the disk the next cluster lies, and how many of its bytes the disk has."""
        size = self._geometry.cluster_size
        guest = (mapping.first + mapping.indexes[mapping.next]) * size
        return guest, min(size, self._geometry.virtual_size - guest)


def _part(pieces: Sequence[Piece], guest: int, begin: int, stop: int) -> list[tuple[int, Piece]]:
    """Return bytes ``begin`` to ``stop`` of pieces that lie at an offset of the disk, with their offsets."""
    found: list[tuple[int, Piece]] = []
    at = 0
    for data, first, last in pieces:
        ahead = first - at
        low, high = max(begin, at), min(stop, at + last - first)
        if low < high:
            found.append((guest + low, (data, ahead + low, ahead + high)))
        at += last - first
    return found
