# SPDX-License-Identifier: Apache-2.0
"""Sums of granules, however the data comes, and what is believed of a stored one."""

from __future__ import annotations

import itertools
import os
import random
import tempfile
import unittest
import zlib

from imagecache_lib.store import checksums, evidence
from imagecache_lib.store.checksums import GRANULE
from imagecache_lib.system import sparse
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, CacheCase, disk_image, raw_image

BASE_ID = "0123456789abcdef" * 2


def sums_of(content: bytes, **options: checksums.Crc32) -> dict[int, int]:
    taken = checksums.Checksums(**options)
    taken.add(memoryview(content), 0)
    return by_granule(taken)


def by_granule(taken: checksums.Checksums) -> dict[int, int]:
    return {granule: taken.of(granule) for granule in taken.granules()}


class TestTaking(unittest.TestCase):
    def test_a_sum_is_zlibs_crc32_but_for_that_of_zeros(self) -> None:
        data = os.urandom(GRANULE)
        self.assertEqual({0: zlib.crc32(data) ^ zlib.crc32(bytes(GRANULE))}, sums_of(data))

    def test_pieces_in_any_order_sum_up_to_the_same(self) -> None:
        rng = random.Random(3)
        for _ in range(40):
            content = rng.randbytes(rng.randrange(1, 4 * GRANULE))
            cuts = sorted({0, len(content), *(rng.randrange(len(content)) for _ in range(rng.randrange(12)))})
            pieces = list(itertools.pairwise(cuts))
            rng.shuffle(pieces)
            taken = checksums.Checksums()
            for start, end in pieces:
                taken.add(memoryview(content)[start:end], start)
            self.assertEqual(sums_of(content), by_granule(taken))

    def test_zeros_count_for_nothing_wherever_they_are(self) -> None:
        data = os.urandom(5000)
        content = bytes(GRANULE + 100) + data + bytes(3 * GRANULE)
        taken = checksums.Checksums()
        taken.add(memoryview(data), GRANULE + 100)
        self.assertEqual(sums_of(content), by_granule(taken))
        self.assertEqual([1], list(taken.granules()))
        self.assertEqual(0, taken.of(10**9))

    def test_both_libraries_agree(self) -> None:
        content = os.urandom(3 * GRANULE + 77)
        self.assertEqual(sums_of(content, crc32=zlib.crc32), sums_of(content))

    def test_every_bit_counts(self) -> None:
        content = os.urandom(GRANULE)
        for bit in (0, 12345, 8 * GRANULE - 1):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            self.assertNotEqual(sums_of(content), sums_of(bytes(changed)))

    def test_what_is_written_sparsely_and_what_is_read_back_are_the_same(self) -> None:
        content = os.urandom(100_000) + bytes(300_000) + os.urandom(50_000) + bytes(5000)
        taken, read = checksums.Checksums(), checksums.Checksums()
        with tempfile.TemporaryFile() as file:
            out = sparse.SparseFile(file.fileno(), taken)
            for start in range(0, len(content), 17_000):
                out.write(content, start, start, min(start + 17_000, len(content)))
            out.truncate(len(content))
            read.read_back(file.fileno())
        self.assertEqual(sums_of(content), by_granule(taken))
        self.assertEqual(sums_of(content), by_granule(read))

    def test_nothing_is_left_once_it_is_cleared(self) -> None:
        taken = checksums.Checksums()
        taken.add(memoryview(b"x"), 0)
        taken.clear()
        self.assertEqual({}, by_granule(taken))


class TestOfBases(CacheCase):
    """What lies beside a record is of the very file, however it came."""

    def stored(self, image_id: str = ID) -> dict[int, int]:
        record = evidence.parse(self.record(image_id).read_bytes())
        assert record is not None
        found = checksums.parse(self.record(image_id).with_suffix(".sums").read_bytes(), record.base_id)
        assert found is not None
        return by_granule(found)

    def test_they_are_those_of_the_content_for_every_way_a_base_is_made(self) -> None:
        small_clusters = ("qcow2", "cluster_size=4k")
        for disk_format, options in (("raw", ""), ("qcow2", ""), small_clusters, ("vmdk", ""), ("vpc", "")):
            with self.subTest(disk_format, options=options):
                image_id = f"image-{disk_format}-{options}"
                image = raw_image(7)
                if disk_format != "raw":
                    image = disk_image(self.directory, disk_format, options=options)
                claimed = {"vpc": "vhd"}.get(disk_format, disk_format)
                self.manager(FakeSource({image_id: image}, disk_format=claimed)).cache_image(image_id)
                self.assertEqual(sums_of(self.base(image_id).read_bytes()), self.stored(image_id))

    def test_a_pass_that_is_begun_again_leaves_no_trace_in_them(self) -> None:
        self.source.break_at(1_000_000)
        self.source.refuses_resume = True
        self.manager(num_retries=3).cache_image(ID)
        self.assertEqual(sums_of(self.base().read_bytes()), self.stored())

    def test_they_go_with_their_base(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        manager.evict_image(ID)
        self.assertEqual([], os.listdir(self.record().parent))

    def test_a_crash_before_the_record_loses_neither(self) -> None:
        class Killed(BaseException):
            pass

        def kill() -> None:
            raise Killed

        self.points.at("publish:synced", kill)
        with self.assertRaises(Killed):
            self.manager().cache_image(ID)
        self.assertFalse(self.record().exists())
        self.manager().get_space()
        self.assertEqual(sums_of(self.base().read_bytes()), self.stored())


class TestStored(unittest.TestCase):
    def setUp(self) -> None:
        self.taken = checksums.Checksums()
        self.taken.add(memoryview(os.urandom(2 * GRANULE)), 0)
        self.taken.add(memoryview(os.urandom(700)), 2**40)
        self.taken.add(memoryview(bytes(700)), 2**41)
        self.stored = self.taken.to_bytes(BASE_ID)

    def test_they_come_back(self) -> None:
        found = checksums.parse(self.stored, BASE_ID)
        assert found is not None
        self.assertEqual(by_granule(self.taken), by_granule(found))

    def test_they_are_small_however_large_the_disk(self) -> None:
        self.assertLess(len(self.stored), 9000)

    def test_of_another_base_torn_or_changed_they_are_not_believed(self) -> None:
        self.assertIsNone(checksums.parse(self.stored, BASE_ID[::-1]))
        for torn in (b"", self.stored[:20], self.stored[:-1], self.stored[:-4], self.stored + b"\0"):
            self.assertIsNone(checksums.parse(torn, BASE_ID))
        for position in random.Random(4).sample(range(len(self.stored)), 50):
            changed = bytearray(self.stored)
            changed[position] ^= 0x40
            self.assertIsNone(checksums.parse(bytes(changed), BASE_ID))
