# SPDX-License-Identifier: Apache-2.0
"""The part of a stream that is looked at: chunks as they came, of which nothing is copied without need."""

from __future__ import annotations

from bisect import bisect_right

from imagecache_lib.system.sparse import Piece

#: Chunks smaller than this are joined, so that a source of tiny chunks does not make many of them.
_SMALL = 32 * 1024


class Window:
    """The bytes of a stream from an offset on.

    Bytes of one chunk are handed out as a reference to that chunk, which stays alive with it; only what lies
    across the border of two chunks is copied, and only for those that need it in one piece.
    """

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._starts: list[int] = []
        self._joining = bytearray()
        #: Offset in the stream behind the last byte.
        self.end = 0

    def add(self, chunk: bytes) -> None:
        """Take the next bytes of the stream."""
        if len(chunk) < _SMALL:
            self._joining += chunk
        else:
            self._settle()
            self._append(chunk, self.end)
        self.end += len(chunk)

    def one(self, start: int, stop: int) -> Piece:
        """Return bytes in one piece. They must be in the window."""
        self._settle()
        number = bisect_right(self._starts, start) - 1
        at = self._starts[number]
        if stop - at <= len(self._chunks[number]):
            return self._chunks[number], start - at, stop - at
        data = b"".join(chunk[first:last] for chunk, first, last in self.pieces(start, stop))
        return data, 0, len(data)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Return bytes in as many pieces as they came in. They must be in the window."""
        self._settle()
        found: list[Piece] = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            at, chunk = self._starts[number], self._chunks[number]
            last = min(stop - at, len(chunk))
            found.append((chunk, start - at, last))
            start = at + last
            number += 1
        return found

    def drop(self, upto: int) -> None:
        """Let go of the chunks that end before an offset of the stream."""
        self._settle()
        passed = 0
        while passed < len(self._chunks) and self._starts[passed] + len(self._chunks[passed]) <= upto:
            passed += 1
        del self._chunks[:passed], self._starts[:passed]

    def clear(self) -> None:
        """Let go of all chunks."""
        self._chunks.clear()
        self._starts.clear()
        self._joining.clear()

    def _settle(self) -> None:
        if self._joining:
            chunk = bytes(self._joining)
            self._joining.clear()
            self._append(chunk, self.end - len(chunk))

    def _append(self, chunk: bytes, start: int) -> None:
        self._starts.append(start)
        self._chunks.append(chunk)
