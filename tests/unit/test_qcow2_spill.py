# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
import tempfile
import unittest
from typing import BinaryIO

from imagecache_lib.qcow2.sparse import BLOCK, pwrite_sparse
from imagecache_lib.qcow2.spill import Spill

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


class SparseWrites(unittest.TestCase):
    def test_zeros_stay_holes_and_the_rest_is_exact(self) -> None:
        rng = random.Random(2)
        for _ in range(60):
            parts = [
                rng.choice([bytes(BLOCK), bytes(BLOCK - 1) + b"\1", rng.randbytes(700), bytes(100)])
                for _ in range(9)
            ]
            data = bytearray(b"".join(parts))
            start, offset = rng.randrange(2000), rng.choice([0, BLOCK, 512])
            end = rng.randrange(start, len(data))
            with tempfile.TemporaryFile() as file:
                pwrite_sparse(file.fileno(), data, offset, start, end)
                written = os.fstat(file.fileno()).st_size
                file.truncate(offset + end - start)
                file.seek(offset)
                self.assertEqual(file.read(), data[start:end])
                self.assertEqual(written, self.end_of_last_block_with_data(data[start:end], offset))

    @staticmethod
    def end_of_last_block_with_data(data: bytearray, offset: int) -> int:
        end = 0
        for position in range(0, len(data), BLOCK):
            block = data[position : position + BLOCK]
            if any(block):
                end = offset + position + len(block)
        return end

    def test_a_hole_takes_no_space(self) -> None:
        with tempfile.TemporaryFile() as file:
            pwrite_sparse(file.fileno(), b"\1" + bytes(4 * MIB) + b"\1", 0)
            self.assertEqual(os.fstat(file.fileno()).st_size, 4 * MIB + 2)
            self.assertLessEqual(os.fstat(file.fileno()).st_blocks * 512, 4 * BLOCK)
