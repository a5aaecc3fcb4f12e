# SPDX-License-Identifier: Apache-2.0
"""Filling a stage file with chunks as they come, beside the transfer that brings them."""

from __future__ import annotations

import dataclasses

from imagecache_lib.store.stage import Stage
from imagecache_lib.system.sparse import Piece
from imagecache_lib.system.translate import translated
from imagecache_lib.system.write_behind import WriteBehind


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A chunk that is written as it came."""

    offset: int
    data: bytes

    def pieces(self) -> list[tuple[int, Piece]]:
        return [(self.offset, (self.data, 0, len(self.data)))]


class InOrder:
    """Writes chunks one behind the other, on a thread of its own: what a stage file is filled with unchanged.

    Its methods raise NoSpaceError and BackendError, perhaps of a chunk before.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._behind = WriteBehind(stage.content, 1, "imagecache-write")
        #: Bytes so far.
        self.length = 0

    def write(self, chunk: bytes) -> None:
        """Take the next chunk."""
        with translated(self._stage.path):
            self._behind.put(_Chunk(self.length, chunk))
        self.length += len(chunk)

    def finish(self) -> None:
        """Wait until everything is written, and give the file its size."""
        with translated(self._stage.path):
            self._behind.drain()
            self._stage.content.truncate(self.length)

    def close(self) -> None:
        """End the thread. Nothing is written after that."""
        self._behind.close()
