# SPDX-License-Identifier: Apache-2.0
"""VHDX images: the virtual size, and which parent belongs to one, if any. Facts from Microsoft's [MS-VHDX].

The region table, at 192 KiB, says where the metadata are; behind a large log that may be anywhere.
"""

from __future__ import annotations

import dataclasses
import struct
import uuid

from imagecache_lib import errors
from imagecache_lib.formats.reader import Reader

MAGIC = b"vhdxfile"
_REGION_TABLE_AT = 192 * 1024
_TABLE_BYTES = 64 * 1024
_MOST_ENTRIES = 2047
_REGION_HEADER = struct.Struct("<4sIII")
_REGION_ENTRY = struct.Struct("<16sQII")
_METADATA_HEADER = struct.Struct("<8sHH20s")
_METADATA_ENTRY = struct.Struct("<16sIIII")
_LOCATOR_HEADER = struct.Struct("<18xH")
_LOCATOR_ENTRY = struct.Struct("<IIHH")
_MOST_LOCATIONS = 64
_HAS_PARENT = 2

#: Keys of a parent's locator. What has another key is no path.
_RELATIVE = "relative_path"
_ABSOLUTE = "absolute_win32_path"

_TABLE_REGION = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
_METADATA_REGION = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_VIRTUAL_DISK_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_SECTOR_SIZE = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
_PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d83404dbd7").bytes_le

#: One bitmap of the block allocation table is for so many sectors.
_BITMAP_SECTORS = 2**23

#: States of a block, and where an entry of the block allocation table has its offset: in whole MiB.
PRESENT = frozenset({6, 7})
STATE = 7
OFFSET = 0xFFFF_FFFF_FFF0_0000

_NEXT_STEP = "have its owner merge it into one image, or convert it to qcow2"


def read(image: Reader) -> int:
    """Return an image's virtual size in bytes.

    :raises ImageRejected: the image is broken, or is not known to be self-contained.
    :raises NeedMore: the bytes that tell have not arrived yet.
    """
    entries = _metadata(image)
    _block, flags = _fields(image, entries[_FILE_PARAMETERS], "<II")
    if flags & _HAS_PARENT or _PARENT_LOCATOR in entries:
        raise errors.ImageRejected("another file belongs to the vhdx image", next_step=_NEXT_STEP)
    (size,) = _fields(image, entries[_VIRTUAL_DISK_SIZE], "<Q")
    return size


def parent(image: Reader) -> str | None:
    """Return the path of an image's parent, with that system's separators, or None if it states none.

    A path that is relative to the image counts before one that is not.

    :raises ImageRejected: the image is broken.
    """
    at = _metadata(image).get(_PARENT_LOCATOR)
    if at is None:
        return None
    (count,) = _fields(image, at, _LOCATOR_HEADER.format)
    stated = {}
    for index in range(min(count, _MOST_LOCATIONS)):
        entry = at + _LOCATOR_HEADER.size + index * _LOCATOR_ENTRY.size
        key_at, value_at, *lengths = _fields(image, entry, _LOCATOR_ENTRY.format)
        key, value = (
            image.read(at + offset, length).decode("utf-16-le", "replace")
            for offset, length in zip((key_at, value_at), lengths, strict=True)
        )
        stated[key] = value
    return stated.get(_RELATIVE) or stated.get(_ABSOLUTE)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where an image has its blocks, in bytes.

    :param table_at: where the block allocation table lies: 64 bits for each block, and behind each ``bitmap``
        blocks those of a bitmap.
    """

    table_at: int
    bitmap: int
    block_size: int
    disk_size: int


def layout(image: Reader) -> Layout:
    """Return where an image has its blocks.

    :raises ImageRejected: as :func:`read`, or there is no table, or its blocks have no size.
    :raises NeedMore: the bytes that tell have not arrived yet.
    """
    disk_size = read(image)
    entries = _metadata(image)
    block_size, _flags = _fields(image, entries[_FILE_PARAMETERS], "<II")
    sector_size = 512
    if _SECTOR_SIZE in entries:
        (sector_size,) = _fields(image, entries[_SECTOR_SIZE], "<I")
    if not block_size or sector_size not in (512, 4096) or block_size > _BITMAP_SECTORS * sector_size:
        raise _broken("its blocks have no valid size")
    table_at = _region(image, _TABLE_REGION, "block allocation table")
    return Layout(table_at, _BITMAP_SECTORS * sector_size // block_size, block_size, disk_size)


def _metadata(image: Reader) -> dict[bytes, int]:
    """Return where each item of the metadata lies."""
    if image.read(0, len(MAGIC)) != MAGIC:
        raise _broken("it has no header")
    metadata_at = _region(image, _METADATA_REGION, "metadata")
    table = image.read(metadata_at, _TABLE_BYTES)
    if len(table) < _METADATA_HEADER.size or not table.startswith(b"metadata"):
        raise _broken("its metadata are missing")
    count = _METADATA_HEADER.unpack_from(table)[2]
    entries = {}
    for index in range(min(count, _MOST_ENTRIES)):
        at = _METADATA_HEADER.size + index * _METADATA_ENTRY.size
        if at + _METADATA_ENTRY.size > len(table):
            raise _broken("its metadata are cut off")
        item, offset, _length, _flags, _reserved = _METADATA_ENTRY.unpack_from(table, at)
        if item in entries:
            raise _broken("its metadata state one item twice")
        entries[item] = metadata_at + offset
    if _FILE_PARAMETERS not in entries or _VIRTUAL_DISK_SIZE not in entries:
        raise _broken("its metadata lack what every image states")
    return entries


def _region(image: Reader, wanted: bytes, what: str) -> int:
    """Return where a region begins.

    :param wanted: the region's GUID.
    :param what: what it has, for the error.
    """
    table = image.read(_REGION_TABLE_AT, _TABLE_BYTES)
    if len(table) < _REGION_HEADER.size or not table.startswith(b"regi"):
        raise _broken("its region table is missing")
    count = _REGION_HEADER.unpack_from(table)[2]
    for index in range(min(count, _MOST_ENTRIES)):
        at = _REGION_HEADER.size + index * _REGION_ENTRY.size
        if at + _REGION_ENTRY.size > len(table):
            break
        region, offset, _length, _required = _REGION_ENTRY.unpack_from(table, at)
        if region == wanted:
            return int(offset)
    raise _broken(f"it has no {what}")


def _fields(image: Reader, offset: int, format: str) -> tuple[int, ...]:
    size = struct.calcsize(format)
    data = image.read(offset, size)
    if len(data) < size:
        raise _broken("its metadata are cut off")
    return struct.unpack(format, data)


def _broken(how: str) -> errors.ImageRejected:
    return errors.ImageRejected(f"the vhdx image is broken: {how}", next_step=_NEXT_STEP)
