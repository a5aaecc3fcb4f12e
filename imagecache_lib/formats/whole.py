# SPDX-License-Identifier: Apache-2.0
"""Tells whether a file has all the data that its image's tables map: an image that was cut off does not.

A program that reads such an image finds zeros behind the end of its file, and no error. Only what a guest can
see has to be there. Facts are from the same specifications as those of the formats' own readers beside this
module.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
from array import array
from collections.abc import Callable, Iterator

from imagecache_lib import errors
from imagecache_lib.formats import contained, vdi, vhd, vhdx, vmdk
from imagecache_lib.formats.qcow2 import tables
from imagecache_lib.formats.qcow2.header import Compression
from imagecache_lib.formats.qcow2.inflate import Zlib
from imagecache_lib.formats.reader import Reader
from imagecache_lib.system.waiter import Waiter

_SECTOR = 512
_PIECE = 2**20
#: Most grain tables of a vmdk, as QEMU has it: each is for 32 MiB of the disk.
_MOST_TABLES = 2**25


@dataclasses.dataclass(frozen=True)
class _Map:
    """How the numbers of a table say where blocks of the disk lie. Sizes and offsets are bytes.

    :param unit: what a number counts.
    :param base: where the block with number 0 lies in the file.
    :param disk_size: a guest sees nothing of a block behind it.
    :param lowest: smaller numbers map no data, as do those from ``end`` on.
    :param needed: as much of a block has to be there, or None for all that a guest sees.
    """

    unit: int
    base: int
    block_size: int
    disk_size: int
    lowest: int = 0
    end: int = 2**32
    needed: int | None = None

    def lies_within(self, numbers: array[int], first: int, size: int) -> bool:
        """Whether all blocks of some numbers lie within a file.

        :param first: the guest's block that the first number is of.
        :param size: of the file in bytes.
        """
        usual = max(numbers) if self.end == 2**32 else max((n for n in numbers if n < self.end), default=0)
        if self.base + usual * self.unit + self.block_size <= size:
            return True
        for block, number in enumerate(numbers, first):
            if self.lowest <= number < self.end:
                seen = min(self.block_size, self.disk_size - block * self.block_size)
                needed = seen if self.needed is None else self.needed
                if seen > 0 and self.base + number * self.unit + needed > size:
                    return False
        return True


def require(image: Reader, format: str, waiter: Waiter) -> None:
    """Refuse an image whose tables map data that its file does not have.

    :param image: a whole image that :func:`imagecache_lib.formats.contained.examine` accepts.
    :param format: QEMU's name of its format.
    :param waiter: asked with each piece that is read whether the caller still waits.
    :raises ImageRejected: data is missing, or tables are.
    :raises CancelledError, LockTimeoutError: the caller no longer waits.
    """
    check = _CHECKS.get(format)
    if check is not None:
        check(_Watched(image, waiter))


def mapped_bytes(image: Reader, format: str, waiter: Waiter) -> int | None:
    """Return how many bytes of a disk an image's table maps to data, in whole blocks.

    They may be far more than the file has, since a table may name one block for many. Returns None for the
    formats of which qemu-img counts them.

    :param image: a whole image that :func:`require` accepts.
    :param format: QEMU's name of its format.
    :param waiter: as :func:`require` has it.
    :raises CancelledError, LockTimeoutError: the caller no longer waits.
    """
    count = _COUNTS.get(format)
    return None if count is None else count(_Watched(image, waiter))


@dataclasses.dataclass(frozen=True)
class _Watched:
    """An image that is read as long as a caller waits."""

    image: Reader
    waiter: Waiter

    @property
    def size(self) -> int | None:
        return self.image.size

    def read(self, offset: int, length: int) -> bytes:
        self.waiter.check()
        return self.image.read(offset, length)


def _qcow2(image: Reader) -> None:
    header = contained.read_qcow2_header(image)
    geometry = tables.Geometry.of(header, image.size)
    # Frames of Zstandard say themselves that they end too early.
    inflater = Zlib() if header.compression_type == Compression.DEFLATE else None
    found = tables.TableList(geometry)
    for piece in _pieces(image, geometry.l1_start, geometry.l1_end - geometry.l1_start, "qcow2"):
        found.add(piece)
    found.finish()
    while (offset := found.peek()) is not None:
        index = found.pop()
        table = _read(image, offset, geometry.cluster_size, "qcow2")
        mapping = tables.parse_l2(table, geometry, index, found)
        if inflater is not None:
            _require_inflated(image, mapping, geometry, inflater)


def _require_inflated(
    image: Reader, mapping: tables.Mapping, geometry: tables.Geometry, inflater: Zlib
) -> None:
    """Refuse compressed clusters that go on behind the end of the file, unless they are whole before it.

    A table knows how long one is in sectors only, and a deflate stream that goes on in zeros is none that is
    seen to be broken.
    """
    size = image.size
    assert size is not None  # a whole image
    for descriptor in reversed(mapping.descriptors):  # which are in the order of the file
        start = geometry.start(descriptor)
        if start + 2 * geometry.cluster_size + _SECTOR <= size:
            return  # none has more sectors
        if descriptor & tables.COMPRESSED and geometry.compressed_range(descriptor)[1] > size:
            try:
                inflater.one(image.read(start, size - start), geometry.cluster_size)
            except errors.ImageRejected as error:
                raise _cut_off("qcow2") from error


def _vdi(image: Reader) -> None:
    layout = vdi.layout(image)
    blocks = _Map(
        unit=layout.block_size,
        base=layout.data_at,
        block_size=layout.block_size,
        disk_size=layout.disk_size,
        end=vdi.FIRST_UNMAPPED,
    )
    _require_table(image, blocks, layout.map_at, -(-layout.disk_size // layout.block_size), "<", "vdi")


def _vdi_mapped(image: Reader) -> int:
    layout = vdi.layout(image)
    numbers = _numbers(image, layout.map_at, -(-layout.disk_size // layout.block_size), "<", "vdi")
    unmapped = (vdi.FIRST_UNMAPPED, vdi.FIRST_UNMAPPED + 1)
    return layout.block_size * sum(len(each) - sum(map(each.count, unmapped)) for each in numbers)


def _vhd(image: Reader) -> None:
    layout = vhd.layout(image)
    blocks = _Map(
        unit=_SECTOR,
        base=layout.bitmap_size,
        block_size=layout.block_size,
        disk_size=layout.disk_size,
        end=vhd.UNMAPPED,
    )
    _require_table(image, blocks, layout.table_at, -(-layout.disk_size // layout.block_size), ">", "vhd")


def _vhd_mapped(image: Reader) -> int:
    layout = vhd.layout(image)
    numbers = _numbers(image, layout.table_at, -(-layout.disk_size // layout.block_size), ">", "vhd")
    return layout.block_size * sum(len(each) - each.count(vhd.UNMAPPED) for each in numbers)


def _vhdx(image: Reader) -> None:
    layout, size = vhdx.layout(image), image.size
    assert size is not None  # a whole image
    for block, entry in _vhdx_blocks(image, layout):
        seen = min(layout.block_size, layout.disk_size - block * layout.block_size)
        if (entry & vhdx.OFFSET) + seen > size:
            raise _cut_off("vhdx")


def _vhdx_mapped(image: Reader) -> int:
    layout = vhdx.layout(image)
    return layout.block_size * sum(1 for _block in _vhdx_blocks(image, layout))


def _vhdx_blocks(image: Reader, layout: vhdx.Layout) -> Iterator[tuple[int, int]]:
    """Yield the number of each block that has data, and its entry in the table."""
    blocks = -(-layout.disk_size // layout.block_size)
    index = 0
    for piece in _pieces(image, layout.table_at, (blocks + (blocks - 1) // layout.bitmap) * 8, "vhdx"):
        for (entry,) in struct.iter_unpack("<Q", piece):
            bitmaps, within = divmod(index, layout.bitmap + 1)
            index += 1
            if within == layout.bitmap or entry & vhdx.STATE not in vhdx.PRESENT:
                continue
            yield bitmaps * layout.bitmap + within, entry


def _vmdk(image: Reader) -> None:
    layout, size = vmdk.layout(image), image.size
    assert size is not None  # a whole image
    grains = _Map(
        unit=_SECTOR,
        base=0,
        block_size=layout.grain_size,
        disk_size=layout.disk_size,
        lowest=2,  # 0 is a grain without data, and 1 one of zeros
        needed=vmdk.MARKER_BYTES if layout.compressed else None,
    )
    count = -(-layout.disk_size // layout.grain_size)
    tables_count = -(-count // layout.table_entries)
    if tables_count > _MOST_TABLES:
        raise errors.ImageRejected(
            f"the vmdk image is broken: it has {tables_count} grain tables",
            next_step="have its owner export it anew",
        )
    number = 0
    # Which tables were looked at, for the first part of the disk that each stands for: a bit for each sector.
    seen = bytearray(size // _SECTOR // 8 + 1)
    for directory in _numbers(image, layout.directory_at, tables_count, "<", "vmdk"):
        for table in directory:
            at, bit = table >> 3, 1 << (table & 7)
            if table and not (at < len(seen) and seen[at] & bit):
                first = number * layout.table_entries
                entries = min(layout.table_entries, count - first)
                _require_table(image, grains, table * _SECTOR, entries, "<", "vmdk", first=first)
                seen[at] |= bit
            number += 1


def _require_table(
    image: Reader, blocks: _Map, offset: int, count: int, order: str, format: str, *, first: int = 0
) -> None:
    size = image.size
    assert size is not None  # a whole image
    for numbers in _numbers(image, offset, count, order, format):
        if not blocks.lies_within(numbers, first, size):
            raise _cut_off(format)
        first += len(numbers)


def _numbers(image: Reader, offset: int, count: int, order: str, format: str) -> Iterator[array[int]]:
    """Yield the 32-bit numbers of a table, many at a time."""
    swapped = (order == "<") != (sys.byteorder == "little")
    for piece in _pieces(image, offset, count * 4, format):
        values = array("I", piece)
        if swapped:
            values.byteswap()
        yield values


def _pieces(image: Reader, offset: int, length: int, format: str) -> Iterator[bytes]:
    end = offset + length
    while offset < end:
        piece = _read(image, offset, min(_PIECE, end - offset), format)
        yield piece
        offset += len(piece)


def _read(image: Reader, offset: int, length: int, format: str) -> bytes:
    size = image.size
    assert size is not None
    if offset + length > size:  # before memory is asked for
        raise _cut_off(format)
    return image.read(offset, length)


def _cut_off(format: str) -> errors.ImageRejected:
    return errors.ImageRejected(
        f"the {format} image is cut off: its tables map data that the file does not have",
        next_step="have its owner upload it anew",
    )


_CHECKS: dict[str, Callable[[Reader], None]] = {
    "qcow2": _qcow2,
    "vdi": _vdi,
    "vpc": _vhd,
    "vhdx": _vhdx,
    "vmdk": _vmdk,
}

_COUNTS: dict[str, Callable[[Reader], int]] = {
    "vdi": _vdi_mapped,
    "vpc": _vhd_mapped,
    "vhdx": _vhdx_mapped,
}
