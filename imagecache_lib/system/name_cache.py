# SPDX-License-Identifier: Apache-2.0
"""Names that the kernel finds although another host renamed or removed them: those of network filesystems.

A client of NFS, GlusterFS or CephFS trusts a name that it looked up for some seconds (``acdirmin`` of nfs(5),
``entry_timeout`` of FUSE), and stat(2) is answered from that. A listing is not: NFS asks the server when a
directory is opened, since it promises that much, and FUSE keeps no listings unless its server asks for it.
"""

from __future__ import annotations

import ctypes
import os
import struct

#: ``f_type`` in statfs(2) of filesystems that no other host can change: ext2 to ext4, xfs, btrfs, tmpfs,
#: f2fs, jfs, reiserfs and ramfs as linux/magic.h has them, and zfs and bcachefs as their own sources do.
_LOCAL = frozenset(
    {
        0xEF53,
        0x58465342,
        0x9123683E,
        0x01021994,
        0xF2F52010,
        0x3153464A,
        0x52654973,
        0x858458F6,
        0x2FC12FC1,
        0xCA451A4E,
    }
)

#: Larger than ``struct statfs`` on any machine. It begins with ``f_type``.
_SIZE = 256
_TYPE = struct.Struct("@l")

#: What a FUSE server's listing has for an inode that it does not tell: FUSE_UNKNOWN_INO in libfuse.
_UNKNOWN_INODE = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)


class NameCaches:
    """Knows of each filesystem whether its names may be stale, asked once for each device."""

    def __init__(self) -> None:
        self._found: dict[int, bool] = {}

    def may_be_stale(self, fd: int, device: int) -> bool:
        """Return whether a name on the filesystem of an open file may have been changed by another host.

        :param device: ``st_dev`` of the file.
        """
        found = self._found.get(device)
        if found is None:
            buffer = ctypes.create_string_buffer(_SIZE)
            failed = _libc.fstatfs(fd, buffer)
            found = self._found[device] = bool(failed) or _TYPE.unpack_from(buffer)[0] not in _LOCAL
        return found


def is_listed(path: str, inode: int) -> bool:
    """Return whether a path's directory lists its name now, and lists it for this inode.

    :raises OSError: the directory cannot be listed.
    """
    directory, name = os.path.split(path)
    with os.scandir(directory) as entries:
        found = next((entry.inode() for entry in entries if entry.name == name), None)
    return found in (inode, _UNKNOWN_INODE)
