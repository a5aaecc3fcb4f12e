# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import struct
import subprocess
import tempfile
import unittest

from imagecache_lib import errors
from imagecache_lib.formats.qcow2 import header


def make(path: str, *options: str, size: str = "10G") -> bytes:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size], check=True)
    with open(path, "rb") as image:
        return image.read(2**20)


def patched(data: bytes, offset: int, layout: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, offset, value)
    return bytes(changed)


class HeaderOfQemuImages(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, "image")
        self.base = os.path.join(directory.name, "base")
        with open(self.base, "wb") as base:
            base.truncate(2**20)

    def test_version_3(self) -> None:
        parsed = header.parse(make(self.path, "-o", "compression_type=zstd,extended_l2=on"))
        self.assertEqual((parsed.version, parsed.virtual_size, parsed.cluster_bits), (3, 10 * 2**30, 16))
        self.assertEqual(parsed.compression_type, header.Compression.ZSTD)
        self.assertTrue(parsed.extended_l2)
        self.assertEqual(parsed.l2_entries, 4096)
        self.assertIsNone(parsed.backing_file)

    def test_version_2_with_small_clusters(self) -> None:
        parsed = header.parse(make(self.path, "-o", "compat=0.10,cluster_size=512", size="1M"))
        self.assertEqual((parsed.version, parsed.cluster_size, parsed.header_length), (2, 512, 72))

    def test_backing_file_and_format(self) -> None:
        for options in ("compat=1.1", "compat=0.10"):
            data = make(self.path, "-o", options, "-b", self.base, "-F", "raw")
            parsed = header.parse(data)
            self.assertEqual(parsed.backing_file, self.base.encode())
            self.assertEqual(parsed.backing_format, b"raw")
            self.assertEqual(header.backing_reference(data[:4096]), self.base.encode())

    def test_sizes_are_whole_sectors_as_qemu_sees_them(self) -> None:
        data = patched(make(self.path), 24, ">Q", 1000)
        with open(self.path, "r+b") as image:
            image.write(data)
        seen = subprocess.run(
            ["qemu-img", "measure", "-f", "qcow2", "-O", "raw", self.path],
            capture_output=True,
            check=True,
            text=True,
        )
        self.assertIn("fully allocated size: 512\n", seen.stdout)
        self.assertEqual(header.parse(data).virtual_size, 512)

    def test_malformed_headers_are_refused_as_qemu_refuses_them(self) -> None:
        data = make(self.path)
        for name, offset, layout, value in (
            ("version 1", 4, ">I", 1),
            ("version 4", 4, ">I", 4),
            ("tiny clusters", 20, ">I", 8),
            ("giant clusters", 20, ">I", 22),
            ("encryption method", 32, ">I", 3),
            ("L1 too small", 36, ">I", 19),
            ("L1 huge", 36, ">I", 2**31),
            ("L1 unaligned", 40, ">Q", 0x30200),
            ("L1 where no file reaches", 40, ">Q", 2**63),
            ("backing name outside", 8, ">Q", 0x10001),
            ("compression type without its bit", 104, ">B", 1),
            ("compression bit without its type", 72, ">Q", 8),
            ("refcount order", 96, ">I", 7),
            ("header length", 100, ">I", 96),
            ("header longer than a cluster", 100, ">I", 0x10008),
            ("extension too long", 116, ">I", 0x10000),
        ):
            with self.subTest(name):
                hostile = patched(data, offset, layout, value)
                with self.assertRaises(header.HeaderError) as caught:
                    header.parse(hostile)
                self.assertIsInstance(caught.exception, errors.ImageRejected)
                with open(self.path, "wb") as image:
                    image.write(hostile)
                opened = subprocess.run(
                    ["qemu-img", "info", "-f", "qcow2", self.path], capture_output=True, check=False
                )
                self.assertNotEqual(opened.returncode, 0)

    def test_other_formats_are_not_qcow2(self) -> None:
        for data in (b"", b"QFI", bytes(512), b"QED\0" + bytes(508), b"KDMV" + bytes(508)):
            self.assertRaises(header.NotQcow2, header.parse, data)
            self.assertIsNone(header.backing_reference(data))


class PartOfAHeader(unittest.TestCase):
    """A scan reads 4 KiB per file and a stream delivers what it likes."""

    def setUp(self) -> None:
        fields = header.V2_FIELDS.pack(header.MAGIC, 3, 60000, 5, 16, 2**30, 0, 2, 0x30000, 0x10000, 1, 0, 0)
        fields += header.V3_FIELDS.pack(0, 0, 0, 4, 104)
        self.data = fields.ljust(60000, b"\0") + b"/base"

    def test_growing_by_what_is_needed_ends_with_the_header(self) -> None:
        known = 4
        while known < len(self.data):
            with self.assertRaises(header.Truncated) as caught:
                header.parse(self.data[:known])
            self.assertGreater(caught.exception.needed, known)
            known = caught.exception.needed
        self.assertEqual(header.parse(self.data[:known]).backing_file, b"/base")

    def test_a_far_backing_name_says_how_far(self) -> None:
        with self.assertRaises(header.Truncated) as caught:
            header.backing_reference(self.data[:4096])
        self.assertEqual(header.backing_reference(self.data[: caught.exception.needed]), b"/base")

    def test_a_false_backing_name_is_malformed_rather_than_awaited(self) -> None:
        for offset, layout, value in ((8, ">Q", 2**63), (16, ">I", 1024), (16, ">I", 2**32 - 1)):
            with self.assertRaises(header.HeaderError) as caught:
                header.backing_reference(patched(self.data[:4096], offset, layout, value))
            self.assertNotIsInstance(caught.exception, header.Truncated)
