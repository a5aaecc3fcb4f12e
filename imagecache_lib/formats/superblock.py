# SPDX-License-Identifier: Apache-2.0
"""What a swap area or an empty filesystem says of itself: pure, from its first bytes.

The layouts are the kernel's: ``union swap_header`` of include/linux/swap.h, ``struct ext4_super_block`` of
fs/ext4/ext4.h, ``struct fat_boot_sector`` of include/uapi/linux/msdos_fs.h, ``struct xfs_dsb`` of
fs/xfs/libxfs/xfs_format.h, ``NTFS_BOOT_SECTOR`` of fs/ntfs3/ntfs.h.
"""

from __future__ import annotations

import dataclasses
import struct

#: As many bytes as :func:`read` wants to see.
LENGTH = 64 * 1024

_PAGE = 4096
_EXT_SUPERBLOCK = 1024
_EXT_MAGIC = b"\x53\xef"
_EXT_HAS_JOURNAL = 0x4
_EXT_EXTENTS = 0x40
_EXT_64BIT = 0x80


@dataclasses.dataclass(frozen=True)
class Signature:
    """What was found.

    :param kind: ``swap``, or the filesystem's name.
    :param size: bytes that it spans.
    :param label: the filesystem's label, or None if it has no label, or labels of its kind are not read.
    :param identity: the filesystem's UUID, or FAT's volume id; None if it has no such id, or ids of its kind
        are not read.
    """

    kind: str
    size: int
    label: str | None = None
    identity: bytes | None = dataclasses.field(default=None, compare=False)


def read(head: bytes) -> Signature | None:
    """Return the signature in a file's first :data:`LENGTH` bytes, or None if it has no known signature."""
    if len(head) < _PAGE:
        return None
    if head[_PAGE - 10 : _PAGE] == b"SWAPSPACE2":
        version, last_page = struct.unpack_from("<II", head, 1024)
        return Signature("swap", (last_page + 1) * _PAGE) if version == 1 else None
    if head[_EXT_SUPERBLOCK + 0x38 :][:2] == _EXT_MAGIC:
        return _ext(head[_EXT_SUPERBLOCK : _EXT_SUPERBLOCK + 1024])
    if head.startswith(b"XFSB"):
        block, blocks = struct.unpack_from(">IQ", head, 4)
        return Signature("xfs", block * blocks, _text(head[108:120]))
    if head[510:512] != b"\x55\xaa":
        return None
    if head[3:11] == b"NTFS    ":
        (sector,) = struct.unpack_from("<H", head, 11)
        (sectors,) = struct.unpack_from("<Q", head, 40)
        return Signature("ntfs", sector * (sectors + 1))  # the last one is the boot sector's copy
    return _fat(head)


def _ext(superblock: bytes) -> Signature:
    (low,) = struct.unpack_from("<I", superblock, 0x4)
    (log_block,) = struct.unpack_from("<I", superblock, 0x18)
    compatible, incompatible = struct.unpack_from("<II", superblock, 0x5C)
    (high,) = struct.unpack_from("<I", superblock, 0x150)
    blocks = low | (high << 32 if incompatible & _EXT_64BIT else 0)
    if incompatible & _EXT_EXTENTS:
        kind = "ext4"
    else:
        kind = "ext3" if compatible & _EXT_HAS_JOURNAL else "ext2"
    size = blocks * (1024 << min(log_block, 6))
    return Signature(kind, size, _text(superblock[0x78:0x88]), superblock[0x68:0x78])


def _fat(head: bytes) -> Signature | None:
    (sector,) = struct.unpack_from("<H", head, 11)
    (few,) = struct.unpack_from("<H", head, 19)
    (many,) = struct.unpack_from("<I", head, 32)
    if head[82:90] == b"FAT32   ":
        label, identity = head[71:82], head[67:71]
    elif head[54:62] in (b"FAT12   ", b"FAT16   "):
        label, identity = head[43:54], head[39:43]
    else:
        return None
    return Signature("vfat", sector * (few or many), _text(label), identity)


def _text(field: bytes) -> str | None:
    return field.rstrip(b"\0 ").decode("utf-8", "replace") or None
