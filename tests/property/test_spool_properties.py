# SPDX-License-Identifier: Apache-2.0
"""A spool under any order of appending, cutting and reading gives out the bytes that are right, or none."""

from __future__ import annotations

import hashlib
import random
import tempfile
import unittest

from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagecache_lib import model
from imagecache_lib.config import CacheConfig
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.evictor import NoEvictor
from imagecache_lib.store.pieces import PIECE, Hasher, Pieces
from imagecache_lib.store.spool import Spool, SpoolCut, SpoolReader, Spools
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter

DATA = random.Random(7).randbytes(4 * PIECE + 777)
IMAGE = model.Image("image", size=len(DATA), digest=model.Digest("sha512", hashlib.sha512(DATA).hexdigest()))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 2 * PIECE)),
        st.tuples(st.just("cut"), st.integers(0, 4)),
        st.tuples(st.just("read"), st.integers(0, len(DATA) - 1)),
        st.tuples(st.just("spoil"), st.integers(0, len(DATA) - 1)),
    ),
    max_size=25,
)


def known() -> Pieces:
    hasher = Hasher()
    hasher.update(DATA)
    assert IMAGE.digest is not None
    return Pieces(IMAGE.digest, len(DATA), hasher.all())


class TestSpool(unittest.TestCase):
    def setUp(self) -> None:
        directory = self.enterContext(tempfile.TemporaryDirectory())
        self.cache = CacheStore(CacheConfig(instances_path=directory), System(name="here"))
        self.cache.start()
        self.spools = Spools(self.cache, NoEvictor())

    def spool(self) -> Spool:
        self.spools.close()
        return self.spools.open(IMAGE, Waiter(self.cache.host))

    @settings(max_examples=60)
    @given(STEPS)
    @example([("append", 1), ("cut", 1), ("append", PIECE)])
    def test_what_is_read_is_what_came_and_a_wrong_piece_is_found(self, steps: list[tuple[str, int]]) -> None:
        spool, sent = self.spool(), bytearray()
        with spool.reading() as reader:
            for what, number in steps:
                if what == "append":
                    chunk = DATA[len(sent) : len(sent) + number]
                    spool.append(chunk, f"host-{number % 3}")
                    sent += chunk
                elif what == "spoil" and len(sent) < len(DATA):
                    spool.append(bytes([DATA[len(sent)] ^ 1]), "wrong")
                    sent.append(DATA[len(sent)] ^ 1)
                elif what == "cut":
                    spool.cut(number * PIECE)
                    del sent[number * PIECE :]
                elif what == "read":
                    self.read(spool, reader, number, sent)
                self.assertEqual(len(sent), spool.have)
            wrong = [at for at, byte in enumerate(sent) if byte != DATA[at]]
            first = spool.learn(known())
            complete = len(sent) == len(DATA) or (wrong and wrong[0] // PIECE < len(sent) // PIECE)
            self.assertEqual(wrong[0] // PIECE if wrong and complete else None, first)
            if first is not None:
                self.assertIsNotNone(spool.supplier_of(first * PIECE))

    def read(self, spool: Spool, reader: SpoolReader, offset: int, sent: bytearray) -> None:
        if spool.cuts != reader.cuts:
            with self.assertRaises(SpoolCut):
                reader.read(offset, 1000, 0.0)
        else:
            self.assertEqual(bytes(sent[offset : offset + 1000]), reader.read(offset, 1000, 0.0))

    def test_a_reader_that_waits_is_told_when_the_spool_closes(self) -> None:
        spool = self.spool()
        with spool.reading() as reader:
            spool.close()
            with self.assertRaises(SpoolCut):
                reader.read(0, 10, 60.0)


if __name__ == "__main__":
    unittest.main()
