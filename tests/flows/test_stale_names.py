# SPDX-License-Identifier: Apache-2.0
"""A base is confirmed by the server's listing where this host's kernel may answer from what it knew."""

from __future__ import annotations

import os

import imagecache_lib as ic
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import names
from imagecache_lib.system.trace import TracePoint
from tests.support.cache_case import ID, CacheCase, content_of, raw_image


class TestListing(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        for name in ("known", "base"):
            (self.directory / name).write_bytes(b"x")
        self.inode = os.stat(self.directory / "base").st_ino

    def is_listed(self, name: str = "base", inode: int = 0, known: str = "known") -> bool:
        return names.is_listed(str(self.directory), name, inode or self.inode, known=known)

    def test_a_file_of_that_name_and_number_is_listed(self) -> None:
        self.assertTrue(self.is_listed())

    def test_a_name_that_is_gone_is_not(self) -> None:
        os.unlink(self.directory / "base")
        self.assertFalse(self.is_listed())

    def test_another_file_of_that_name_is_not(self) -> None:
        self.assertFalse(self.is_listed(inode=self.inode + 10**6))

    def test_this_directory_s_filesystem_is_local_or_asked(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        self.assertIsInstance(names.may_be_stale(fd), bool)
        proc = os.open("/proc/self/status", os.O_RDONLY)
        self.addCleanup(os.close, proc)
        self.assertTrue(names.may_be_stale(proc), "of an unknown type")
        self.assertTrue(names.may_be_stale(-1), "it cannot be told")


class TestSharedCache(CacheCase):
    def shared(self) -> ic.ImageCacheManager:
        return self.manager(host=self.host(stale_names=True))

    def test_a_base_that_is_listed_is_used(self) -> None:
        self.manager(host=self.host(name="there")).cache_image(ID)
        disk = self.shared().create_disk(ID, self.target())
        self.assertEqual(raw_image(1), content_of(disk.target, "qcow2"))
        self.assertEqual(1, self.source.opens)

    def test_a_base_that_was_taken_away_is_made_anew(self) -> None:
        manager = self.shared()
        manager.cache_image(ID)
        self.manager(host=self.host(name="there")).list_hosts()
        self.points.at(TracePoint.DISK_MADE, self.base().unlink)
        disk = manager.create_disk(ID, self.target())
        self.assertEqual(raw_image(1), content_of(disk.target, "qcow2"))
        self.assertEqual(2, self.source.opens)

    def test_one_host_alone_lists_nothing(self) -> None:
        self.shared().cache_image(ID)
        cache = CacheStore(ic.CacheConfig(instances_path=str(self.instances)), self.host(stale_names=True))
        self.assertFalse(cache.is_shared())
        self.manager(host=self.host(name="there")).list_hosts()
        self.assertTrue(cache.is_shared())
