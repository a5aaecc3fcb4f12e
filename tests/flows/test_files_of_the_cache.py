# SPDX-License-Identifier: Apache-2.0
"""What the cache keeps is no disk: no call on disks writes, grows or removes it, under whatever name."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import imagecache_lib as ic
from imagecache_lib import errors, model
from imagecache_lib.store import layout
from tests.support.cache_case import ID, MIB, OTHER_ID, CacheCase, content_of, raw_image


class FilesOfTheCacheTest(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.overlay = self.manager().create_disk(ID, self.target("overlay")).target
        self.link = self.target("symbolic-link")
        os.symlink(self.base(), self.link)
        self.other_name = self.target("hard-link")
        os.link(self.base(), self.other_name)
        self.relative = self.target("relative-link")
        os.symlink(f"../_base/{layout.base_name(ID)}", self.relative)

    def assert_refused(self, call: Callable[[ic.ImageCacheManager, str], object], *paths: str) -> None:
        for backend in ("qcow2", "raw"):
            for path in paths:
                with (
                    self.subTest(backend=backend, path=path),
                    self.assertRaises(errors.BackendError) as refused,
                ):
                    call(self.manager(backend=backend), path)
                    self.assertIn("file of the cache", refused.exception.cause)
                    self.assertEqual(refused.exception.path, path)
        self.assertEqual(self.base().read_bytes(), raw_image(1))
        self.assertEqual(content_of(self.overlay, "qcow2"), raw_image(1))

    def test_a_base_image_is_not_grown_under_any_of_its_names(self) -> None:
        self.assert_refused(
            lambda manager, path: manager.resize_disk(model.Disk(path, "raw", 3 * MIB), 8 * MIB),
            str(self.base()),
            self.link,
            self.other_name,
            self.relative,
        )

    def test_a_base_image_is_not_used_again_as_a_disk(self) -> None:
        names = (str(self.base()), self.link, self.other_name, self.relative)
        self.assert_refused(lambda manager, path: manager.create_disk(ID, path, if_exists="reuse"), *names)
        self.assert_refused(
            lambda manager, path: manager.create_disk(ID, path, size=8 * MIB, if_exists="reuse"), *names
        )

    def test_a_base_image_is_not_removed_as_a_disk(self) -> None:
        linked = str(self.directory / "cache")
        os.symlink(self.instances / "_base", linked)
        self.assert_refused(
            lambda manager, path: manager.remove_disk(model.Disk(path, "raw", 3 * MIB)),
            str(self.base()),
            os.path.join(linked, layout.base_name(ID)),
        )

    def test_a_link_to_a_base_image_is_removed_without_what_it_leads_to(self) -> None:
        for path in (self.link, self.other_name, self.relative):
            self.manager(backend="raw").remove_disk(model.Disk(path, "raw", 3 * MIB))
            self.assertFalse(os.path.lexists(path))
        self.assertEqual(self.base().read_bytes(), raw_image(1))

    def test_nothing_is_made_in_the_directories_of_the_cache(self) -> None:
        private = self.instances / "_base" / ".imagecache"
        for path in map(str, (self.base(OTHER_ID), private / "records" / "other.json", private / "disk")):
            self.assert_refused(lambda manager, path: manager.create_disk(ID, path), path)
            self.assert_refused(lambda manager, path: manager.create_swap(path, size_mb=1), path)
            self.assert_refused(lambda manager, path: manager.fetch_file(ID, path), path)
            self.assertFalse(pathlib.Path(path).exists())

    def test_another_file_with_two_names_is_a_disk_like_any_other(self) -> None:
        manager = self.manager(backend="raw")
        disk = manager.create_disk(ID, self.target("disk"))
        os.link(disk.target, self.target("other"))
        self.assertEqual(manager.resize_disk(disk, 4 * MIB).virtual_size, 4 * MIB)
