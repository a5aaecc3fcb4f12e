# SPDX-License-Identifier: Apache-2.0
"""VDI images: the virtual size, whether a parent belongs to one, and where the blocks lie.

Facts from QEMU's block/vdi.c.
"""

from __future__ import annotations

import dataclasses
import struct

from imagecache_lib import errors
from imagecache_lib.formats.reader import Reader

SIGNATURE = 0xBEDA107F
_SIGNATURE_AT = 64
_TYPE_AT = 76
_SIZE_AT = 368
_LINKS = slice(424, 456)
_LENGTH = 512
#: Offsets of the block map and of the data.
_OFFSETS_AT = 340
_BLOCK_SIZE_AT = 376
#: Numbers in the block map from this one on stand for blocks without data.
FIRST_UNMAPPED = 0xFFFF_FFFE
#: Dynamic and static; the others are parts of a disk.
_WHOLE = (1, 2)

_NEXT_STEP = "have its owner merge it into one image, or convert it to qcow2"


def read(image: Reader) -> int:
    """Return an image's virtual size in bytes.

    :raises ImageRejected: the image is broken, or is not known to be self-contained.
    :raises NeedMore: the bytes that tell have not arrived yet.
    """
    header = image.read(0, _LENGTH)
    if len(header) < _LENGTH or struct.unpack_from("<I", header, _SIGNATURE_AT)[0] != SIGNATURE:
        raise errors.ImageRejected("the vdi image is broken: it has no header", next_step=_NEXT_STEP)
    (kind,) = struct.unpack_from("<I", header, _TYPE_AT)
    if kind not in _WHOLE or any(header[_LINKS]):
        raise errors.ImageRejected("another file belongs to the vdi image", next_step=_NEXT_STEP)
    (size,) = struct.unpack_from("<Q", header, _SIZE_AT)
    return -(-int(size) // 512) * 512


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where an image has its blocks: block number n of the file at ``data_at + n * block_size``. In bytes.

    :param map_at: where the block map lies, 32 bits for each block of the disk.
    """

    map_at: int
    data_at: int
    block_size: int
    disk_size: int


def layout(image: Reader) -> Layout:
    """Return where an image has its blocks.

    :raises ImageRejected: as :func:`read`, or its blocks have no size.
    :raises NeedMore: the bytes that tell have not arrived yet.
    """
    disk_size = read(image)
    header = image.read(0, _LENGTH)
    map_at, data_at = struct.unpack_from("<II", header, _OFFSETS_AT)
    (block_size,) = struct.unpack_from("<I", header, _BLOCK_SIZE_AT)
    if not block_size:
        raise errors.ImageRejected("the vdi image is broken: its blocks have no size", next_step=_NEXT_STEP)
    return Layout(map_at, data_at, block_size, disk_size)
