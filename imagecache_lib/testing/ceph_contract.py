# SPDX-License-Identifier: Apache-2.0
"""What every :class:`~imagecache_lib.backends.ceph.CephCluster` must do, real or in memory."""

from __future__ import annotations

import threading
import unittest
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from imagecache_lib import errors
from imagecache_lib.backends import ceph
from imagecache_lib.backends.ceph import RbdName
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter

# For the type checker this is a test case; at run time it is a mixin, so that nothing runs it by itself.
if TYPE_CHECKING:
    _Case = unittest.TestCase
else:
    _Case = object

MIB = 2**20


class CephContract(_Case):
    """Mix it into a :class:`unittest.TestCase` and supply the methods that raise AssertionError here."""

    #: A pool that exists and another one.
    pool = "images"
    other_pool = "vms"

    def make_cluster(self) -> ceph.CephCluster:
        """Return the cluster to test."""
        raise AssertionError("a contract test case supplies make_cluster")

    def read(self, name: RbdName, offset: int, length: int) -> bytes:
        """Return bytes of an image."""
        raise AssertionError("a contract test case supplies read")

    def opened(self, name: RbdName) -> AbstractContextManager[object]:
        """Have an image open for writing during the body."""
        raise AssertionError("a contract test case supplies opened")

    def create_snapshot(self, name: RbdName, *, protect: bool = True) -> None:
        """Take the snapshot that the name says."""
        raise AssertionError("a contract test case supplies create_snapshot")

    def remove_snapshot(self, name: RbdName) -> None:
        """Unprotect a snapshot and remove it, with the errors of this library."""
        raise AssertionError("a contract test case supplies remove_snapshot")

    def setUp(self) -> None:
        super().setUp()
        self.cluster = self.make_cluster()

    def new_name(self, pool: str | None = None) -> RbdName:
        return RbdName(pool or self.pool, f"image-{uuid.uuid4().hex}")

    def made(self, size: int = MIB) -> RbdName:
        name = self.new_name()
        self.cluster.create(name, size)
        self.cluster.fill(name, [(0, b"first"), (4096, b"second"), (size - 4, b"last")])
        return name

    def snapshot(self, size: int = MIB, *, protect: bool = True) -> RbdName:
        name = self.made(size)
        snapshot = RbdName(name.pool, name.image, "snap")
        self.create_snapshot(snapshot, protect=protect)
        return snapshot

    # ------------------------------------------------------------------------------------------------

    def test_an_image_is_what_it_was_filled_with(self) -> None:
        name = self.made()
        self.assertEqual(MIB, self.cluster.stat(name).size)
        self.assertIsNone(self.cluster.stat(name).parent)
        self.assertEqual(b"first" + bytes(4091) + b"second", self.read(name, 0, 4102))
        self.assertEqual(b"last", self.read(name, MIB - 4, 4))
        self.assertIn(name.image, self.cluster.names(name.pool))

    def test_its_content_is_read_from_any_offset(self) -> None:
        snapshot = self.snapshot()
        content = self.read(snapshot, 0, MIB)
        for offset in (0, 1, 4096, MIB - 4, MIB):
            self.assertEqual(content[offset:], b"".join(self.cluster.chunks(snapshot, offset)))

    def test_what_was_opened_for_reading_is_closed_again(self) -> None:
        name = self.made()
        chunks = self.cluster.chunks(name)
        next(chunks)
        chunks.close()
        self.cluster.remove(name)

    def test_its_id_is_always_the_same(self) -> None:
        self.assertRegex(self.cluster.fsid(), r"^[0-9a-f-]{36}$")
        self.assertEqual(self.cluster.fsid(), self.cluster.fsid())

    def test_what_is_not_there_is_missing(self) -> None:
        name, snapshot = self.new_name(), self.snapshot()
        for wrong in (
            name,
            RbdName("no-such-pool", "x"),
            RbdName(snapshot.pool, snapshot.image, "no-such-snapshot"),
        ):
            with self.subTest(wrong), self.assertRaises(ceph.Missing) as caught:
                self.cluster.stat(wrong)
            self.assertIn(str(wrong), str(caught.exception))
        calls: tuple[Callable[[], object], ...] = (
            lambda: self.cluster.resize(name, MIB),
            lambda: self.cluster.fill(name, [(0, b"x")]),
            lambda: self.cluster.flatten(name),
            lambda: self.cluster.rename(name, "y"),
            lambda: self.cluster.remove(name),
            lambda: self.cluster.names("no-such-pool"),
            lambda: self.cluster.create(RbdName("no-such-pool", "x"), MIB),
            lambda: self.cluster.clone(RbdName(name.pool, name.image, "snap"), self.new_name()),
        )
        for call in calls:
            with self.assertRaises(ceph.Missing):
                call()

    def test_a_name_is_given_once(self) -> None:
        taken, other, snapshot = self.made(), self.made(), self.snapshot()
        calls: tuple[Callable[[], object], ...] = (
            lambda: self.cluster.create(taken, MIB),
            lambda: self.cluster.rename(other, taken.image),
            lambda: self.cluster.clone(snapshot, taken),
        )
        for call in calls:
            with self.assertRaises(errors.DiskExistsError):
                call()
        self.assertEqual(b"first", self.read(taken, 0, 5))
        self.assertEqual(b"first", self.read(other, 0, 5))

    def test_of_many_renamed_to_one_name_one_gets_it(self) -> None:
        names, wanted = [self.made() for _ in range(6)], self.new_name()
        start, failures = threading.Barrier(len(names)), list[BaseException]()

        def rename(name: RbdName) -> None:
            start.wait()
            try:
                self.cluster.rename(name, wanted.image)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=rename, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([errors.DiskExistsError] * 5, [type(failure) for failure in failures])
        self.assertEqual(b"first", self.read(wanted, 0, 5))
        present = set(self.cluster.names(self.pool))
        self.assertEqual(5, sum(name.image in present for name in names))

    def test_renaming_keeps_the_content(self) -> None:
        name, new = self.made(), self.new_name()
        self.cluster.rename(name, new.image)
        self.assertEqual(b"first", self.read(new, 0, 5))
        with self.assertRaises(ceph.Missing):
            self.cluster.stat(name)

    def test_a_clone_keeps_its_parent_under_another_name(self) -> None:
        snapshot, child = self.snapshot(), self.new_name(self.other_pool)
        self.cluster.clone(snapshot, child)
        new = self.new_name(self.other_pool)
        self.cluster.rename(child, new.image)
        self.assertEqual(snapshot, self.cluster.stat(new).parent)

    def test_a_clone_has_its_parents_content_and_depends_on_it(self) -> None:
        snapshot, child = self.snapshot(), self.new_name(self.other_pool)
        self.cluster.clone(snapshot, child)
        found = self.cluster.stat(child)
        self.assertEqual((MIB, snapshot), (found.size, found.parent))
        self.cluster.fill(child, [(0, b"child")])
        self.assertEqual(b"child", self.read(child, 0, 5))
        self.assertEqual(b"first", self.read(RbdName(snapshot.pool, snapshot.image), 0, 5))
        with self.assertRaises(ceph.Busy):
            self.remove_snapshot(snapshot)
        self.cluster.flatten(child)
        self.cluster.flatten(child)
        self.assertIsNone(self.cluster.stat(child).parent)
        self.remove_snapshot(snapshot)
        self.assertEqual(b"second", self.read(child, 4096, 6))

    def test_a_caller_who_no_longer_waits_ends_a_flatten(self) -> None:
        snapshot, child = self.snapshot(64 * MIB), self.new_name(self.other_pool)
        self.cluster.clone(snapshot, child)
        cancel = threading.Event()
        cancel.set()
        with self.assertRaises(errors.CancelledError):
            self.cluster.flatten(child, Waiter(System(name="contract"), cancel=cancel))
        self.assertEqual(snapshot, self.cluster.stat(child).parent)
        self.assertEqual(b"last", self.read(child, 64 * MIB - 4, 4))
        self.cluster.flatten(child, Waiter(System(name="contract")))
        self.assertIsNone(self.cluster.stat(child).parent)
        self.assertEqual(b"last", self.read(child, 64 * MIB - 4, 4))

    def test_a_clone_that_is_removed_frees_its_parent(self) -> None:
        snapshot, child = self.snapshot(), self.new_name(self.other_pool)
        self.cluster.clone(snapshot, child)
        self.cluster.remove(child)
        self.remove_snapshot(snapshot)

    def test_an_unprotected_snapshot_is_not_cloned(self) -> None:
        snapshot, child = self.snapshot(protect=False), self.new_name(self.other_pool)
        with self.assertRaises(ceph.Unprotected):
            self.cluster.clone(snapshot, child)
        self.assertNotIn(child.image, self.cluster.names(child.pool))

    def test_what_is_in_use_is_not_removed(self) -> None:
        name, snapshot = self.made(), self.snapshot()
        with self.opened(name), self.assertRaises(ceph.Busy) as caught:
            self.cluster.remove(name)
        self.assertIn(str(name), str(caught.exception))
        self.cluster.remove(name)
        with self.assertRaises(ceph.Busy):
            self.cluster.remove(RbdName(snapshot.pool, snapshot.image))

    def test_an_image_is_in_use_while_it_is_filled(self) -> None:
        name, refused = self.made(), list[BaseException]()

        def chunks() -> Iterator[tuple[int, bytes]]:
            yield 0, b"begun"
            try:
                self.cluster.remove(name)
            except ceph.Busy as error:
                refused.append(error)
            yield 5, b"done"

        self.cluster.fill(name, chunks())
        self.assertEqual(1, len(refused))
        self.assertEqual(b"begundone", self.read(name, 0, 9))

    def test_what_fails_while_an_image_is_filled_passes(self) -> None:
        name = self.made()

        def chunks() -> Iterator[tuple[int, bytes]]:
            yield 0, b"begun"
            raise errors.BackendError("the base image ended early")

        with self.assertRaisesRegex(errors.BackendError, "ended early"):
            self.cluster.fill(name, chunks())
        with self.assertRaises(errors.BackendError):
            self.cluster.fill(name, [(2 * MIB, b"past the end")])
        self.cluster.remove(name)

    def test_a_resized_image_keeps_its_content(self) -> None:
        name = self.made()
        self.cluster.resize(name, 3 * MIB)
        self.assertEqual(3 * MIB, self.cluster.stat(name).size)
        self.assertEqual(b"last" + bytes(8), self.read(name, MIB - 4, 12))

    def test_it_tells_when_an_image_was_touched(self) -> None:
        earlier = self.cluster.stat(self.made()).touched
        later = self.cluster.stat(self.made()).touched
        self.assertLessEqual(earlier, later)
        self.assertLess(later - earlier, 3600)
