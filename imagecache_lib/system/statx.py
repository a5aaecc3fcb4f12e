# SPDX-License-Identifier: Apache-2.0
"""What statx(2) knows beyond stat(2): when a file was born, and whether a directory is where a mount begins.

Offsets and flags are those of linux/stat.h. The answers are hints that a filesystem or an old kernel may not
have (``STATX_ATTR_MOUNT_ROOT`` and ``STATX_MNT_ID`` came with Linux 5.8), and then they are 0 and False.
"""

from __future__ import annotations

import ctypes
import os
import struct

_HERE = -100
_EMPTY_PATH = 0x1000
_NO_FOLLOW = 0x100
_BIRTH = 0x800
_MOUNT_ROOT = 0x2000
_IMMUTABLE = 0x10
_APPEND = 0x20
_MOUNT_ID = 0x1000
_SIZE = 256

# stx_mask at 0, stx_attributes at 8, stx_attributes_mask at 56, stx_btime at 80.
_FIELDS = struct.Struct("=I4xQ40xQ16xqI")

# stx_mask at 0, stx_dev at 136, stx_mnt_id at 144.
_PLACE = struct.Struct("=I132xIIQ")

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
        return self._read()[1] if self._ask(fd, b"", _EMPTY_PATH) else 0

    def born_at(self, directory_fd: int, name: str) -> int:
        """Return when the file of that name was born, as :meth:`born`. A link is not followed."""
        return self._read()[1] if self._ask(directory_fd, os.fsencode(name), _NO_FOLLOW) else 0

    def mount_at(self, path: str) -> tuple[int, int, int] | None:
        """Return what tells the mount that a path is on from the others of this mount namespace: its id, and
        the device's two numbers. Returns None if that cannot be asked. Links are followed.

        A kernel that does not tell the id has the device alone, which a bind mount shares.
        """
        wanted, name = _MOUNT_ID, os.fsencode(path)
        if _statx is None or _statx(_HERE, name, 0, wanted, self._address) != 0:
            return None
        mask, major, minor, mount = _PLACE.unpack_from(self._buffer)
        return (mount if mask & _MOUNT_ID else 0, major, minor)

    def is_fixed(self, path: str) -> bool:
        """Return whether a directory is append-only or immutable: what is in it cannot be renamed or removed.
        Links are followed. A filesystem that cannot tell has no such attributes."""
        if _statx is None or _statx(_HERE, os.fsencode(path), 0, 0, self._address) != 0:
            return False
        _mask, attributes, known, _seconds, _nanoseconds = _FIELDS.unpack_from(self._buffer)
        return bool(known & attributes & (_APPEND | _IMMUTABLE))

    def _read(self) -> tuple[bool, int]:
        """Return whether a mount begins there, and when it was born in nanoseconds, or 0."""
        mask, attributes, known, seconds, nanoseconds = _FIELDS.unpack_from(self._buffer)
        born = seconds * 10**9 + nanoseconds if mask & _BIRTH else 0
        return bool(known & attributes & _MOUNT_ROOT), born

    def mount_and_birth(self, fd: int) -> tuple[bool, int]:
        """Return whether a mount, if only a bind mount, begins at what is open, and when that was born.

        A kernel that cannot tell says that no mount begins there; another device shows most of them.
        """
        return self._read() if self._ask(fd, b"", _EMPTY_PATH) else (False, 0)
