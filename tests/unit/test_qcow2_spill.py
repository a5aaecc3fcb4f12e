# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
import tempfile
import unittest
from typing import BinaryIO

from imagecache_lib.formats.qcow2.spill import Spill

MIB = 2**20


class SpillTest(unittest.TestCase):
    def setUp(self) -> None:
        self.opened: list[BinaryIO] = []
        self.spill = Spill(self.open_file)
        self.addCleanup(self.spill.close)

    def open_file(self) -> BinaryIO:
        self.opened.append(tempfile.TemporaryFile())  # noqa: SIM115 - the spill closes it
        return self.opened[-1]

    def test_little_stays_in_memory(self) -> None:
        self.spill.keep(1000, b"abc")
        self.spill.keep(1003, b"def")
        self.spill.keep(5000, b"x")
        self.assertEqual(self.spill.read(1001, 4), b"bcde")
        self.assertEqual(self.spill.read(5000, 1), b"x")
        self.assertEqual(self.opened, [])

    def test_what_was_not_kept_is_not_invented(self) -> None:
        self.spill.keep(1000, b"abc")
        self.spill.keep(2000, b"def")
        self.assertEqual(self.spill.read(999, 1), b"")
        self.assertEqual(self.spill.read(1003, 1), b"")
        self.assertEqual(self.spill.read(1002, 999), b"c")
        self.assertEqual(self.spill.read(2002, 9), b"f")
        self.assertEqual(self.spill.read(9000, 1), b"")

    def test_much_goes_to_one_file_and_reads_back(self) -> None:
        rng = random.Random(1)
        pieces = []
        offset = 0
        for _ in range(120):
            offset += rng.choice([0, 7, 70_000])
            piece = rng.randbytes(rng.choice([1, 1000, 300_000]))
            self.spill.keep(offset, piece)
            pieces.append((offset, piece))
            offset += len(piece)
            if rng.random() < 0.3:
                at, data = rng.choice(pieces)
                self.assertEqual(self.spill.read(at, len(data)), data)
        self.assertEqual(len(self.opened), 1)
        self.assertGreater(self.spill.spilled, 8 * MIB)
        for at, data in pieces:
            self.assertEqual(self.spill.read(at, len(data)), data)

    def test_closing_gives_the_space_back(self) -> None:
        self.spill.keep(0, bytes(9 * MIB))
        self.spill.close()
        self.assertTrue(self.opened[0].closed)
        self.assertEqual(self.spill.size, 0)
        self.assertEqual(self.spill.read(0, 1), b"")
