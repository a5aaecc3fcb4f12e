# SPDX-License-Identifier: Apache-2.0
"""The file backends on an xfs that can share blocks, and on a small ext4 that is soon full."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import tempfile
import unittest
from collections.abc import Iterator, Sequence

from imagecache_lib import CacheConfig, System, errors, model
from imagecache_lib.backends.file import FileBackend
from imagecache_lib.backends.qcow2 import Qcow2Backend
from imagecache_lib.backends.raw import RawBackend
from imagecache_lib.testing.backend_contract import BackendContract, commit
from tests.lab import filesystems
from tests.support.disks import DiskFiles

MIB = 2**20


class _OnFilesystem(DiskFiles, BackendContract):
    kind: type[FileBackend]
    mkfs: Sequence[str]
    filesystem_size: int
    mounted: pathlib.Path
    preallocate = "none"

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        home = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.mounted = cls.enterClassContext(filesystems.loop_mounted(home, cls.filesystem_size, cls.mkfs))

    def setUp(self) -> None:
        self.directory = self.enterContext(tempfile.TemporaryDirectory(dir=self.mounted))
        super().setUp()

    def base_directory(self) -> str:
        path = os.path.join(self.directory, "_base")
        os.mkdir(path)
        return path

    def make_backend(self) -> FileBackend:
        config = CacheConfig(instances_path=self.directory, preallocate_images=self.preallocate)
        os.makedirs(config.locks_path, exist_ok=True)
        return self.kind.from_config(config, System(name="here"))

    def free(self) -> int:
        os.sync()
        found = os.statvfs(self.mounted)
        return found.f_bfree * found.f_bsize

    @contextlib.contextmanager
    def no_space(self) -> Iterator[None]:
        """Fill the filesystem to the last block."""
        path = self.mounted / "filler"
        try:
            with path.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                for size in (MIB, 4096):
                    with contextlib.suppress(OSError):
                        while True:
                            filler.write(bytes(size))
                os.fsync(filler.fileno())
            yield
        finally:
            path.unlink()
            os.sync()


class _Xfs(_OnFilesystem):
    mkfs = ("mkfs.xfs", "-q", "-m", "reflink=1,crc=1")
    filesystem_size = 512 * MIB


class TestRawOnXfs(_Xfs, unittest.TestCase):
    kind = RawBackend

    @contextlib.contextmanager
    def no_space(self) -> Iterator[None]:
        self.skipTest("a disk that shares its base's blocks needs no room")
        yield

    def test_a_disk_shares_the_blocks_of_its_base(self) -> None:
        base = self._dense_base()
        before = self.free()
        disk = commit(self.backend.prepare(base, self.make_target(), 64 * MIB))
        self.assertLess(before - self.free(), 2 * MIB)
        self.write_disk(disk, 0, b"g" * 4096)
        assert base.fd is not None
        self.assertEqual(b"d" * 4096, os.pread(base.fd, 4096, 0))

    def test_allocated_ahead_its_blocks_are_its_own(self) -> None:
        base = self._dense_base()
        self.preallocate = "space"
        before = self.free()
        disk = commit(self.make_backend().prepare(base, self.make_target(), 64 * MIB))
        self.assertGreaterEqual(before - self.free(), 64 * MIB)
        with _OnFilesystem.no_space(self):
            self.write_disk(disk, 0, b"g" * 4096)
            self.write_disk(disk, 48 * MIB, b"g" * 4096)
        subprocess.run(["cmp", "-n", str(4 * MIB), "-i", "4096", base.path, disk.target], check=True)

    def _dense_base(self) -> model.BaseImage:
        path = os.path.join(self.directory, "_base", "d" * 40)
        with open(path, "wb") as file:
            file.write(b"d" * 32 * MIB)
        fd = os.open(path, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        return model.BaseImage("dense", "d" * 40, path, "raw", 32 * MIB, fd=fd)


class TestQcow2OnXfs(_Xfs, unittest.TestCase):
    kind = Qcow2Backend

    @contextlib.contextmanager
    def no_space(self) -> Iterator[None]:
        self.skipTest("a disk that shares its base's blocks needs no room")
        yield


class _SmallExt4(_OnFilesystem):
    mkfs = ("mkfs.ext4", "-q", "-m", "0")
    filesystem_size = 64 * MIB


class TestRawOnSmallExt4(_SmallExt4, unittest.TestCase):
    kind = RawBackend

    def test_a_disk_that_cannot_be_allocated_ahead_is_not_made(self) -> None:
        self.preallocate = "space"
        backend, target, before = self.make_backend(), self.make_target(), self.free()
        with self.assertRaises(errors.NoSpaceError):
            commit(backend.prepare(self.base, target, 100 * MIB))
        self.assertEqual(set(), self.everything())
        self.assertLess(before - self.free(), MIB)  # but for a block of metadata

    def test_a_disk_that_cannot_be_allocated_larger_is_as_it_was(self) -> None:
        self.preallocate = "space"
        backend = self.make_backend()
        disk = commit(backend.prepare(self.base, self.make_target(), None))
        before = self.free()
        with self.assertRaises(errors.NoSpaceError):
            backend.resize(disk, 100 * MIB)
        self.assertEqual(disk, backend.inspect(disk.target))
        self.assertLess(before - self.free(), MIB)  # but for a block of metadata


class TestQcow2OnSmallExt4(_SmallExt4, unittest.TestCase):
    kind = Qcow2Backend

    def test_an_overlay_that_does_not_fit_leaves_nothing(self) -> None:
        target = self.make_target()
        with self.no_space(), self.assertRaises(errors.NoSpaceError):
            commit(self.backend.prepare(self.base, target, None))
        self.assertEqual(set(), self.everything())

    def test_a_disk_that_cannot_be_flattened_still_has_its_base(self) -> None:
        disk = self.create()
        with self.no_space(), self.assertRaises(errors.NoSpaceError):
            self.backend.flatten(disk)
        self.assertEqual(disk, self.backend.inspect(disk.target))
        self.check_disk(disk)
        self.assert_content(disk, self.base)

    def test_an_overlay_that_cannot_be_allocated_ahead_is_not_made(self) -> None:
        self.preallocate = "space"
        backend, before = self.make_backend(), self.free()
        with self.assertRaises(errors.NoSpaceError):
            commit(backend.prepare(self.base, self.make_target(), 100 * MIB))
        self.assertEqual(set(), self.everything())
        self.assertLess(before - self.free(), MIB)  # but for a block of metadata
