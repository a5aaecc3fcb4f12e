# SPDX-License-Identifier: Apache-2.0
"""Unpacking what arrives compressed: as the programs themselves unpack it, within bounds, however hostile."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import lzma
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
import unittest
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import zstandard

from imagecache_lib import errors, model
from imagecache_lib.config import CacheConfig
from imagecache_lib.ingest import decompress
from imagecache_lib.ingest.stream import Consumer, Content
from imagecache_lib.store import evidence
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter
from tests.support import needs
from tests.support.chain import Collected, Counted, EndlessRoom

MIB = 2**20
CONFIG = CacheConfig(instances_path="/instances")
#: Data, a hole, data: neither packs to nothing nor not at all.
DATA = random.Random(9).randbytes(20_000) + bytes(300_000) + bytes(range(256)) * 100

PACK: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    "bzip2": bz2.compress,
}


def skippable_frame(content: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A53, len(content)) + content


class CancelledLater:
    """A token of a caller that does not wait any more once it was looked at so many times."""

    def __init__(self, *, looks: int) -> None:
        self._looks = looks

    def is_set(self) -> bool:
        self._looks -= 1
        return self._looks < 0


class UnpackingCase(unittest.TestCase):
    def setUp(self) -> None:
        self.room = EndlessRoom()

    def unpacking(
        self,
        compression: str,
        following: Consumer[Content],
        *,
        most: int = 2**40,
        cancel: model.CancelToken | None = None,
    ) -> decompress.Unpacking:
        waiter = Waiter(System(name="here"), cancel=cancel)
        return decompress.Unpacking(compression, following, waiter=waiter, most=most, reservation=self.room)

    def unpack(
        self, packed: bytes, compression: str = decompress.ANY, *, step: int = MIB, **options: Any
    ) -> bytes:
        found = Collected()
        unpacking = self.unpacking(compression, found, **options)
        for start in range(0, len(packed), step):
            unpacking.feed(packed[start : start + step])
        unpacking.finish()
        self.assertLessEqual(max(map(len, found.pieces), default=0), decompress.PIECE)
        return b"".join(found.pieces)

    def refused(self, packed: bytes, compression: str, words: str, **options: Any) -> None:
        with self.assertRaisesRegex(errors.ImageRejected, words) as caught:
            self.unpack(packed, compression, **options)
        self.assertIsNotNone(caught.exception.next_step)


class TestGoodData(UnpackingCase):
    def test_is_what_was_packed_however_it_arrives(self) -> None:
        for name, pack in PACK.items():
            packed = pack(DATA)
            for step in (MIB, 65_536, 4099, 7):
                with self.subTest(name=name, step=step):
                    self.assertEqual(DATA, self.unpack(packed, name, step=step))
            small = pack(b"x")
            self.assertEqual(b"x", self.unpack(small, name, step=1))

    def test_is_not_handed_on_in_pieces_of_which_each_costs_more_than_its_bytes(self) -> None:
        data = random.Random(3).randbytes(2**17)  # packs not at all
        for name, pack in PACK.items():
            found = Collected()
            self.unpacking(name, found).feed(pack(data))
            with self.subTest(name=name):
                self.assertLess(len([piece for piece in found.pieces if piece]), 20)

    def test_the_first_bytes_tell_how_it_is_packed(self) -> None:
        for name, pack in PACK.items():
            found = Collected()
            unpacking = self.unpacking(decompress.ANY, found)
            unpacking.feed(pack(DATA))
            self.assertEqual(f"raw+{name}", unpacking.finish().source_format)
            self.assertEqual(DATA, b"".join(found.pieces))

    def test_of_nothing_is_nothing(self) -> None:
        for name, pack in PACK.items():
            self.assertEqual(b"", self.unpack(pack(b""), name))

    def test_members_one_after_the_other_are_one_stream(self) -> None:
        for name, pack in PACK.items():
            packed = pack(DATA[:1000]) + pack(b"") + pack(DATA[1000:])
            for step in (MIB, 5):
                with self.subTest(name=name, step=step):
                    self.assertEqual(DATA, self.unpack(packed, name, step=step))

    def test_xz_may_be_padded_by_fours(self) -> None:
        pack = PACK["xz"]
        for step in (MIB, 3):
            packed = pack(DATA[:10]) + bytes(4) + pack(DATA[10:]) + bytes(512)
            self.assertEqual(DATA, self.unpack(packed, "xz", step=step))
            self.refused(pack(DATA) + bytes(3), "xz", "something else", step=step)
            self.refused(pack(DATA[:10]) + bytes(6) + pack(DATA), "xz", "something else", step=step)

    def test_zstandard_frames_without_content_are_passed_over(self) -> None:
        pack = PACK["zstd"]
        packed = skippable_frame(b"index") + pack(DATA[:9]) + skippable_frame(b"x" * 5000) + pack(DATA[9:])
        for step in (MIB, 3):
            self.assertEqual(DATA, self.unpack(packed, "zstd", step=step))

    def test_a_frame_without_content_tells_that_it_is_zstandard(self) -> None:
        for step in (MIB, 1):
            packed = skippable_frame(b"how long the frames are") + PACK["zstd"](DATA[:999])
            self.assertEqual(DATA[:999], self.unpack(packed, decompress.ANY, step=step))
        with self.assertRaisesRegex(errors.ImageRejected, "something else follows"):
            self.unpack(skippable_frame(b"x") + b"\x04\x22\x4d\x18" + DATA)  # of lz4

    def test_of_the_strongest_settings_of_the_programs_is_unpacked(self) -> None:
        for command, name in (
            (["gzip", "-9"], "gzip"),
            (["xz", "-9e", "-T1"], "xz"),
            (["bzip2", "-9"], "bzip2"),
        ):
            program = [needs.program(command[0]), *command[1:], "-c"]
            packed = subprocess.run(program, input=DATA, capture_output=True, check=True).stdout
            self.assertEqual(DATA, self.unpack(packed, name), name)
        strongest = zstandard.ZstdCompressionParameters.from_level(22, window_log=27)
        pack = zstandard.ZstdCompressor(compression_params=strongest).compressobj()
        self.assertEqual(DATA, self.unpack(pack.compress(DATA) + pack.flush(), "zstd"))

    def test_room_is_reserved_as_it_grows_for_what_is_no_zeros(self) -> None:
        data = random.Random(1).randbytes(MIB)
        self.unpack(gzip.compress(data + bytes(200 * MIB), 1), "gzip")
        self.assertEqual([True], [MIB <= amount < 200 * MIB for amount in self.room.amounts])
        self.room.amounts.clear()
        self.unpack(gzip.compress(b"x" * (130 * MIB), 1), "gzip")
        self.assertGreaterEqual(self.room.amounts[-1], 130 * MIB)
        self.assertEqual(sorted(self.room.amounts), self.room.amounts)


class TestHostileData(UnpackingCase):
    def test_that_ends_early_is_refused(self) -> None:
        for name, pack in PACK.items():
            packed = pack(DATA)
            for end in (1, 5, 6, 20, len(packed) // 2, len(packed) - 1):
                with self.subTest(name=name, end=end):
                    self.refused(packed[:end], name, "ends early|does not begin")

    def test_that_something_follows_is_refused(self) -> None:
        for name, pack in PACK.items():
            for trailing in (
                b"x",
                b"garbage",
                pack(DATA)[:8] if name != "gzip" else b"\x1f\x8b\x09rest",
                b"\0\0\0",
            ):
                with self.subTest(name=name, trailing=trailing):
                    self.refused(pack(DATA) + trailing, name, "something else|ends early|cannot be unpacked")

    def test_that_is_damaged_is_refused_or_unpacks_to_the_same(self) -> None:
        numbers = random.Random(2)
        for name, pack in PACK.items():
            packed = pack(DATA)
            for _ in range(100):
                at = numbers.randrange(len(packed))
                changed = packed[at] ^ (1 << numbers.randrange(8))
                damaged = packed[:at] + bytes([changed]) + packed[at + 1 :]
                with self.subTest(name=name, at=at):
                    try:
                        self.assertEqual(DATA, self.unpack(damaged, name))
                    except errors.ImageRejected:
                        continue

    def test_that_is_packed_in_another_way_than_was_said_is_refused(self) -> None:
        for name in PACK:
            for other, pack in PACK.items():
                if other != name:
                    self.refused(pack(DATA), name, "does not begin")
        for data in (b"", b"x", b"not packed at all", DATA):
            if data:
                self.refused(data, decompress.ANY, "does not begin")

    def test_bombs_are_cut_at_the_size(self) -> None:
        zeros = bytes(16 * MIB)
        for name, pack in PACK.items():
            with self.subTest(name=name):
                self.refused(pack(zeros), name, "more than 1.0 MiB", most=MIB)

    def test_bombs_are_cut_at_the_ratio(self) -> None:
        frames = PACK["zstd"](bytes(256 * MIB)) * 8
        with self.assertRaisesRegex(errors.ImageRejected, "unpack to more than"):
            self.unpacking("zstd", Counted()).feed(frames)

    def test_bombs_take_no_memory(self) -> None:
        # One Zstandard frame of blocks that each repeat a byte 131072 times: 4 bytes make 128 KiB.
        blocks = struct.pack("<I", 131072 << 3 | 1 << 1)[:3] + b"x"
        frame = struct.pack("<I", 0xFD2FB528) + bytes((0x00, 0x58)) + blocks * 40_000
        zeros = bytes(128 * MIB)
        bombs = {"zstd": frame, "gzip": gzip.compress(zeros, 1), "xz": lzma.compress(zeros, preset=0)}
        for name, packed in bombs.items():
            unpacking = self.unpacking(name, Counted(), most=100 * MIB)
            tracemalloc.start()
            with self.subTest(name=name), self.assertRaises(errors.ImageRejected):
                unpacking.feed(packed)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.assertLess(peak, 80 * MIB, name)

    def test_windows_beyond_the_limit_are_refused(self) -> None:
        wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
        pack = zstandard.ZstdCompressor(compression_params=wide).compressobj()
        self.refused(pack.compress(DATA) + pack.flush(), "zstd", "cannot be unpacked")
        for beyond in (64 * MIB + 1, 96 * MIB, 128 * MIB):
            self.refused(self.xz(beyond), "xz", "cannot be unpacked")

    def test_a_dictionary_of_64_mib_is_the_largest_of_xz(self) -> None:
        self.assertEqual(DATA, self.unpack(self.xz(64 * MIB), "xz"))
        with_filters = self.xz(64 * MIB, {"id": lzma.FILTER_X86}, {"id": lzma.FILTER_DELTA, "dist": 256})
        self.assertEqual(DATA, self.unpack(with_filters, "xz"))

    def xz(self, dictionary: int, *before: dict[str, int]) -> bytes:
        # The smallest effort, since its tables are what packing takes memory and time for.
        last = {"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": dictionary}
        return lzma.compress(DATA, check=lzma.CHECK_SHA256, filters=[*before, last])

    def test_lzma_without_the_container_of_xz_is_refused(self) -> None:
        self.refused(lzma.compress(DATA, lzma.FORMAT_ALONE), "xz", "does not begin")

    def test_a_zlib_stream_is_no_gzip(self) -> None:
        self.refused(zlib.compress(DATA), "gzip", "does not begin")

    def test_a_caller_may_cancel_between_any_two_pieces(self) -> None:
        cancel = threading.Event()
        cancel.set()
        for name, pack in PACK.items():
            with self.subTest(name=name), self.assertRaises(errors.CancelledError):
                self.unpack(pack(bytes(4 * MIB)), name, cancel=cancel)

    def test_a_caller_may_cancel_within_one_chunk_of_members_without_content(self) -> None:
        for name, pack in PACK.items():
            packed = pack(b"")
            unpacking = self.unpacking(name, Collected(), cancel=CancelledLater(looks=1))
            with self.subTest(name=name), self.assertRaises(errors.CancelledError):
                unpacking.feed(packed * (MIB // len(packed)))

    def test_what_follows_a_member_is_not_copied_for_each_of_many(self) -> None:
        """What a member left over is asked for once: its length shows what was copied."""
        packed = gzip.compress(bytes(decompress.LEAST_PER_MEMBER))
        unpacking = self.unpacking("gzip", Counted())
        copied: list[int] = []

        def note(frame: types.FrameType, event: str, left: object) -> None:
            if event == "return" and frame.f_code is unused and isinstance(left, bytes):
                copied.append(len(left))

        unused = decompress._Gzip.unused.fget.__code__  # type: ignore[attr-defined]
        sys.setprofile(note)
        try:
            unpacking.feed(packed * (MIB // len(packed)))
        finally:
            sys.setprofile(None)
        self.assertEqual(MIB // len(packed), len(copied))
        self.assertLess(sum(copied), MIB * 2**11)

    def test_members_that_are_nearly_empty_are_no_more_than_thousands(self) -> None:
        most = decompress.MANY_MEMBERS
        for name, pack in PACK.items():
            self.assertEqual(b"x" * 2000, self.unpack(pack(b"x") * 2000, name))
            self.refused(pack(b"x") * (most + 10), name, f"{most + 3} members make 9.8 KiB only")
        frames = PACK["zstd"](b"x") + skippable_frame(b"") * (most + 10)
        self.refused(frames, "zstd", "members make 1 B only")


class TestWhatIsUnpacked(unittest.TestCase):
    def compression(
        self, use: evidence.Use = evidence.Use.DISK, *, allowed: bool = False, **fields: Any
    ) -> str | None:
        config = dataclasses.replace(CONFIG, decompress_images=allowed)
        return decompress.compression_of(model.Image("x", **fields), use, config)

    def test_plain_containers_are_taken_as_they_come(self) -> None:
        for container in (None, "bare", "ovf", "ami", "aki", "ari"):
            self.assertIsNone(self.compression(container_format=container))

    def test_containers_that_are_no_disks_are_refused_with_what_to_do(self) -> None:
        for container in ("ova", "docker", "OVA", "compressed"):
            with (
                self.subTest(container=container),
                self.assertRaisesRegex(errors.ImageRejected, container.lower()) as caught,
            ):
                self.compression(container_format=container)
            self.assertTrue(caught.exception.next_step)

    def test_compressed_ones_are_unpacked_where_that_is_allowed(self) -> None:
        self.assertEqual(decompress.ANY, self.compression(container_format="compressed", allowed=True))

    def test_what_the_source_says_needs_no_permission(self) -> None:
        for name in model.COMPRESSIONS:
            self.assertEqual(name, self.compression(compression=name))
        self.assertRaises(errors.ImageRejected, self.compression, compression="lzop")

    def test_plain_files_are_never_unpacked(self) -> None:
        self.assertIsNone(self.compression(evidence.Use.FILE, compression="gzip"))
        self.assertIsNone(self.compression(evidence.Use.FILE, container_format="ova"))
