# SPDX-License-Identifier: Apache-2.0
"""Hashes of pieces: whatever the chunks are, and whatever becomes of the file."""

from __future__ import annotations

import hashlib
import random
import unittest

from hypothesis import given, settings
from hypothesis import strategies as st

from imagecache_lib import model
from imagecache_lib.store import pieces
from imagecache_lib.store.pieces import PIECE, Hasher, Pieces

DATA = random.Random(16).randbytes(3 * PIECE + 1000)
DIGEST = model.Digest("sha512", hashlib.sha512(DATA).hexdigest())
SIZES = st.sampled_from([0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, len(DATA) - 1, len(DATA)])
BASE_ID = "0123456789abcdef" * 2


def hashed(data: bytes) -> Hasher:
    hasher = Hasher()
    hasher.update(data)
    return hasher


def of(data: bytes) -> Pieces:
    return Pieces(DIGEST, len(data), hashed(data).all())


class TestHasher(unittest.TestCase):
    @settings(max_examples=30)
    @given(SIZES, st.lists(st.integers(0, 2 * PIECE), max_size=8))
    def test_chunks_of_any_length_give_the_hashes_of_the_pieces(self, size: int, lengths: list[int]) -> None:
        data, hasher, position = DATA[:size], Hasher(), 0
        for length in [*lengths, size]:
            hasher.update(data[position : position + length])
            position = min(size, position + length)
        expected = [hashlib.sha256(data[at : at + PIECE]).digest() for at in range(0, size, PIECE)]
        self.assertEqual(b"".join(expected), hasher.all())
        self.assertEqual((size, size // PIECE), (hasher.size, len(hasher)))
        self.assertEqual(pieces.count(size), len(of(data)))

    @settings(max_examples=40)
    @given(SIZES, st.integers(0, len(DATA) - 1))
    def test_the_first_wrong_piece_is_found_once_it_is_complete(self, came: int, wrong_at: int) -> None:
        wrong = bytearray(DATA)
        wrong[wrong_at] ^= 1
        piece = wrong_at // PIECE
        complete = came == len(DATA) or came >= (piece + 1) * PIECE
        found = hashed(bytes(wrong[:came])).first_difference(of(DATA))
        self.assertEqual(piece if complete else None, found)
        self.assertIsNone(hashed(DATA[:came]).first_difference(of(DATA)))


class TestStored(unittest.TestCase):
    @given(SIZES, st.sampled_from(["", BASE_ID]))
    def test_what_was_stored_is_read_again_for_the_same_base_only(self, size: int, base_id: str) -> None:
        stored = of(DATA[:size]).to_bytes(base_id)
        self.assertEqual(of(DATA[:size]), pieces.parse(stored, base_id))
        self.assertIsNone(pieces.parse(stored, "f" * 32))

    @given(st.integers(0, len(of(DATA).to_bytes())), st.binary(max_size=4), st.integers(0, 4))
    def test_a_torn_file_is_none(self, position: int, put: bytes, cut: int) -> None:
        stored = of(DATA).to_bytes(BASE_ID)
        torn = stored[:position] + put + stored[position + cut :]
        found = pieces.parse(torn, BASE_ID)
        self.assertEqual(of(DATA) if torn == stored else None, found)

    @given(st.binary(max_size=200))
    def test_any_bytes_are_read_without_an_error(self, data: bytes) -> None:
        self.assertIsNone(pieces.parse(data, BASE_ID))
        signed = data + hashlib.sha256(data).digest()
        self.assertIsNone(pieces.parse(signed, BASE_ID))


if __name__ == "__main__":
    unittest.main()
