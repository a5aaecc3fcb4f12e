# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import tempfile
import unittest
from typing import Any

from imagecache_lib.formats.qcow2 import header, overlay
from imagecache_lib.testing import bootdisk

MIB = 2**20
TIB = 2**40


class OverlaysAsQemuSeesThem(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.base = os.path.join(self.directory, "base")
        with open(self.base, "wb") as base:
            base.write(os.urandom(65536))
            base.truncate(MIB)

    def make(self, size: int, *, base: str | None = None, cluster_bits: int = 16) -> str:
        path = os.path.join(self.directory, "overlay")
        if os.path.exists(path):
            os.unlink(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            overlay.write_overlay(descriptor, size, base or self.base, "raw", cluster_bits=cluster_bits)
        finally:
            os.close(descriptor)
        return path

    def qemu(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def info(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.qemu("qemu-img", "info", "--output=json", path))
        return found

    def test_every_size_and_cluster_size(self) -> None:
        for cluster_bits in range(header.MIN_CLUSTER_BITS, header.MAX_CLUSTER_BITS + 1):
            for size in (MIB, MIB + 512, 4 * 2**30 - 1536, TIB + 512, 16 * TIB - 512, 16 * TIB):
                if size > (32 * MIB // 8) * (1 << cluster_bits) ** 2 // 8:
                    self.assertRaises(overlay.OverlayError, self.make, size, cluster_bits=cluster_bits)
                    continue
                with self.subTest(cluster_bits=cluster_bits, size=size):
                    path = self.make(size, cluster_bits=cluster_bits)
                    self.qemu("qemu-img", "check", "-q", path)
                    last = f"-q -P 7 {size - 512} 512"
                    self.qemu("qemu-io", "-c", f"write {last}", "-c", "write -q -P 8 0 1k", path)
                    self.qemu("qemu-img", "check", "-q", path)
                    self.qemu("qemu-io", "-c", f"read {last}", path)

    def test_info_and_content(self) -> None:
        path = self.make(MIB)
        info = self.info(path)
        self.assertEqual(info["virtual-size"], MIB)
        self.assertEqual(info["backing-filename"], self.base)
        self.assertEqual(info["backing-filename-format"], "raw")
        self.assertEqual(info["cluster-size"], 65536)
        self.qemu("qemu-img", "compare", "-s", "-f", "qcow2", "-F", "raw", path, self.base)
        self.assertLessEqual(os.stat(path).st_blocks * 512, 4 * 65536)

    def test_what_lies_beyond_a_smaller_base_reads_as_zeros(self) -> None:
        path = self.make(3 * MIB)
        self.qemu("qemu-io", "-r", "-c", "read -q -P 0 1M 2M", path)

    def test_the_longest_path_a_header_holds(self) -> None:
        for length in (200, 1023):
            deep = self.directory
            while len(deep) < length - 201:
                deep = os.path.join(deep, "d" * min(200, length - len(deep) - 3))
            os.makedirs(deep, exist_ok=True)
            base = os.path.join(deep, "b" * (length - len(deep) - 1))
            with open(base, "wb") as file:
                file.truncate(MIB)
            self.assertEqual(len(base), length)
            path = self.make(2 * MIB, base=base)
            self.assertEqual(self.info(path)["backing-filename"], base)
            self.qemu("qemu-img", "check", "-q", path)
            self.qemu("qemu-io", "-c", "read -q 0 1M", path)

    def test_a_longer_path_is_refused_with_its_name(self) -> None:
        with self.assertRaises(overlay.OverlayError) as caught:
            self.make(MIB, base="/" + "b" * 1023)
        self.assertIn("1024 bytes", str(caught.exception))
        self.assertIsNotNone(caught.exception.next_step)

    def test_what_no_overlay_can_be(self) -> None:
        self.assertRaises(overlay.OverlayError, self.make, 1000)
        self.assertRaises(overlay.OverlayError, self.make, -512)
        self.assertRaises(overlay.OverlayError, self.make, MIB, cluster_bits=8)
        self.assertRaises(overlay.OverlayError, self.make, MIB, cluster_bits=22)
        self.assertRaises(overlay.OverlayError, self.make, MIB, base="/" + "b" * 500, cluster_bits=9)

    def test_our_own_header_reads_back(self) -> None:
        with open(self.make(5 * MIB), "rb") as image:
            data = image.read(4096)
        parsed = header.parse(data)
        self.assertEqual(parsed.virtual_size, 5 * MIB)
        self.assertEqual(parsed.backing_format, b"raw")
        self.assertEqual(header.backing_reference(data), os.fsencode(self.base))

    def test_a_machine_boots_from_it_and_the_base_stays_as_it_was(self) -> None:
        bootdisk.write_boot_disk(self.base, 1)
        with open(self.base, "rb") as base:
            before = base.read()
        path = self.make(8 * MIB)
        for count in range(2):
            said = self.qemu(*bootdisk.boot_command(path, "qcow2"))
            self.assertIn(f"HELLO BOOT {count}", said)
        self.qemu("qemu-img", "check", "-q", path)
        with open(self.base, "rb") as base:
            self.assertEqual(base.read(), before)
