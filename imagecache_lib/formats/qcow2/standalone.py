# SPDX-License-Identifier: Apache-2.0
"""qcow2 images that stand alone, written natively from a raw file in one pass over its data.

After the header comes the L1 table, then the data in the guest's order, each L2 table behind the data that it
maps, and the refcounts at the end, when it is known how much there is to count. Facts are from QEMU's
docs/interop/qcow2.rst.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator

from imagecache_lib.formats.qcow2 import overlay
from imagecache_lib.system import sparse
from imagecache_lib.system.waiter import Waiter

#: ioctl_ficlonerange(2), and its argument: descriptor, offset and length of the source, offset in the target.
_FICLONERANGE = 0x4020940D
_CLONE_ARGUMENT = struct.Struct("=qQQQ")

#: Of an L1 or L2 entry: exactly one thing refers to the cluster, so that a guest may write into it.
_COPIED = 1 << 63

_COPY_BYTES = 2**20


def write_standalone(
    source: int,
    fd: int,
    virtual_size: int,
    *,
    cluster_bits: int = overlay.DEFAULT_CLUSTER_BITS,
    waiter: Waiter | None = None,
) -> None:
    """Write a raw file's content as a version 3 image into an empty file. Nothing is synced.

    Clusters of zeros get no space. Where the filesystem can share extents between the two files, it does.

    :param source: descriptor of the raw file, open for reading.
    :param fd: open for reading and writing; the file must be empty.
    :param virtual_size: bytes that the guest sees, at least the raw file's size; a multiple of 512.
    :param cluster_bits: 9 to 21; the cluster size is ``1 << cluster_bits``.
    :param waiter: asked with each piece whether the caller still waits.
    :raises overlay.OverlayError: the size is not a multiple of 512, or the clusters are too small for it.
    :raises OSError: a file cannot be read or written.
    :raises: what the waiter raises.
    """
    _Writer(source, fd, virtual_size, cluster_bits, waiter).run()


class _Writer:
    def __init__(
        self, source: int, fd: int, virtual_size: int, cluster_bits: int, waiter: Waiter | None
    ) -> None:
        self._waiter = waiter
        self._source, self._fd = source, fd
        self._source_size = os.fstat(source).st_size
        self._virtual_size = virtual_size
        self._bits = cluster_bits
        self._cluster = 1 << cluster_bits
        self._l2_entries = self._cluster // 8
        self._l1 = [0] * overlay.l1_entries(virtual_size, cluster_bits)
        self._l1_clusters = -(-len(self._l1) * 8 // self._cluster)
        self._next = 1 + self._l1_clusters
        self._clones = True
        # QEMU reads a cluster whole, so that the last one is filled up with zeros.
        self._buffer = bytearray(max(_COPY_BYTES, self._cluster))
        self._zeros = bytes(self._cluster)

    def run(self) -> None:
        l2 = [0] * self._l2_entries
        current = 0
        for first, count in self._runs():
            if first // self._l2_entries != current:
                self._finish_table(current, l2)
                l2, current = [0] * self._l2_entries, first // self._l2_entries
            self._store(first, count, l2)
        self._finish_table(current, l2)
        self._finish()

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first, count) of the guest's clusters that may hold data, none across two L2 tables."""
        done = 0
        for start, end in sparse.data_extents(self._source):
            first = max(start >> self._bits, done)
            last = -(-end >> self._bits)
            while first < last:
                stop = min(last, (first // self._l2_entries + 1) * self._l2_entries)
                yield first, stop - first
                first = done = stop

    def _store(self, first: int, count: int, l2: list[int]) -> None:
        whole = min(first + count, self._source_size >> self._bits) - first
        if whole > 0 and self._clone(first, whole):
            self._map(first, whole, l2)
            first, count = first + whole, count - whole
        step = len(self._buffer) >> self._bits
        for begin in range(first, first + count, step):
            if self._waiter is not None:
                self._waiter.check()
            self._copy(begin, min(step, first + count - begin), l2)

    def _clone(self, first: int, count: int) -> bool:
        """Share the extents of some clusters. Returns False, from then on, if the filesystem cannot."""
        if not self._clones:
            return False
        length = count << self._bits
        argument = _CLONE_ARGUMENT.pack(self._source, first << self._bits, length, self._next << self._bits)
        try:
            fcntl.ioctl(self._fd, _FICLONERANGE, argument)
        except OSError:
            # Whatever stands against it, an I/O error included, a copy meets it again or does without.
            self._clones = False
            os.ftruncate(self._fd, self._next << self._bits)  # what was shared before it failed
        return self._clones

    def _copy(self, first: int, count: int, l2: list[int]) -> None:
        length = count << self._bits
        with memoryview(self._buffer)[:length] as view:
            got = _read(self._source, view, first << self._bits)
            view[got:] = bytes(length - got)
            for begin, stop in self._data_in(count):
                with view[begin << self._bits : stop << self._bits] as run:
                    _write(self._fd, run, self._next << self._bits)
                self._map(first + begin, stop - begin, l2)

    def _data_in(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, stop) of the runs of clusters in the buffer that are not zeros."""
        begin = -1
        for position in range(count):
            if self._buffer.startswith(self._zeros, position << self._bits):
                if begin >= 0:
                    yield begin, position
                    begin = -1
            elif begin < 0:
                begin = position
        if begin >= 0:
            yield begin, count

    def _map(self, first: int, count: int, l2: list[int]) -> None:
        at = first % self._l2_entries
        for number in range(count):
            l2[at + number] = self._next + number << self._bits | _COPIED
        self._next += count

    def _finish_table(self, index: int, l2: list[int]) -> None:
        if not any(l2):
            return
        _write(self._fd, memoryview(struct.pack(f">{len(l2)}Q", *l2)), self._next << self._bits)
        self._l1[index] = self._next << self._bits | _COPIED
        self._next += 1

    def _finish(self) -> None:
        """Write the L1 table, the refcounts and the header."""
        table_at = self._next
        table_clusters, blocks = overlay.refcount_clusters(self._next, self._bits)
        blocks_at = table_at + table_clusters
        end = blocks_at + blocks
        _write(self._fd, memoryview(struct.pack(f">{len(self._l1)}Q", *self._l1)), self._cluster)
        table = struct.pack(f">{blocks}Q", *(blocks_at + number << self._bits for number in range(blocks)))
        _write(self._fd, memoryview(table), table_at << self._bits)
        self._write_refcounts(blocks_at, end)
        fields = overlay.header_fields(
            cluster_bits=self._bits,
            virtual_size=self._virtual_size,
            l1_entries=len(self._l1),
            l1_offset=self._cluster,
            refcount_table_offset=table_at << self._bits,
            refcount_table_clusters=table_clusters,
        )
        _write(self._fd, memoryview(fields), 0)
        os.ftruncate(self._fd, end << self._bits)

    def _write_refcounts(self, blocks_at: int, end: int) -> None:
        """Count each cluster once: there is no gap between them."""
        offset = blocks_at << self._bits
        ones = memoryview(struct.pack(">H", 1) * self._cluster)
        left = end * 2
        while left:
            with ones[: min(left, len(ones))] as piece:
                _write(self._fd, piece, offset)
                offset, left = offset + len(piece), left - len(piece)


def _read(fd: int, view: memoryview, offset: int) -> int:
    """Fill a buffer from a file. Returns how many bytes there were before its end."""
    done = 0
    while done < len(view):
        with view[done:] as rest:
            got = os.preadv(fd, [rest], offset + done)
        if got == 0:
            break
        done += got
    return done


def _write(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        with view[done:] as rest:
            done += os.pwrite(fd, rest, offset + done)
