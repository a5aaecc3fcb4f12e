# SPDX-License-Identifier: Apache-2.0
"""What statx(2) knows beyond stat(2): when a file was born, and whether a directory is where a mount begins.

Offsets and flags are those of linux/stat.h. Both answers are hints that a filesystem or an old kernel may not
have (``STATX_ATTR_MOUNT_ROOT`` came with Linux 5.8), and then they are 0 and None.
"""

from __future__ import annotations

import ctypes
import os
import struct

_EMPTY_PATH = 0x1000
_NO_FOLLOW = 0x100
_BIRTH = 0x800
_MOUNT_ROOT = 0x2000
_SIZE = 256

_MASK = struct.Struct("=I")
_ATTRIBUTES = struct.Struct("=Q")
_ATTRIBUTES_AT, _ATTRIBUTES_MASK_AT, _BIRTH_AT = 8, 56, 80
_TIME = struct.Struct("=qI")

_statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)


def _ask(directory_fd: int, name: bytes, flags: int) -> bytes | None:
    if _statx is None:
        return None
    answer = ctypes.create_string_buffer(_SIZE)
    failed = _statx(directory_fd, name, flags, ctypes.c_uint(_BIRTH), answer)
    return None if failed else answer.raw


def born(fd: int) -> int:
    """Return when an open file was born, in nanoseconds. 0: the filesystem does not keep it."""
    return _birth(_ask(fd, b"", _EMPTY_PATH))


def born_at(directory_fd: int, name: str) -> int:
    """Return when the file of that name was born, as :func:`born`. A link is not followed."""
    return _birth(_ask(directory_fd, os.fsencode(name), _NO_FOLLOW))


def _birth(answer: bytes | None) -> int:
    if answer is None or not _MASK.unpack_from(answer)[0] & _BIRTH:
        return 0
    seconds, nanoseconds = _TIME.unpack_from(answer, _BIRTH_AT)
    return int(seconds * 10**9 + nanoseconds)


def is_mount_root(fd: int) -> bool | None:
    """Whether a mount, if only a bind mount, begins in an open directory. None: the kernel cannot tell."""
    answer = _ask(fd, b"", _EMPTY_PATH)
    if answer is None or not _ATTRIBUTES.unpack_from(answer, _ATTRIBUTES_MASK_AT)[0] & _MOUNT_ROOT:
        return None
    return bool(_ATTRIBUTES.unpack_from(answer, _ATTRIBUTES_AT)[0] & _MOUNT_ROOT)
