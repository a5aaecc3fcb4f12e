# SPDX-License-Identifier: Apache-2.0
"""A disk that is moved while its directory and the one that it goes to are read: the second look finds it."""

from __future__ import annotations

import os
from collections.abc import Callable

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.system.trace import TracePoint
from tests.flows.test_upkeep import OLD, UpkeepCase
from tests.support import files
from tests.support.cache_case import ID


class TestSecondLooks(UpkeepCase):
    def setUp(self) -> None:
        super().setUp()
        self.only = self.cached()
        self.read_first, self.read_next = (self.instances / name / "disk" for name in ("first", "next"))
        for disk in (self.read_first, self.read_next):
            disk.parent.mkdir()
        self.read_first.write_bytes(bytes(4096))
        made = self.directory / "made"
        files.overlay(made, self.only)
        self.overlay = made.read_bytes()

    def assertSeen(self, move: Callable[[], object]) -> None:
        """Let a disk be made before the last reading, and be moved between two directories by that."""

        def made() -> None:
            self.read_next.write_bytes(self.overlay)
            files.age(self.read_first.parent, self.read_next.parent, self.instances, seconds=OLD)
            self.points.at(TracePoint.REFERENCES_DIRECTORY, lambda: None)
            self.points.at(TracePoint.REFERENCES_DIRECTORY, move)

        self.points.at(TracePoint.EVICT_RENAMED, made)
        # Known instances are read in this order.
        report = [ic.Instance(disk.parent.name, "there") for disk in (self.read_first, self.read_next)]
        self.points.seen.clear()
        self.assertKept(self.only, self.verify(report), "put back: used by")

    def test_though_the_time_of_the_directory_is_set_back(self) -> None:
        """As programs do that copy trees of files."""

        def move() -> None:
            before = os.stat(self.read_first.parent)
            self.read_next.rename(self.read_first.with_name("moved"))
            os.utime(self.read_first.parent, ns=(before.st_atime_ns, before.st_mtime_ns))

        self.assertSeen(move)

    def test_though_it_is_a_copy_that_has_the_name_and_inode_of_a_file_that_was_read(self) -> None:
        """A filesystem gives the inode of a file that was removed to the next one."""

        def move() -> None:
            self.read_first.write_bytes(self.overlay)
            (self.read_first.parent / "temporary").touch()
            (self.read_first.parent / "temporary").unlink()
            self.read_next.unlink()

        self.assertSeen(move)


class TestWhatAnotherProcessSaw(UpkeepCase):
    """A process that is stopped in the middle goes on when the disk is not to be seen any more."""

    def setUp(self) -> None:
        super().setUp()
        self.only = self.cached()
        self.volume = self.directory / "volume"
        files.overlay(self.volume / "disk", self.only)

    def another_pass(self) -> None:
        """Let the pass of another process see a disk on a volume that is there for so long only."""
        where = self.instances / "uuid"
        where.symlink_to(self.volume)
        self.verify()
        self.volume.rename(self.directory / "unmounted")
        self.unused()

    def test_keeps_a_base_from_a_pass(self) -> None:
        self.points.at(TracePoint.VERIFY_READ, self.another_pass)
        self.assertKept(self.only, self.verify(), "put back: used by the disk")

    def test_keeps_a_base_from_an_operator(self) -> None:
        self.points.at(TracePoint.VERIFY_READ, self.another_pass)
        with self.assertRaisesRegex(errors.BaseInUseError, "put back: used by the disk"):
            self.manager().evict_image(ID)

    def test_keeps_a_base_that_a_driver_reported_to_it(self) -> None:
        def another_pass() -> None:
            self.verify([ic.Instance("uuid", "there", (ID,))])
            self.unused()

        self.points.at(TracePoint.VERIFY_READ, another_pass)
        self.assertKept(self.only, self.verify(), "put back: used by instance uuid")
        with self.assertRaisesRegex(errors.BaseInUseError, "used by instance uuid"):
            self.manager().evict_image(ID)
