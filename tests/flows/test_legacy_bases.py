# SPDX-License-Identifier: Apache-2.0
"""Overlays on the resized bases that old releases of Nova made: ``<sha1>_<GiB>`` and ``<sha1>_sm``."""

from __future__ import annotations

import os
import pathlib
import subprocess

from imagecache_lib import errors, model
from imagecache_lib.store import layout
from tests.support import files
from tests.support.cache_case import ID, OTHER_ID, CacheCase, content_of, raw_image

DATA = raw_image()
GIB = 2**30


class TestLegacyBases(CacheCase):
    def resized(self, suffix: str = "_1", *, size: int = GIB, format: str = "raw") -> pathlib.Path:
        path = self.base().with_name(self.base().name + suffix)
        path.parent.mkdir(exist_ok=True)
        raw = self.directory / "raw"
        raw.write_bytes(DATA)
        os.truncate(raw, size)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, raw, path], check=True)
        return path

    def overlay(self, base: pathlib.Path, format: str = "raw", name: str = "disk") -> str:
        path = self.target(name)
        files.overlay(path, str(base), backing_format=format, size="1G")
        return path

    def test_one_that_is_there_serves_and_is_not_fetched(self) -> None:
        for suffix, format in (("_1", "raw"), ("_sm", "raw"), ("_1", "qcow2")):
            with self.subTest(suffix=suffix, format=format):
                base = self.resized(suffix, format=format)
                before = base.stat().st_ino
                disk = self.overlay(base, format, f"disk{suffix}{format}")
                for _time in range(2):
                    found = self.manager().ensure_backing(disk, image_id=ID)
                    assert found is not None
                    self.assertEqual((base.name, format, GIB), (found.name, found.format, found.virtual_size))
                self.assertEqual((before, 0), (base.stat().st_ino, self.source.opens))
                base.unlink()
                self.record_of_resized(base).unlink()

    def record_of_resized(self, base: pathlib.Path) -> pathlib.Path:
        return base.parent / ".imagecache" / "records" / f"{base.name}.json"

    def test_its_overlay_is_used_again_and_grown(self) -> None:
        disk = self.overlay(self.resized())
        again = self.manager().create_disk(ID, disk, size=2 * GIB, if_exists="reuse")
        self.assertEqual(model.Disk(disk, "qcow2", 2 * GIB, f"{layout.base_name(ID)}_1"), again)
        self.assertEqual(DATA, content_of(disk, "qcow2")[: len(DATA)])

    def test_one_that_is_not_there_is_not_made(self) -> None:
        base = self.resized()
        disk = self.overlay(base)
        base.unlink()
        with self.assertRaisesRegex(errors.BackendError, "not made anew") as caught:
            self.manager().ensure_backing(disk, image_id=ID)
        self.assertEqual((ID, disk), (caught.exception.image, caught.exception.path))
        self.assertTrue(caught.exception.next_step)
        self.assertEqual(0, self.source.opens)

    def test_one_in_the_trash_is_linked_back(self) -> None:
        manager = self.manager(remove_unused_resized_minimum_age_seconds=0)
        base = self.resized()
        disk = self.overlay(base)
        manager.ensure_backing(disk, image_id=ID)
        entry = base.parent / ".imagecache" / "trash" / f"{base.name}.{'0' * 32}"
        entry.mkdir()
        base.rename(entry / "base")
        self.assertIsNotNone(manager.ensure_backing(disk, image_id=ID))
        self.assertTrue(base.exists())

    def test_one_whose_copying_was_interrupted_does_not_serve(self) -> None:
        base = self.resized(size=GIB // 2)
        disk = self.overlay(base)
        with self.assertRaisesRegex(errors.BackendError, "its name says 1073741824"):
            self.manager().ensure_backing(disk, image_id=ID)
        self.assertTrue(base.exists())

    def test_one_that_is_read_otherwise_than_it_is_does_not_serve(self) -> None:
        for stored, stated in (("qcow2", "raw"), ("raw", "qcow2"), ("vmdk", "vmdk")):
            with self.subTest(stored=stored, stated=stated):
                base = self.resized(format=stored)
                disk = self.overlay(base, stated, f"disk-{stored}")
                if stored == "vmdk":
                    self.assertIsNotNone(self.manager().ensure_backing(disk, image_id=ID))
                    continue
                with self.assertRaisesRegex(errors.BackendError, f"it is {stored} and not {stated}"):
                    self.manager().ensure_backing(disk, image_id=ID)
                self.assertTrue(base.exists())
                base.unlink()

    def test_one_that_names_another_file_does_not_serve(self) -> None:
        base = self.resized()
        base.unlink()
        files.overlay(str(base), "/etc/passwd", backing_format="raw", size="1G")
        disk = self.target()
        command = [
            "qemu-img",
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            str(base),
            str(disk),
            "1G",
        ]
        subprocess.run(command, check=True)
        with self.assertRaises(errors.BackendError):
            self.manager().ensure_backing(disk, image_id=ID)

    def test_another_images_is_refused(self) -> None:
        disk = self.overlay(self.resized())
        with self.assertRaisesRegex(errors.BackendError, "not this image's base"):
            self.manager().ensure_backing(disk, image_id=OTHER_ID)

    def test_it_stays_while_its_overlay_needs_it(self) -> None:
        manager = self.manager(remove_unused_resized_minimum_age_seconds=0)
        base = self.resized()
        disk = self.overlay(base)
        manager.ensure_backing(disk, image_id=ID)
        os.utime(base, (1, 1))
        self.assertEqual((), manager.verify_base_images([]).evicted)
        os.unlink(disk)
        os.utime(base, (1, 1))
        os.utime(self.record_of_resized(base), (1, 1))
        self.assertEqual([base.name], [each.name for each in manager.verify_base_images([]).evicted])


class TestChainsInsideTheCache(CacheCase):
    def test_a_base_that_is_an_overlay_of_another_keeps_that_one(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        middle = self.base().parent / layout.base_name(OTHER_ID)
        files.overlay(str(middle), str(self.base()), backing_format="raw", size="1G")
        disk = self.target()
        files.overlay(str(disk), str(middle), backing_format="qcow2", size="1G")
        with self.assertRaises(errors.BackendError):
            manager.evict_image(ID)
        self.assertTrue(self.base().exists())
