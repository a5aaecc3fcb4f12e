# SPDX-License-Identifier: Apache-2.0
"""What a stream passed before a table told whether it is wanted: a little in memory, more in a file."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable
from typing import BinaryIO

# Refcount tables and blocks come before any L1 table: with clusters of 2 MiB these are 4 MiB.
_IN_MEMORY = 8 * 2**20
_WRITE_BUFFER = 2**20
#: Pieces whose place is remembered; beyond, everything is kept, which makes one long piece.
_MAX_PIECES = 2**19


class Spill:
    """Bytes of the stream, kept by their offset in it.

    :param open_file: opens an empty file for reading and writing, preferably unlinked. Called at most once,
        and only if more than 8 MiB have to be kept.
    """

    def __init__(self, open_file: Callable[[], BinaryIO]) -> None:
        self._open_file = open_file
        self._file: BinaryIO | None = None
        self._buffer = bytearray()
        self._written = 0
        # Piece i came from offset starts[i] and lies at positions[i] here, up to where piece i + 1 lies.
        self._starts = array("Q")
        self._positions = array("Q")
        self._end = 0
        #: Bytes that went to the side file, ever.
        self.spilled = 0

    @property
    def size(self) -> int:
        """Number of bytes that are kept."""
        return self._written + len(self._buffer)

    @property
    def crowded(self) -> bool:
        """Whether the pieces are so many that from now on everything must be kept."""
        return len(self._starts) >= _MAX_PIECES

    def keep(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Keep bytes; offsets only ever grow."""
        if not self._starts or offset != self._end:
            self._starts.append(offset)
            self._positions.append(self._written + len(self._buffer))
        self._buffer += data
        self._end = offset + len(data)
        if len(self._buffer) >= (_WRITE_BUFFER if self._file else _IN_MEMORY):
            self._flush()

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the stream; fewer than ``length`` where a byte was not kept."""
        piece = bisect_right(self._starts, offset) - 1
        if piece < 0:
            return b""
        position = self._positions[piece] + offset - self._starts[piece]
        last = self._positions[piece + 1] if piece + 1 < len(self._positions) else self.size
        length = min(length, last - position)
        if length <= 0:
            return b""
        if position >= self._written:
            return bytes(self._buffer[position - self._written : position - self._written + length])
        self._flush()
        return self._read_file(position, length)

    def close(self) -> None:
        """Drop all bytes that are kept, and close the side file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._buffer = bytearray()
        self._written = 0
        del self._starts[:], self._positions[:]

    def _read_file(self, position: int, length: int) -> bytes:
        assert self._file is not None
        data = os.pread(self._file.fileno(), length, position)
        while len(data) < length:
            more = os.pread(self._file.fileno(), length - len(data), position + len(data))
            if not more:
                raise OSError("the side file is shorter than what was written to it")
            data += more
        return data

    def _flush(self) -> None:
        if self._file is None:
            self._file = self._open_file()
        with memoryview(self._buffer) as view:
            done = 0
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], self._written + done)
        self._written += len(self._buffer)
        self.spilled += len(self._buffer)
        self._buffer = bytearray()
