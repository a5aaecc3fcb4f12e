# SPDX-License-Identifier: Apache-2.0
"""A promise of space that a filesystem cannot keep is said, by the disk and by the check of the host."""

from __future__ import annotations

import os
import subprocess
import unittest

from tests.support.cache_case import ID, CacheCase

MIB = 2**20


@unittest.skipUnless(os.geteuid() == 0, "mounting a filesystem takes root")
class TestWithoutFallocate(CacheCase):
    """On ext2 as the driver for ext2 has it, fallocate(2) does not work; so it is on NFS before 4.2."""

    def setUp(self) -> None:
        super().setUp()
        image = self.directory / "filesystem"
        with open(image, "wb") as file:
            file.truncate(64 * MIB)
        subprocess.run(["mkfs.ext2", "-q", "-F", image], check=True)
        mounted = subprocess.run(
            ["mount", "-o", "loop", image, self.instances], check=False, capture_output=True
        )
        if mounted.returncode:
            self.skipTest(f"a filesystem cannot be mounted here: {mounted.stderr.decode().strip()}")
        self.addCleanup(lambda: subprocess.run(["umount", self.instances], check=True))

    def test_each_disk_without_its_space_is_warned_of(self) -> None:
        for backend in ("raw", "qcow2"):
            manager = self.manager(backend=backend, preallocate_images="space")
            with self.assertLogs("imagecache_lib.backends", "WARNING") as said:
                disk = manager.create_disk(ID, self.target(backend), size=8 * MIB)
            self.assertIn(f"The space of {disk.target} is not allocated ahead", said.output[0])
            self.assertEqual(8 * MIB, disk.virtual_size)

    def test_growing_such_a_disk_is_warned_of(self) -> None:
        manager = self.manager(backend="raw", preallocate_images="space")
        disk = self.manager(backend="raw").create_disk(ID, self.target())
        with self.assertLogs("imagecache_lib.backends", "WARNING") as said:
            manager.resize_disk(disk, 8 * MIB)
        self.assertIn("is not allocated ahead", said.output[0])

    def test_the_check_of_the_host_says_it(self) -> None:
        found = self.manager(preallocate_images="space").preflight()
        self.assertIn("cannot allocate space ahead", "".join(each.text for each in found))
        self.assertEqual([], [each for each in self.manager().preflight() if "allocate" in each.text])


class TestWithFallocate(CacheCase):
    def test_nothing_is_said(self) -> None:
        manager = self.manager(backend="raw", preallocate_images="space")
        with self.assertNoLogs("imagecache_lib.backends", "WARNING"):
            disk = manager.create_disk(ID, self.target(), size=8 * MIB)
        self.assertLessEqual(8 * MIB, os.stat(disk.target).st_blocks * 512)
        self.assertEqual([], [each for each in manager.preflight() if "allocate" in each.text])

    def test_the_check_leaves_nothing_behind(self) -> None:
        before = sorted(os.listdir(self.instances))
        self.manager(preallocate_images="space").preflight()
        self.assertEqual(before, sorted(os.listdir(self.instances)))
