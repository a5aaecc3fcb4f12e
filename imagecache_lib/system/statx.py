# SPDX-License-Identifier: Apache-2.0
"""What statx(2) knows beyond stat(2): when a file was born, and whether a directory is where a mount begins.

Offsets and flags are those of linux/stat.h. Both answers are hints that a filesystem or an old kernel may not
have (``STATX_ATTR_MOUNT_ROOT`` came with Linux 5.8), and then they are 0 and False.
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
if _statx is not None:
    _statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)


class Statx:
    """Asks, again and again, into one buffer. Not to be shared between threads."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(_SIZE)
        self._address = ctypes.addressof(self._buffer)

    def _ask(self, directory_fd: int, name: bytes, flags: int) -> bool:
        return _statx is not None and _statx(directory_fd, name, flags, _BIRTH, self._address) == 0

    def born(self, fd: int) -> int:
        """Return when an open file was born, in nanoseconds, or 0 if the filesystem does not keep it."""
        return self._birth() if self._ask(fd, b"", _EMPTY_PATH) else 0

    def born_at(self, directory_fd: int, name: str) -> int:
        """Return when the file of that name was born, as :meth:`born`. A link is not followed."""
        return self._birth() if self._ask(directory_fd, os.fsencode(name), _NO_FOLLOW) else 0

    def _birth(self) -> int:
        if not _MASK.unpack_from(self._buffer)[0] & _BIRTH:
            return 0
        seconds, nanoseconds = _TIME.unpack_from(self._buffer, _BIRTH_AT)
        return int(seconds * 10**9 + nanoseconds)

    def of_directory(self, fd: int) -> tuple[bool, int]:
        """Return whether a mount, if only a bind mount, begins in an open directory, and when that was born.

        A kernel that cannot tell says that no mount begins there; another device shows most of them.
        """
        if not self._ask(fd, b"", _EMPTY_PATH):
            return False, 0
        known = _ATTRIBUTES.unpack_from(self._buffer, _ATTRIBUTES_MASK_AT)[0]
        return bool(
            known & _ATTRIBUTES.unpack_from(self._buffer, _ATTRIBUTES_AT)[0] & _MOUNT_ROOT
        ), self._birth()
