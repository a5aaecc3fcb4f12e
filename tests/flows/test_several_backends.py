# SPDX-License-Identifier: Apache-2.0
"""What a driver asks beside new disks: another backend for one disk, disks that are there, notes of use."""

from __future__ import annotations

import os
import pathlib
import time
from unittest import mock

import imagecache_lib as ic
from imagecache_lib import errors, events, model
from imagecache_lib.store import layout
from imagecache_lib.system.host import System
from tests.support.cache_case import ID, MIB, CacheCase, content_of, raw_image

DATA = raw_image(1)


class TestBackendOfOneDisk(CacheCase):
    def test_one_instance_has_disks_of_several_backends_from_one_base(self) -> None:
        manager = self.manager()
        overlay = manager.create_disk(ID, self.target("root"))
        alone = manager.create_disk(ID, self.target("other"), backend="raw", size=4 * MIB)
        self.assertEqual(("qcow2", "raw"), (overlay.format, alone.format))
        self.assertEqual((layout.base_name(ID), None), (overlay.base, alone.base))
        self.assertEqual(DATA + bytes(MIB), content_of(alone.target, "raw"))
        self.assertEqual(1, self.source.opens)
        swap = manager.create_swap(self.target("swap"), size_mb=8, backend="raw")
        self.assertEqual(("raw", None), (swap.format, swap.base))
        ephemeral = manager.create_ephemeral(self.target("eph"), size_gb=1, os_type="linux", backend="raw")
        self.assertEqual(("raw", None), (ephemeral.format, ephemeral.base))

    def test_a_disk_of_another_backend_is_inspected_grown_and_removed_as_such(self) -> None:
        manager = self.manager(backend="raw")
        disk = manager.create_disk(ID, self.target(), backend="qcow2")
        self.assertEqual(disk, manager.inspect_disk(disk.target, backend="qcow2"))
        self.assertTrue(manager.note_use(disk, backend="qcow2"))
        self.assertEqual(8 * MIB, manager.resize_disk(disk, 8 * MIB, backend="qcow2").virtual_size)
        self.assertIsNotNone(manager.ensure_backing(disk.target, image_id=ID, backend="qcow2"))
        self.assertIsNone(manager.flatten_disk(disk, backend="qcow2").base)
        manager.remove_disk(disk, backend="qcow2")
        self.assertFalse(os.path.exists(disk.target))

    def test_an_unknown_backend_is_refused_before_anything_is_made(self) -> None:
        with self.assertRaises(errors.ConfigError):
            self.manager().create_disk(ID, self.target(), backend="papyrus")
        self.assertEqual(0, self.source.opens)


class TestWhatIsThere(CacheCase):
    def test_swap_and_ephemeral_disks_that_are_there_are_used_again(self) -> None:
        manager = self.manager()
        swap = manager.create_swap(self.target("swap"), size_mb=8)
        eph = manager.create_ephemeral(self.target("eph"), size_gb=1, os_type="linux")
        for base in (swap.base, eph.base):
            (self.instances / "_base" / str(base)).unlink()
        again = manager.create_swap(swap.target, size_mb=8, if_exists="reuse")
        self.assertEqual(swap, again)
        again = manager.create_ephemeral(eph.target, size_gb=2, os_type="linux", if_exists="reuse")
        self.assertEqual(model.Disk(eph.target, "qcow2", 2 * 2**30, eph.base), again)
        for base in (swap.base, eph.base):
            self.assertTrue((self.instances / "_base" / str(base)).exists())

    def test_without_being_told_nothing_is_used_again(self) -> None:
        manager = self.manager()
        swap = manager.create_swap(self.target("swap"), size_mb=8)
        manager.fetch_file(ID, self.target("kernel"))
        for attempt in (
            lambda: manager.create_swap(swap.target, size_mb=8),
            lambda: manager.create_ephemeral(swap.target, size_gb=1),
            lambda: manager.fetch_file(ID, self.target("kernel")),
        ):
            with self.assertRaises(errors.DiskExistsError):
                attempt()

    def test_a_file_that_is_there_is_left_as_it_is(self) -> None:
        path = pathlib.Path(self.target("kernel"))
        path.write_bytes(b"a kernel")
        self.manager().fetch_file(ID, str(path), if_exists="reuse")
        self.assertEqual((b"a kernel", 0), (path.read_bytes(), self.source.opens))

    def test_what_cannot_be_a_file_is_not_used_again(self) -> None:
        empty, directory = pathlib.Path(self.target("empty")), pathlib.Path(self.target("directory"))
        empty.touch()
        directory.mkdir()
        for path in (empty, directory):
            with self.assertRaises(errors.BackendError) as caught:
                self.manager().fetch_file(ID, str(path), if_exists="reuse")
            self.assertEqual((ID, str(path)), (caught.exception.image, caught.exception.path))


class TestNoteOfUse(CacheCase):
    def test_the_age_of_a_disks_base_counts_from_its_use(self) -> None:
        manager = self.manager()
        disk = manager.create_disk(ID, self.target())
        os.utime(self.base(), (1, 1))
        self.assertTrue(manager.note_use(disk))
        self.assertLess(time.time() - self.base().stat().st_mtime, 3600)
        self.assertEqual(1, self.happened(events.Hit) + self.happened(events.Published))

    def test_a_missing_base_is_told_and_not_fetched(self) -> None:
        manager = self.manager()
        disk = manager.create_disk(ID, self.target())
        self.base().unlink()
        self.assertFalse(manager.note_use(disk))
        self.assertEqual(1, self.source.opens)

    def test_a_disk_that_stands_alone_lacks_nothing(self) -> None:
        manager = self.manager(backend="raw")
        self.assertTrue(manager.note_use(manager.create_disk(ID, self.target())))


class TestSizesInErrors(CacheCase):
    def test_an_image_that_is_too_large_tells_both_sizes(self) -> None:
        with self.assertRaises(ic.DiskTooSmallError) as caught:
            self.manager().create_disk(ID, self.target(), size=MIB)
        self.assertEqual((MIB, len(DATA)), (caught.exception.size, caught.exception.virtual_size))

    def test_a_disk_that_would_shrink_tells_both_sizes(self) -> None:
        manager = self.manager()
        disk = manager.create_disk(ID, self.target(), size=8 * MIB)
        with self.assertRaises(ic.DiskTooSmallError) as caught:
            manager.resize_disk(disk, 4 * MIB)
        self.assertEqual((4 * MIB, 8 * MIB), (caught.exception.size, caught.exception.virtual_size))


class TestLatePatches(CacheCase):
    def test_a_sleep_that_is_patched_after_the_import_is_the_one_that_is_called(self) -> None:
        # As eventlet does to the standard library, in programs that import this library first.
        with mock.patch("time.sleep") as patched:
            System().sleep(3600)
        patched.assert_called_once_with(3600)
