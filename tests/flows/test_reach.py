# SPDX-License-Identifier: Apache-2.0
"""An overlay is made only where the pass will see it: elsewhere its base would go while the disk needs it."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors
from tests.support.cache_case import ID, CacheCase

MIB = 2**20


class TestReach(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.outside = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def make(self, directory: str | os.PathLike[str], **options: Any) -> ic.Disk:
        os.makedirs(directory, exist_ok=True)
        return self.manager(**options).create_disk(ID, os.path.join(directory, "disk"), size=16 * MIB)

    def assert_refused(self, directory: str | os.PathLike[str], **options: Any) -> errors.BackendError:
        with self.assertRaises(errors.BackendError) as caught:
            self.make(directory, **options)
        self.assertEqual(0, self.source.opens)
        self.assertEqual([], [name for name in os.listdir(directory) if "disk" in name])
        return caught.exception

    def assert_protects(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """A disk may be made there, and the pass then keeps its base, however old."""
        self.make(directory, **options)
        for path in (self.base(), self.record()):
            os.utime(path, (0, 0))
        report = self.manager(**options).verify_base_images([])
        self.assertEqual([False], [base.evicted for base in report.bases])

    def test_outside_every_root_nothing_is_fetched(self) -> None:
        error = self.assert_refused(self.outside / "vm")
        for said in (ID, str(self.outside / "vm" / "disk"), str(self.instances), "disk_roots"):
            self.assertIn(said, str(error))

    def test_no_swap_is_made_outside_every_root(self) -> None:
        with self.assertRaises(errors.BackendError):
            self.manager().create_swap(str(self.outside / "swap"), size_mb=1)
        self.assertEqual([], os.listdir(self.outside))

    def test_a_disk_that_stands_alone_may_be_anywhere(self) -> None:
        self.assertIsNone(self.make(self.outside / "vm", backend="raw").base)

    def test_once_it_is_a_disk_root_it_is_fine(self) -> None:
        roots = (str(self.instances), str(self.outside))
        self.assert_protects(self.outside / "vm", disk_roots=roots)

    def test_the_instances_directory_counts_only_if_it_is_a_root(self) -> None:
        self.assert_refused(self.instances / "vm", disk_roots=(str(self.outside),))

    def test_any_depth_below_a_root_is_seen(self) -> None:
        self.assert_protects(self.instances / "a" / "b" / ".c" / "d")

    def test_a_root_itself_is_seen(self) -> None:
        self.assert_protects(self.instances)

    def test_a_root_that_is_a_link_means_what_it_leads_to(self) -> None:
        link = self.outside / "root"
        link.symlink_to(self.instances)
        self.assert_protects(self.instances / "vm", disk_roots=(str(link),))

    def test_a_path_that_leads_into_a_root_is_fine(self) -> None:
        (self.outside / "link").symlink_to(self.instances)
        self.assert_protects(self.outside / "link" / "vm")

    def test_an_instance_directory_may_be_a_link_out_of_its_root(self) -> None:
        (self.outside / "vm").mkdir()
        (self.instances / "vm").symlink_to(self.outside / "vm")
        self.assert_protects(self.instances / "vm" / "snapshots")

    def test_a_disk_beside_what_such_a_link_leads_to_is_refused(self) -> None:
        for name in ("vm", "other"):
            (self.outside / name).mkdir()
        (self.instances / "vm").symlink_to(self.outside / "vm")
        self.assert_refused(os.path.join(self.instances, "vm", "..", "other"))

    def test_no_disk_is_made_among_the_cache_s_own_files(self) -> None:
        self.manager().unpin(ID, owner="nobody")  # makes the directories
        own = ("_base", "_base/vm", "_base/.imagecache/stage", "locks")
        for directory in (self.instances / name for name in own):
            with self.subTest(directory):
                self.assertIn("cache's own", str(self.assert_refused(directory)))

    def test_no_disk_is_made_among_the_cache_s_own_files_through_a_link(self) -> None:
        self.manager().unpin(ID, owner="nobody")
        (self.instances / "vm").symlink_to(self.base().parent / ".imagecache")
        self.assert_refused(self.instances / "vm")

    def test_an_overlay_that_came_from_elsewhere_is_not_given_a_base_there(self) -> None:
        disk = self.make(self.instances / "vm")
        moved = shutil.move(disk.target, str(self.outside / "disk"))
        with self.assertRaises(errors.BackendError) as caught:
            self.manager().ensure_backing(moved, image_id=ID)
        self.assertIn("disk_roots", str(caught.exception))
