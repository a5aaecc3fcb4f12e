# SPDX-License-Identifier: Apache-2.0
"""Zeros become holes, and what is written is exact, wherever it begins."""

from __future__ import annotations

import os
import random
import tempfile
import unittest

from imagecache_lib.system import sparse

BLOCK = sparse.BLOCK
MIB = 2**20


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
                out = sparse.SparseFile(file.fileno())
                out.write(data, offset, start, end)
                written = os.fstat(file.fileno()).st_size
                out.truncate(offset + end - start)
                file.seek(offset)
                self.assertEqual(file.read(), data[start:end])
                self.assertEqual(written, self.end_of_last_block_with_data(data[start:end], offset))

    @staticmethod
    def end_of_last_block_with_data(data: bytearray, offset: int) -> int:
        end, position = 0, 0
        while position < len(data):
            stop = position + BLOCK - (offset + position) % BLOCK
            block = data[position:stop]
            if any(block):
                end = offset + position + len(block)
            position = stop
        return end

    def test_a_hole_takes_no_space(self) -> None:
        with tempfile.TemporaryFile() as file:
            sparse.SparseFile(file.fileno()).write(b"\1" + bytes(4 * MIB) + b"\1", 0)
            self.assertEqual(os.fstat(file.fileno()).st_size, 4 * MIB + 2)
            self.assertLessEqual(os.fstat(file.fileno()).st_blocks * 512, 4 * BLOCK)
