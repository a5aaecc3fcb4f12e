# SPDX-License-Identifier: Apache-2.0
"""An image that was cut off or damaged is refused before it is published, whether it is converted or kept."""

from __future__ import annotations

import random
import struct
import subprocess

from imagecache_lib import System
from imagecache_lib.formats import whole
from imagecache_lib.formats.reader import Prefix
from imagecache_lib.system.waiter import Waiter
from tests.flows.test_image_formats import FormatCase
from tests.support.cache_case import MIB, disk_image
from tests.support.odd_images import dynamic_vhd, edited

_DATA = random.Random(3).randbytes(5 * MIB)
_L2_OFFSET = 0x00FF_FFFF_FFFF_FE00


class _Noting(Prefix):
    """A whole image that keeps the offsets at which it was read."""

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__(data, whole=True)
        self.read_at: list[int] = []

    def read(self, offset: int, length: int) -> bytes:
        self.read_at.append(offset)
        return super().read(offset, length)


class TestImagesThatWereCutOff(FormatCase):
    def each_refused(self, format: str, image: bytes, *words: str) -> None:
        for force_raw in (True, False):
            with self.subTest(format, force_raw=force_raw):
                self.refused(image, format, *words, force_raw_images=force_raw)

    def test_what_tables_map_behind_the_end_is_not_taken_for_zeros(self) -> None:
        # A vhdx has one block of 8 MiB, of which a guest sees five.
        for format, missing in (("qcow2", 2 * MIB), ("vmdk", 2 * MIB), ("vdi", 2 * MIB), ("vhdx", 5 * MIB)):
            image = disk_image(self.directory, format, data=_DATA)
            self.each_refused(format, image[:-missing])

    def test_a_vhd_that_was_cut_off_and_got_its_footer_again(self) -> None:
        image = dynamic_vhd(_DATA)
        self.each_refused("vhd", image[: -2 * MIB] + image[:512], "vhd")

    def test_a_compressed_image(self) -> None:
        image = disk_image(self.directory, "vmdk", options="subformat=streamOptimized", data=_DATA)
        self.each_refused("vmdk", image[:MIB])

    def test_a_compressed_cluster_that_goes_on_behind_the_end(self) -> None:
        """What is missing reads as zeros, in which a deflate stream may well go on."""
        raw, made = self.directory / "packed.raw", self.directory / "packed.qcow2"
        raw.write_bytes(bytes(65024) + _DATA[:512])
        subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", raw, made], check=True)
        image = made.read_bytes()
        for way, found in self.each_way(image, "qcow2"):
            with self.subTest(way=way):
                self.assertEqual(raw.read_bytes(), found)
        self.each_refused("qcow2", image[: len(image.rstrip(b"\0")) - 256])

    def test_a_vmdk_that_says_two_things_of_its_compression(self) -> None:
        for options, at in (("monolithicSparse", 10), ("streamOptimized", 77)):
            image = bytearray(disk_image(self.directory, "vmdk", options=f"subformat={options}", data=_DATA))
            image[at] ^= 1
            self.each_refused("vmdk", bytes(image), "two things")

    def test_a_vmdk_whose_compressed_grains_are_too_large_to_unpack_again_and_again(self) -> None:
        image = disk_image(self.directory, "vmdk", options="subformat=streamOptimized", data=_DATA)
        for sectors in (4096, 2**21, 2**63):
            self.each_refused("vmdk", edited(image, (20, "<Q", sectors)), f"of {sectors} sectors")

    def test_an_image_of_which_only_what_no_guest_sees_is_missing(self) -> None:
        # The last block is half behind the disk's end, and a writer need not write that half.
        size = 4 * MIB + MIB // 2
        image = disk_image(self.directory, "vdi", data=_DATA[:size])
        for way, found in self.each_way(image[: -MIB // 2], "vdi"):
            with self.subTest(way=way):
                self.assertEqual(_DATA[:size], found)

    def test_one_grain_table_for_the_whole_disk_is_read_once(self) -> None:
        image = bytearray(disk_image(self.directory, "vmdk", data=_DATA.ljust(256 * MIB, b"\0")))
        (directory,) = struct.unpack_from("<Q", image, 56)
        (first,) = struct.unpack_from("<I", image, directory * 512)
        for number in range(8):
            struct.pack_into("<I", image, directory * 512 + number * 4, first)
        expected = _DATA.ljust(32 * MIB, b"\0") * 8
        self.assertEqual(expected, self.disk_of(bytes(image), "vmdk", force_raw_images=True))

    def test_two_grain_tables_by_turns_are_read_once_each(self) -> None:
        image = bytearray(disk_image(self.directory, "vmdk", data=_DATA.ljust(256 * MIB, b"\0")))
        (directory,) = struct.unpack_from("<Q", image, 56)
        tables = struct.unpack_from("<II", image, directory * 512)
        struct.pack_into("<8I", image, directory * 512, *tables * 4)
        reader = _Noting(image)
        whole.require(reader, "vmdk", Waiter(System(name="here")))
        self.assertEqual([1, 1], [reader.read_at.count(table * 512) for table in tables])


class TestImagesThatAreDamaged(FormatCase):
    def test_a_kept_image_of_which_a_guest_could_not_read_all(self) -> None:
        packed = self.packed()
        for force_raw in (True, False):
            with self.subTest(force_raw=force_raw):
                self.refused(packed, "qcow2", force_raw_images=force_raw)

    def packed(self) -> bytes:
        """Return an image whose compressed clusters are damaged, and whose tables are not."""
        raw, made = self.directory / "packed.raw", self.directory / "packed.qcow2"
        raw.write_bytes((b"compressible " * MIB)[: 2 * MIB])
        subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", raw, made], check=True)
        image = made.read_bytes()
        (l1_at,) = struct.unpack_from(">Q", image, 40)
        (l2_at,) = struct.unpack_from(">Q", image, l1_at)
        (entry,) = struct.unpack_from(">Q", image, l2_at & _L2_OFFSET)
        at = entry & ((1 << 54) - 1)
        return image[:at] + bytes(64) + image[at + 64 :]

    def test_a_kept_image_whose_tables_lead_nowhere(self) -> None:
        image = bytearray(disk_image(self.directory, "qcow2", data=_DATA))
        (l1_at,) = struct.unpack_from(">Q", image, 40)
        (l2_at,) = struct.unpack_from(">Q", image, l1_at)
        for number in range(3):
            struct.pack_into(">Q", image, (l2_at & _L2_OFFSET) + number * 8, 1 << 63 | 2**40)
        self.refused(bytes(image), "qcow2", "outside of the file", force_raw_images=False)

    def test_refcounts_that_no_reader_of_a_base_looks_at(self) -> None:
        # An image that was not closed has them so (lazy_refcounts), and QEMU opens it.
        image = bytearray(disk_image(self.directory, "qcow2", data=_DATA))
        (table_at,) = struct.unpack_from(">Q", image, 48)
        (block_at,) = struct.unpack_from(">Q", image, table_at)
        image[block_at : block_at + 16] = bytes(16)
        self.assertEqual(_DATA, self.disk_of(bytes(image), "qcow2", force_raw_images=False))
