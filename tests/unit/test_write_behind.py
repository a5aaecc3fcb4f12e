# SPDX-License-Identifier: Apache-2.0
"""Writing beside who hands over: everything arrives, errors are told, nothing is written after the end."""

from __future__ import annotations

import threading
import unittest
from collections.abc import Iterable

from imagecache_lib.system.sparse import Buffer, Piece
from imagecache_lib.system.write_behind import WriteBehind


class Offset:
    """A batch of one byte at an offset."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def pieces(self) -> list[tuple[int, Piece]]:
        return [(self._offset, (b"x", 0, 1))]


class Remembering:
    """A sink that remembers offsets, fails at some, and waits at others."""

    def __init__(self, *, fails_at: int | None = None, waits_at: int | None = None) -> None:
        self.offsets: list[int] = []
        self.waits = threading.Event()
        self.goes_on = threading.Event()
        self._fails_at = fails_at
        self._waits_at = waits_at

    def write(self, data: Buffer, offset: int, start: int = 0, end: int | None = None) -> None:
        raise NotImplementedError

    def write_pieces(self, pieces: Iterable[tuple[int, Piece]]) -> None:
        for offset, _piece in pieces:
            if offset == self._fails_at:
                raise OSError("full")
            if offset == self._waits_at:
                self.waits.set()
                self.goes_on.wait(60)
            self.offsets.append(offset)

    def truncate(self, size: int) -> None:
        raise NotImplementedError


class TestWriteBehind(unittest.TestCase):
    def behind(self, sink: Remembering, threads: int) -> WriteBehind:
        found = WriteBehind(sink, threads, "test")
        self.addCleanup(found.close)
        self.addCleanup(sink.goes_on.set)
        return found

    def test_everything_is_written_once_by_the_time_it_is_drained(self) -> None:
        for threads in (1, 3):
            sink = Remembering()
            behind = self.behind(sink, threads)
            for offset in range(500):
                behind.put(Offset(offset))
            behind.drain()
            self.assertEqual(sorted(sink.offsets), list(range(500)))

    def test_one_thread_writes_in_order(self) -> None:
        sink = Remembering()
        behind = self.behind(sink, 1)
        for offset in range(100):
            behind.put(Offset(offset))
        behind.drain()
        self.assertEqual(sink.offsets, list(range(100)))

    def test_a_failure_reaches_who_hands_over_and_nothing_is_written_behind_it(self) -> None:
        sink = Remembering(fails_at=3)
        behind = self.behind(sink, 1)
        with self.assertRaisesRegex(OSError, "full"):
            for offset in range(100):
                behind.put(Offset(offset))
        with self.assertRaisesRegex(OSError, "full"):
            behind.drain()
        self.assertEqual(sink.offsets, [0, 1, 2])

    def test_a_failure_of_the_last_batch_is_told_at_the_end(self) -> None:
        behind = self.behind(Remembering(fails_at=0), 2)
        behind.put(Offset(0))
        with self.assertRaisesRegex(OSError, "full"):
            behind.drain()

    def test_what_was_not_begun_is_dropped_when_it_is_closed_and_nothing_is_written_later(self) -> None:
        sink = Remembering(waits_at=0)
        behind = self.behind(sink, 1)
        behind.put(Offset(0))
        behind.put(Offset(1))
        self.assertTrue(sink.waits.wait(60))
        closing = threading.Thread(target=behind.close)
        closing.start()
        closing.join(0.05)
        self.assertTrue(closing.is_alive(), "it does not return while a thread writes")
        sink.goes_on.set()
        closing.join(60)
        self.assertFalse(closing.is_alive())
        self.assertEqual(sink.offsets, [0])

    def test_who_hands_over_waits_while_much_is_on_its_way(self) -> None:
        sink = Remembering(waits_at=0)
        behind = self.behind(sink, 1)
        handed: list[int] = []

        def hand_over() -> None:
            for offset in range(20):
                behind.put(Offset(offset))
                handed.append(offset)

        thread = threading.Thread(target=hand_over)
        thread.start()
        self.assertTrue(sink.waits.wait(60))
        thread.join(0.05)
        self.assertLess(len(handed), 5)
        sink.goes_on.set()
        thread.join(60)
        behind.drain()
        self.assertEqual(sink.offsets, list(range(20)))
