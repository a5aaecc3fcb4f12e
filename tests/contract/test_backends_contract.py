# SPDX-License-Identifier: Apache-2.0
"""Every file backend against the contract that any backend must meet, on this disk and on tmpfs."""

from __future__ import annotations

import os
import tempfile
import unittest

from imagecache_lib import CacheConfig, System
from imagecache_lib.backends.file import FileBackend
from imagecache_lib.backends.qcow2 import Qcow2Backend
from imagecache_lib.backends.raw import RawBackend
from imagecache_lib.testing.backend_contract import BackendContract
from tests.support import needs
from tests.support.disks import DiskFiles


class _OnDisk(DiskFiles, BackendContract):
    kind: type[FileBackend]
    parent: str | None = None
    preallocate = "none"

    def setUp(self) -> None:
        self.directory = self.enterContext(tempfile.TemporaryDirectory(dir=self.parent))
        super().setUp()

    def base_directory(self) -> str:
        path = os.path.join(self.directory, "_base")
        os.mkdir(path)
        return path

    def make_backend(self) -> FileBackend:
        config = CacheConfig(instances_path=self.directory, preallocate_images=self.preallocate)
        os.mkdir(config.locks_path)
        return self.kind.from_config(config, System(name="here"))


class TestRaw(_OnDisk, unittest.TestCase):
    kind = RawBackend


class TestQcow2(_OnDisk, unittest.TestCase):
    kind = Qcow2Backend


class TestRawAllocatedAhead(_OnDisk, unittest.TestCase):
    kind = RawBackend
    preallocate = "space"


class TestQcow2AllocatedAhead(_OnDisk, unittest.TestCase):
    kind = Qcow2Backend
    preallocate = "space"

    def test_the_file_looks_no_larger_than_it_is(self) -> None:
        disk = self.create(size=64 * 2**20)
        found = os.stat(disk.target)
        self.assertLess(found.st_size, 2**20)
        self.assertGreaterEqual(found.st_blocks * 512, 64 * 2**20)


class _OnTmpfs(_OnDisk):
    parent = "/dev/shm"

    def setUp(self) -> None:
        needs.other_filesystem(self.parent, tempfile.gettempdir())
        super().setUp()


class TestRawOnTmpfs(_OnTmpfs, unittest.TestCase):
    kind = RawBackend


class TestQcow2OnTmpfs(_OnTmpfs, unittest.TestCase):
    kind = Qcow2Backend
