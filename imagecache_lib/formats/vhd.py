# SPDX-License-Identifier: Apache-2.0
"""VHD images (QEMU: vpc), facts from Microsoft's "Virtual Hard Disk Image Format Specification".

A dynamic image begins with a copy of the footer at its end; a fixed one is the disk's own bytes with a footer
behind them. The footer states the size three times: as it was when the image was made, as it is now, and as a
geometry, which cannot express most sizes. The current one is the disk's.
"""

from __future__ import annotations

import dataclasses
import enum
import struct

from imagecache_lib import errors
from imagecache_lib.formats.reader import Reader

COOKIE = b"conectix"
FOOTER_BYTES = 512
_SECTOR = 512
# Cookie, features, version, data offset, time, creator, its version, its system, original size, current size,
# cylinders, heads, sectors, type, checksum.
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII")
_CHECKSUM = slice(64, 68)
_HEADER_AT = struct.Struct(">16xQ")
# Cookie, data offset, table offset, version, number of entries, block size.
_HEADER = struct.Struct(">8sQQIII")
_HEADER_COOKIE = b"cxsparse"
_HEADER_BYTES = 1024
#: Name and locators of a parent.
_PARENT = slice(64, 768)
#: In the block allocation table: a block without data.
UNMAPPED = 0xFFFF_FFFF

_NEXT_STEP = "have its owner merge it into one image, or convert it to qcow2"


class Kind(enum.IntEnum):
    """The footer's disk type."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


@dataclasses.dataclass(frozen=True)
class Footer:
    """What a footer says.

    :param current_size: of the disk in bytes, in whole sectors.
    :param one_size: whether original size, current size and geometry agree, so that all programs do.
    :param sound: whether the footer's checksum is right.
    """

    kind: int
    current_size: int
    one_size: bool
    sound: bool


def parse_footer(data: bytes) -> Footer | None:
    """Return what a footer says, or None if the data is not a footer."""
    if len(data) != FOOTER_BYTES or not data.startswith(COOKIE):
        return None
    fields = _FOOTER.unpack_from(data)
    original, current, cylinders, heads, sectors, kind, checksum = fields[8:]
    geometry = cylinders * heads * sectors * _SECTOR
    summed = sum(data) - sum(data[_CHECKSUM])
    return Footer(
        kind,
        current // _SECTOR * _SECTOR,
        one_size=original == current == geometry,
        sound=~summed & 0xFFFF_FFFF == checksum,
    )


def read(image: Reader) -> Footer:
    """Return what the footer of a dynamic image says.

    :raises ImageRejected: the image is broken, or is not known to be self-contained.
    :raises NeedMore: the bytes that tell have not arrived yet.
    """
    found = parse_footer(image.read(0, FOOTER_BYTES))
    if found is None:
        raise errors.ImageRejected("the vhd image has no header", next_step=_NEXT_STEP)
    if found.kind != Kind.DYNAMIC:
        raise errors.ImageRejected(
            "another file belongs to the vhd image"
            if found.kind == Kind.DIFFERENCING
            else f"the vhd image is of type {found.kind}, which does not begin with a header",
            next_step=_NEXT_STEP,
        )
    (at,) = _HEADER_AT.unpack(image.read(0, _HEADER_AT.size))
    # Only a differencing image has a parent. A name of one is nothing that a writer of others leaves there.
    if any(image.read(at, _HEADER_BYTES)[_PARENT]):
        raise errors.ImageRejected("another file belongs to the vhd image", next_step=_NEXT_STEP)
    if image.size is not None:
        last = parse_footer(image.read(max(image.size - FOOTER_BYTES, 0), FOOTER_BYTES))
        if last is not None and (last.kind, last.current_size) != (found.kind, found.current_size):
            raise errors.ImageRejected(
                "the header and the footer of the vhd image differ in the disk's type or size",
                next_step=_NEXT_STEP,
            )
    return found


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a dynamic image has its blocks, in bytes.

    :param table_at: where the block allocation table lies: for each block the sector with which its bitmap
        begins, in 32 bits. The block's data lie behind the bitmap.
    """

    table_at: int
    bitmap_size: int
    block_size: int
    disk_size: int


def layout(image: Reader) -> Layout:
    """Return where a dynamic image has its blocks.

    :raises ImageRejected: as :func:`read`, or the table cannot map the disk.
    :raises NeedMore: the bytes that tell have not arrived yet.
    """
    disk_size = read(image).current_size
    (at,) = _HEADER_AT.unpack(image.read(0, _HEADER_AT.size))
    header = image.read(at, _HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_HEADER_COOKIE):
        raise errors.ImageRejected("the vhd image is broken: it has no dynamic header", next_step=_NEXT_STEP)
    _cookie, _data_at, table_at, _version, entries, block_size = _HEADER.unpack(header)
    if block_size < _SECTOR or entries * block_size < disk_size:
        raise errors.ImageRejected(
            "the vhd image is broken: its table does not cover the disk", next_step=_NEXT_STEP
        )
    bitmap = -(-block_size // _SECTOR // 8)
    return Layout(table_at, -(-bitmap // _SECTOR) * _SECTOR, block_size, disk_size)


def is_fixed(footer: bytes, length: int) -> bool:
    """Return whether an image is a fixed VHD.

    :param footer: the last 512 bytes of the image.
    :param length: number of bytes before the footer.
    """
    found = parse_footer(footer)
    return found is not None and found.sound and (found.kind, found.current_size) == (Kind.FIXED, length)
