# SPDX-License-Identifier: Apache-2.0
"""Where decoded clusters go: each to its place on the disk, without its zeros."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from imagecache_lib.formats.qcow2 import tables
from imagecache_lib.formats.qcow2.pool import InflatePool
from imagecache_lib.system.sparse import Piece, Sink

#: Contiguous clusters are written in runs of at most this.
RUN_BYTES = 2**20
_FULL = 0xFFFF_FFFF


class Output:
    """Writes what a mapping's next entries say to a raw file. The caller moves the mapping on."""

    def __init__(self, sink: Sink, geometry: tables.Geometry, pool: InflatePool) -> None:
        self._sink = sink
        self._geometry = geometry
        self._pool = pool

    def inflate(self, mapping: tables.Mapping, data: bytes | memoryview, passed: int) -> None:
        """Hand over the next cluster, which is compressed. Errors come later.

        :param passed: bytes of the stream since the cluster before.
        """
        guest, length = self._place(mapping)
        self._pool.submit(guest, length, data, passed)

    def inflate_now(self, mapping: tables.Mapping, data: bytes) -> None:
        """Inflate and write the next cluster, which is compressed.

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
            self._sink.write_pieces(_part(pieces, guest, 0, length))
            return
        size = self._geometry.cluster_size // 32
        for first, number in tables.subclusters(bitmap):
            begin, stop = first * size, min((first + number) * size, length)
            if begin < stop:
                self._sink.write_pieces(_part(pieces, guest, begin, stop))

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


def _part(pieces: Sequence[Piece], guest: int, begin: int, stop: int) -> Iterator[tuple[int, Piece]]:
    """Yield bytes ``begin`` to ``stop`` of pieces that lie at an offset of the disk, with their offsets."""
    at = 0
    for data, first, last in pieces:
        ahead = first - at
        low, high = max(begin, at), min(stop, at + last - first)
        if low < high:
            yield guest + low, (data, ahead + low, ahead + high)
        at += last - first
