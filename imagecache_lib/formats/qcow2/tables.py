# SPDX-License-Identifier: Apache-2.0
"""L1 and L2 tables: bytes in, compact arrays out, everything checked. Facts from docs/interop/qcow2.rst.

Nothing here keeps a Python object per cluster: an image of 256 GiB has four million of them.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import operator
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator

from imagecache_lib import errors
from imagecache_lib.formats.qcow2.header import Header
from imagecache_lib.system.sparse import Buffer

#: Bits 9 to 55 of an L1 entry or of a standard L2 entry: where the table or the cluster lies.
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COMPRESSED = 1 << 62
_ZERO = 1
#: What is usual of the entry of a cluster that is not compressed: its offset, and its zero flag not set.
_PLAIN = OFFSET_MASK | _ZERO
#: So many entries of a table are checked at once.
_CHECKED_AT_ONCE = 2**13
_SECTOR = 512
#: Bytes that a stream could ever have; table offsets and L1 indexes then fit one 64-bit key.
_MAX_FILE = 2**50
_L1_INDEX_BITS = 22
_SORT_CHUNK = 2**16


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What the header fixes about its tables. Offsets and sizes are bytes.

    :param file_size: length of the whole file, or the most it may have.
    """

    version: int
    cluster_bits: int
    cluster_size: int
    extended: bool
    virtual_size: int
    l2_entries: int
    l1_start: int
    l1_end: int
    file_size: int

    @classmethod
    def of(cls, header: Header, file_size: int | None) -> Geometry:
        return cls(
            version=header.version,
            cluster_bits=header.cluster_bits,
            cluster_size=header.cluster_size,
            extended=header.extended_l2,
            virtual_size=header.virtual_size,
            l2_entries=header.l2_entries,
            l1_start=header.l1_table_offset,
            l1_end=header.l1_table_offset + header.l1_size * 8,
            file_size=_MAX_FILE if file_size is None else file_size,
        )

    @property
    def clusters(self) -> int:
        """Guest clusters, the last of which may reach beyond the virtual size."""
        return -(-self.virtual_size // self.cluster_size)

    @property
    def l1_needed(self) -> int:
        """L1 entries that map the disk; those behind map the VM state of a snapshot."""
        return -(-self.clusters // self.l2_entries)

    @property
    def compressed_mask(self) -> int:
        """The bits of an L2 entry that say where a compressed cluster starts."""
        return (1 << (62 - (self.cluster_bits - 8))) - 1

    def compressed_range(self, descriptor: int) -> tuple[int, int]:
        """Return where a compressed cluster starts, and the end of the last sector it may use."""
        shift = 62 - (self.cluster_bits - 8)
        start = descriptor & ((1 << shift) - 1)
        sectors = (descriptor & (COMPRESSED - 1)) >> shift
        return start, start - start % _SECTOR + (sectors + 1) * _SECTOR

    def start(self, descriptor: int) -> int:
        """Return where a cluster's data starts in the file."""
        if descriptor & COMPRESSED:
            return descriptor & self.compressed_mask
        return descriptor

    def check_table(self, offset: int, what: str) -> None:
        """Refuse the offset of an L2 table that cannot be."""
        if offset % self.cluster_size:
            raise errors.ImageRejected(f"a qcow2 {what} at {offset} is not aligned to a cluster")
        if offset + self.cluster_size > self.file_size:
            raise errors.ImageRejected(f"a qcow2 {what} at {offset} lies outside of the file")
        if offset < self.l1_end and offset + self.cluster_size > self.l1_start:
            raise errors.ImageRejected(f"a qcow2 {what} at {offset} overlaps the L1 table")


class TableList:
    """Where the L2 tables lie, in file order. Eight bytes each."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._keys = array("Q")
        self._entries = 0
        self._next = 0

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def allocated(self) -> int:
        """Bytes of memory taken."""
        return len(self._keys) * self._keys.itemsize

    def add(self, raw: Buffer) -> None:
        """Take the next entries of the L1 table, in its order.

        :raises ImageRejected: one points outside of the file or to the L1 table.
        """
        geometry = self._geometry
        for index, entry in enumerate(big_endian(raw), self._entries):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            if index >= geometry.l1_needed:
                # The state of a machine that was saved lies behind the disk. Its tables stay there when the
                # snapshot is deleted, and no reader of the disk looks at them.
                continue
            geometry.check_table(offset, "L2 table")
            self._keys.append(offset // _SECTOR << _L1_INDEX_BITS | index)
        self._entries += len(raw) // 8

    def finish(self) -> None:
        """Call when the L1 table is complete.

        :raises ImageRejected: two entries point to one table.
        """
        keys = self._keys
        if any(keys[i] > keys[i + 1] for i in range(len(keys) - 1)):
            keys = self._keys = sort_compact(keys)
        if any(keys[i] >> _L1_INDEX_BITS == keys[i + 1] >> _L1_INDEX_BITS for i in range(len(keys) - 1)):
            raise errors.ImageRejected("two entries of the qcow2 L1 table point to one L2 table")

    def peek(self) -> int | None:
        """Return the offset of the next table in the file, or None after the last."""
        return None if self._next == len(self._keys) else self._offset(self._next)

    def pop(self) -> int:
        """Return the next table's index in the L1 table."""
        index = self._keys[self._next] & ((1 << _L1_INDEX_BITS) - 1)
        self._next += 1
        return index

    def overlap(self, start: int, end: int) -> bool:
        """Return whether an L2 table overlaps these bytes of the file."""
        after = self._after(end)
        return after > 0 and self._offset(after - 1) + self._geometry.cluster_size > start

    def overlapping(self, start: int, end: int) -> list[int]:
        """Return the offsets of the L2 tables that overlap these bytes of the file, in order."""
        found, number = [], self._after(end)
        while number > 0 and (offset := self._offset(number - 1)) + self._geometry.cluster_size > start:
            found.append(offset)
            number -= 1
        return found[::-1]

    def _after(self, end: int) -> int:
        """Return the number of the first table behind an offset of the file."""
        return bisect_left(self._keys, -(-end // _SECTOR) << _L1_INDEX_BITS)

    def _offset(self, number: int) -> int:
        return (self._keys[number] >> _L1_INDEX_BITS) * _SECTOR


class Mapping:
    """The clusters that one L2 table maps to data, in file order. Ten or twelve bytes each.

    ``descriptors`` are L2 entries without their flags: the offset of a standard cluster, or the offset
    and length of a compressed one. ``indexes`` are positions in the table. ``bitmaps`` are those of
    extended entries, None in other images.
    """

    __slots__ = ("bitmaps", "descriptors", "first", "indexes", "next")

    def __init__(self, first: int, wide: bool, extended: bool) -> None:
        self.first = first
        self.next = 0
        self.descriptors = array("Q")
        self.indexes = array("I" if wide else "H")
        self.bitmaps = array("Q") if extended else None

    def __len__(self) -> int:
        return len(self.descriptors)

    @property
    def allocated(self) -> int:
        """Bytes of memory taken, the objects themselves included."""
        return len(self) * (8 + self.indexes.itemsize + (8 if self.bitmaps is not None else 0)) + 600

    def reorder(self, order: list[int]) -> None:
        for name in ("descriptors", "indexes", "bitmaps"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, array(values.typecode, map(values.__getitem__, order)))


def parse_l2(raw: Buffer, geometry: Geometry, l1_index: int, tables: TableList) -> Mapping:
    """Return what an L2 table maps.

    :param tables: all L2 tables of the image, which no data may overlap.
    :raises ImageRejected: an entry is malformed or points where no data can be.
    """
    entries = big_endian(raw)
    bitmaps = None
    if geometry.extended:
        entries, bitmaps = entries[::2], entries[1::2]
    first = l1_index * geometry.l2_entries
    mapping = Mapping(first, geometry.l2_entries > 2**16, geometry.extended)
    for begin in range(0, len(entries), _CHECKED_AT_ONCE):
        stop = min(begin + _CHECKED_AT_ONCE, len(entries))
        if bitmaps is None and _add_usual(mapping, entries[begin:stop], begin, geometry, tables):
            continue
        if not _add(mapping, entries, bitmaps, range(begin, stop), geometry, tables):
            break
    mask = geometry.compressed_mask
    starts = array("Q", (each & mask if each & COMPRESSED else each for each in mapping.descriptors))
    if any(map(operator.gt, starts, itertools.islice(starts, 1, None))):
        mapping.reorder(sorted(range(len(starts)), key=starts.__getitem__))
    return mapping


def _add_usual(
    mapping: Mapping, entries: array[int], begin: int, geometry: Geometry, tables: TableList
) -> bool:
    """Add what some entries of a table map, if they are such that they can be checked all at once.

    Returns False, and adds nothing, if each has to be looked at. Meanwhile no other thread would get on for
    tens of milliseconds.

    :param begin: position of the first one in the table.
    """
    indexes = [index for index, entry in enumerate(entries, begin) if entry]
    if not indexes:
        return True
    # With its zero flag, and without an offset, an entry is not usual.
    plain = [entry & _PLAIN for entry in entries if entry and not entry & COMPRESSED]
    mask = geometry.compressed_mask
    compressed = [entry & mask for entry in entries if entry & COMPRESSED]
    low = min(min(plain, default=_MAX_FILE), min(compressed, default=_MAX_FILE))
    end = max(max(plain, default=0) + geometry.cluster_size if plain else 0, max(compressed, default=0) + 1)
    if (
        functools.reduce(operator.or_, plain, 0) % geometry.cluster_size
        or mapping.first + indexes[-1] >= geometry.clusters
        or low < geometry.cluster_size
        or end > geometry.file_size
        or (low < geometry.l1_end and end > geometry.l1_start)
        or _hit(tables.overlapping(low, end), geometry.cluster_size, plain, compressed)
    ):
        return False
    flags = ~(2 * COMPRESSED)
    mapping.descriptors.extend(
        entry & flags if entry & COMPRESSED else entry & _PLAIN for entry in entries if entry
    )
    mapping.indexes.extend(indexes)
    return True


def _hit(offsets: list[int], size: int, plain: list[int], compressed: list[int]) -> bool:
    """Return whether one of some tables lies where clusters begin.

    :param plain: where clusters begin that are not compressed, aligned as tables are.
    """
    if not offsets:
        return False
    starts = sorted(compressed)
    return not set(plain).isdisjoint(offsets) or any(
        bisect_left(starts, offset) < bisect_left(starts, offset + size) for offset in offsets
    )


def _add(
    mapping: Mapping,
    entries: array[int],
    bitmaps: array[int] | None,
    positions: range,
    geometry: Geometry,
    tables: TableList,
) -> bool:
    """Add what some entries of a table map. Returns False if the disk ends there.

    :raises ImageRejected: as :func:`parse_l2`.
    """
    for index in positions:
        entry = entries[index]
        if not entry and not (bitmaps and bitmaps[index]):
            continue
        descriptor = _descriptor(entry, bitmaps[index] if bitmaps else None, geometry)
        if not descriptor:
            continue
        guest = mapping.first + index
        if guest >= geometry.clusters:
            return False  # behind the disk, where no reader looks
        _check_data(descriptor, guest, geometry, tables, bitmaps[index] if bitmaps else None)
        mapping.descriptors.append(descriptor)
        mapping.indexes.append(index)
        if mapping.bitmaps is not None and bitmaps is not None:
            mapping.bitmaps.append(bitmaps[index])
    return True


def _descriptor(entry: int, bitmap: int | None, geometry: Geometry) -> int:
    """Return what an L2 entry says without its flags, 0 if it maps no data."""
    if entry & COMPRESSED:
        return entry & (2 * COMPRESSED - 1)
    offset = entry & OFFSET_MASK
    if bitmap is not None:
        allocated = bitmap & 0xFFFF_FFFF
        if allocated & bitmap >> 32 or (allocated and not offset):
            raise errors.ImageRejected("a qcow2 subcluster is both mapped and not")
        offset_used = offset if allocated else 0
    elif entry & _ZERO:
        if geometry.version < 3:
            raise errors.ImageRejected("a version 2 qcow2 image has a version 3 zero cluster")
        offset_used = 0
    else:
        offset_used = offset
    if offset % geometry.cluster_size:
        raise errors.ImageRejected(f"a qcow2 cluster at {offset} is not aligned")
    return offset_used


def _check_data(
    descriptor: int, guest: int, geometry: Geometry, tables: TableList, bitmap: int | None
) -> None:
    """Refuse data where none can be."""
    if descriptor & COMPRESSED:
        start = geometry.start(descriptor)
        # How far it really reaches only inflating tells: its last sector may be another's first.
        checked_end, needed_end = start + 1, start + 1
    else:
        start = descriptor
        checked_end = start + geometry.cluster_size
        needed_end = start + data_length(geometry, guest, bitmap)
    if needed_end > geometry.file_size:
        raise errors.ImageRejected(f"a qcow2 cluster at {start} lies outside of the file")
    if start < geometry.cluster_size or (start < geometry.l1_end and checked_end > geometry.l1_start):
        raise errors.ImageRejected(f"a qcow2 cluster at {start} overlaps the header or the L1 table")
    if tables.overlap(start, checked_end):
        raise errors.ImageRejected(f"a qcow2 cluster at {start} overlaps an L2 table")


def data_length(geometry: Geometry, guest: int, bitmap: int | None) -> int:
    """Return how many bytes of a standard cluster are read: less at the disk's end, or with subclusters."""
    length = min(geometry.cluster_size, geometry.virtual_size - guest * geometry.cluster_size)
    if bitmap is not None:
        length = min(length, (bitmap & 0xFFFF_FFFF).bit_length() * (geometry.cluster_size // 32))
    return length


def subclusters(bitmap: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of allocated subclusters as (first, number)."""
    allocated = bitmap & 0xFFFF_FFFF
    position = 0
    while allocated:
        zeros = (allocated & -allocated).bit_length() - 1
        allocated >>= zeros
        position += zeros
        ones = (~allocated & (allocated + 1)).bit_length() - 1
        yield position, ones
        allocated >>= ones
        position += ones


def big_endian(raw: Buffer) -> array[int]:
    """Return the 64-bit numbers of a table."""
    values = array("Q")
    values.frombytes(raw)
    if sys.byteorder == "little":
        values.byteswap()
    return values


def sort_compact(values: array[int]) -> array[int]:
    """Return the values sorted, without ever holding all of them as Python objects. Reorders the argument."""
    starts = range(0, len(values), _SORT_CHUNK)
    for start in starts:
        stop = start + _SORT_CHUNK
        values[start:stop] = array("Q", sorted(values[start:stop]))
    chunks = (
        map(values.__getitem__, range(start, min(start + _SORT_CHUNK, len(values)))) for start in starts
    )
    return array("Q", heapq.merge(*chunks))
