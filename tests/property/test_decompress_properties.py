# SPDX-License-Identifier: Apache-2.0
"""Rules of unpacking that hold for any bytes, any damage and any cut into chunks."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import unittest
from collections.abc import Callable, Mapping

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from imagecache_lib import errors
from imagecache_lib.ingest import decompress
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter
from tests.support.chain import Collected, EndlessRoom

PACK: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    "bzip2": bz2.compress,
}
NAMES = st.sampled_from(sorted(PACK))
CUTS = st.lists(st.integers(0, 10**6), max_size=9)


def unpack(packed: bytes, compression: str, cuts: list[int]) -> bytes:
    found = Collected()
    waiter = Waiter(System(name="here"))
    unpacking = decompress.Unpacking(compression, found, waiter=waiter, most=2**20, reservation=EndlessRoom())
    edges = sorted({0, len(packed), *(cut % (len(packed) + 1) for cut in cuts)})
    for first, last in itertools.pairwise(edges):
        unpacking.feed(packed[first:last])
    unpacking.finish()
    return b"".join(found.pieces)


class TestUnpacking(unittest.TestCase):
    @given(
        NAMES,
        st.lists(st.binary(max_size=5000), min_size=1, max_size=4),
        st.lists(st.integers(0, 10**6), max_size=9),
    )
    def test_members_are_unpacked_however_they_are_cut(
        self, name: str, parts: list[bytes], cuts: list[int]
    ) -> None:
        packed = b"".join(PACK[name](part) for part in parts)
        self.assertEqual(b"".join(parts), unpack(packed, name, cuts))
        self.assertEqual(b"".join(parts), unpack(packed, decompress.ANY, cuts))

    @settings(max_examples=400)
    @given(NAMES, st.binary(max_size=2000), st.data())
    def test_damage_is_refused_or_does_no_harm(self, name: str, content: bytes, data: st.DataObject) -> None:
        packed = bytearray(PACK[name](content))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, max(0, len(packed) - 1)))
            end = at + data.draw(st.integers(0, 8))
            packed[at:end] = data.draw(st.binary(max_size=8))
        try:
            found = unpack(bytes(packed), name, [])
        except errors.ImageRejected:
            return
        self.assertIn(found, (content, b""))

    @given(st.sampled_from([*sorted(PACK), decompress.ANY]), st.binary(max_size=300))
    def test_any_bytes_are_unpacked_or_refused(self, name: str, packed: bytes) -> None:
        try:
            unpack(packed, name, [])
        except errors.ImageRejected as error:
            self.assertIsNotNone(error.next_step)
