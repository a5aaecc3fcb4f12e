# SPDX-License-Identifier: Apache-2.0
"""Disks that lead to their base through a block device. Needs root."""

from __future__ import annotations

import contextlib
import os
import pathlib
import stat

from imagecache_lib.system.trace import TracePoint
from tests.flows.test_upkeep import UpkeepCase
from tests.lab.filesystems import loop_attached
from tests.support import files
from tests.support.cache_case import MIB


class TestLoopDevices(UpkeepCase):
    def setUp(self) -> None:
        super().setUp()
        self.only = self.cached()
        self.disk = self.instances / "uuid" / "disk"
        self.stack = self.enterContext(contextlib.ExitStack())

    def between(self) -> pathlib.Path:
        """Make an overlay on the base outside of the disk roots."""
        path = self.directory / "outside" / "between"
        files.overlay(path, self.only)
        return path

    def attach(self, image: pathlib.Path, *options: str) -> str:
        return self.stack.enter_context(loop_attached(image, *options))

    def assertCounts(self) -> None:
        self.unused()
        self.assertKept(self.only, self.verify(), f"used by the disk {self.disk}")

    def assertGoes(self) -> None:
        self.unused()
        self.verify()
        self.assertFalse(self.only.exists())

    def test_a_disk_on_a_loop_device_on_the_base_counts(self) -> None:
        device = self.attach(self.only, "--read-only")
        files.overlay(self.disk, device)
        self.assertCounts()
        self.disk.unlink()
        self.unused()
        self.assertKept(self.only, self.verify(), f"attached to {device} on this host")
        self.stack.close()
        self.assertGoes()

    def test_a_base_of_the_same_name_in_another_cache_that_is_attached_keeps_nothing_here(self) -> None:
        theirs = self.directory / "other" / "_base" / self.only.name
        theirs.parent.mkdir(parents=True)
        theirs.write_bytes(bytes(MIB))
        self.attach(theirs)
        self.assertGoes()

    def test_a_disk_on_a_loop_device_that_holds_an_overlay_counts(self) -> None:
        files.overlay(self.disk, self.attach(self.between()), backing_format="qcow2")
        self.assertCounts()

    def test_a_node_of_a_loop_device_on_the_base_counts(self) -> None:
        self.disk.parent.mkdir()
        device = os.stat(self.attach(self.only, "--read-only")).st_rdev
        os.mknod(self.disk, stat.S_IFBLK | 0o600, device)
        self.assertCounts()
        self.assertEqual((), self.manager().audit([]).findings)

    def test_a_link_to_a_loop_device_with_an_overlay_behind_its_beginning_counts(self) -> None:
        """What is at the beginning of the file says nothing of what the device holds."""
        container = self.directory / "outside" / "container"
        between = self.between().read_bytes()
        container.write_bytes(bytes(MIB) + between)
        self.disk.parent.mkdir()
        self.disk.symlink_to(self.attach(container, "--offset", str(MIB)))
        self.assertCounts()

    def test_a_loop_device_that_was_attached_during_the_pass_puts_the_base_back(self) -> None:
        """By then the base has another name, and that is what the kernel says of the device."""
        device = self.directory / "device"
        files.overlay(self.disk, device)

        def attach() -> None:
            device.symlink_to(self.attach(next(self.private.glob("trash/*/base")), "--read-only"))

        self.points.at(TracePoint.EVICT_RENAMED, attach)
        self.assertKept(self.only, self.verify(), "put back: used by")

    def test_what_was_seen_through_a_device_stays_while_it_is_detached(self) -> None:
        device = self.attach(self.between())
        files.overlay(self.disk, device, backing_format="qcow2")
        self.assertCounts()
        self.stack.close()
        self.assertCounts()

    def test_what_was_seen_through_a_device_stays_while_another_one_has_its_name(self) -> None:
        device, other = self.directory / "device", self.directory / "other"
        other.write_bytes(bytes(MIB))
        device.symlink_to(self.attach(self.between()))
        files.overlay(self.disk, device, backing_format="qcow2")
        self.assertCounts()
        device.unlink()
        device.symlink_to(self.attach(other))
        self.assertCounts()
        (problem,) = self.verify().problems
        self.assertIn(f"imagecache disk forget {self.disk}", problem)
        self.manager().forget_disks(str(self.disk))
        self.assertGoes()
