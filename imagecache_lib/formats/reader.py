# SPDX-License-Identifier: Apache-2.0
"""Reading an image at any offset: the part of it that has arrived, or the whole file."""

from __future__ import annotations

import os
import stat
from typing import Protocol, Self

from imagecache_lib import errors
from imagecache_lib.system.descriptor import Descriptor


class NeedMore(Exception):
    """What was asked for has not arrived yet.

    :param needed: bytes of the image, from its start, that hold it.
    """

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class Reader(Protocol):
    """An image's bytes."""

    @property
    def size(self) -> int | None:
        """Length of the whole image in bytes, or None while that is not known."""

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the image; fewer than asked for where it ends.

        :raises NeedMore: they have not arrived yet.
        """


class Prefix:
    """The beginning of an image.

    :param whole: whether these bytes are all of the image.
    """

    def __init__(self, data: bytes | bytearray, *, whole: bool = False) -> None:
        self._data = data
        self._whole = whole

    @property
    def size(self) -> int | None:
        return len(self._data) if self._whole else None

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > len(self._data) and not self._whole:
            raise NeedMore(offset + length)
        return bytes(self._data[offset : offset + length])


class OpenFile:
    """A whole image in a file.

    :param file: a descriptor that is open for reading and that its owner closes, or one that :meth:`close`
        closes.
    """

    def __init__(self, file: int | Descriptor) -> None:
        self._file = file

    @property
    def _fd(self) -> int:
        return self._file if isinstance(self._file, int) else self._file.fd

    @classmethod
    def at(cls, path: str) -> Self:
        """Open a regular file.

        :raises BackendError: the path does not lead to a regular file.
        :raises OSError: the file cannot be opened.
        """
        # A FIFO in the disk's place must not make this process wait for a writer.
        file = Descriptor(path, os.O_RDONLY | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(file.fd).st_mode):
            file.close()
            raise errors.BackendError("it is no regular file", path=path)
        return cls(file)

    @property
    def size(self) -> int | None:
        return os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        # An offset that a header states may be more than the kernel takes.
        return os.pread(self._fd, length, offset) if offset < 2**62 else b""

    def close(self) -> None:
        if isinstance(self._file, Descriptor):
            self._file.close()
