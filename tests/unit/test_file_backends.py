# SPDX-License-Identifier: Apache-2.0
"""Which format a disk has is decided when it is made, and by nobody's content afterwards."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import tempfile
import unittest
from typing import Any

from imagecache_lib import CacheConfig, System, errors, model
from imagecache_lib.backends.file import UNSYNCED_MARK, FileBackend
from imagecache_lib.backends.qcow2 import Qcow2Backend
from imagecache_lib.backends.raw import RawBackend
from imagecache_lib.formats.qcow2 import overlay
from imagecache_lib.nova import disk_info
from imagecache_lib.nova.disk_info import FORMAT_MARK
from imagecache_lib.system import atomic_file
from imagecache_lib.testing.backend_contract import commit
from tests.support.page_cache import dirty_pages

MIB = 2**20
NAME = "0123456789abcdef0123456789abcdef01234567"


class FileBackendCase(unittest.TestCase):
    def setUp(self) -> None:
        self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.root / "locks").mkdir()
        (self.root / "_base").mkdir()
        self.instance = self.root / "instance"
        self.instance.mkdir()
        self.info = self.instance / "disk.info"
        self.target = str(self.instance / "disk")
        self.base = self.make_base(MIB)

    def make_base(self, size: int, name: str = NAME) -> model.BaseImage:
        path = self.root / "_base" / name
        path.write_bytes(b"base" * (size // 4) + b"x" * (size % 4))
        fd = os.open(path, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        return model.BaseImage("id", name, str(path), "raw", size, fd=fd)

    def backend(self, kind: type[FileBackend], *, system: System | None = None, **config: Any) -> FileBackend:
        where = CacheConfig(instances_path=str(self.root), **config)
        return kind.from_config(where, system or System(name="here"))

    def create(self, kind: type[FileBackend], target: str | None = None, **config: Any) -> model.Disk:
        return commit(self.backend(kind, **config).prepare(self.base, target or self.target, None))

    def taken(self, kind: type[FileBackend], target: str) -> None:
        self.create(kind, target)

    def pinned(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.info.read_text())
        return found

    def forge_header(self, path: str) -> None:
        """Write what a guest would: a qcow2 header whose backing file is one of the host's."""
        with open(path, "r+b") as disk:
            disk.truncate(0)
            overlay.write_overlay(disk.fileno(), MIB, "/etc/shadow", "raw")


class TestFormats(FileBackendCase):
    def test_the_format_is_pinned_before_the_disk_can_be_seen(self) -> None:
        seen = []

        def trace(point: str) -> None:
            if point == "disk:placed":
                seen.append(self.pinned())

        for kind, format in ((RawBackend, "raw"), (Qcow2Backend, "qcow2")):
            target = f"{self.target}.{format}"
            backend = kind.from_config(CacheConfig(instances_path=str(self.root)), System(trace=trace))
            commit(backend.prepare(self.base, target, None))
            self.assertEqual(format, seen[-1][target])
        # The file is the one Nova keeps, and readable by it.
        self.assertEqual({f"{self.target}.raw": "raw", f"{self.target}.qcow2": "qcow2"}, self.pinned())
        self.assertEqual(0o644, self.info.stat().st_mode & 0o777)

    def test_a_guest_cannot_change_its_disks_format(self) -> None:
        self.create(RawBackend)
        self.forge_header(self.target)
        for kind in (RawBackend, Qcow2Backend):
            disk = self.backend(kind).inspect(self.target)
            self.assertEqual(("raw", None), (disk.format, disk.base))

    def test_a_disk_that_lost_its_pin_keeps_its_format(self) -> None:
        self.create(RawBackend)
        self.forge_header(self.target)
        for info in ("{}", "{", json.dumps({self.target: "qcow2"})):
            self.info.write_text(info)
            disk = self.backend(Qcow2Backend).inspect(self.target)
            self.assertEqual(("raw", None), (disk.format, disk.base))

    def test_a_guest_cannot_change_its_disks_format_after_its_directory_was_renamed(self) -> None:
        self.create(RawBackend)
        self.forge_header(self.target)
        os.removexattr(self.target, FORMAT_MARK)
        moved = self.root / "instance_resize"
        self.instance.rename(moved)
        self.assertEqual("raw", self.backend(Qcow2Backend).inspect(str(moved / "disk")).format)

    def test_a_guest_cannot_change_its_disks_format_when_the_pins_are_damaged(self) -> None:
        self.create(RawBackend)
        os.removexattr(self.target, FORMAT_MARK)
        for damage in ("", '{"/instances/disk": "ra', "[]", '{"/instances/disk": 7}'):
            with self.subTest(damage):
                self.info.write_text(damage)
                self.assertEqual("raw", self.backend(Qcow2Backend).inspect(self.target).format)
        self.forge_header(self.target)
        with self.assertRaises(disk_info.Damaged) as caught:
            self.backend(Qcow2Backend).inspect(self.target)
        self.assertIn(str(self.info), str(caught.exception))

    def test_damaged_pins_are_not_replaced_by_one_disks(self) -> None:
        self.info.write_text("{")
        with self.assertRaises(disk_info.Damaged):
            self.create(RawBackend)
        self.assertEqual("{", self.info.read_text())
        self.assertEqual(["disk.info"], os.listdir(self.instance))

    def test_a_disk_of_old_is_what_its_header_says(self) -> None:
        self.create(Qcow2Backend)
        self.info.unlink()
        os.removexattr(self.target, FORMAT_MARK)
        disk = self.backend(RawBackend).inspect(self.target)
        self.assertEqual(("qcow2", NAME), (disk.format, disk.base))

    def test_who_comes_too_late_does_not_pin_the_other_ones_format(self) -> None:
        for late, first in ((RawBackend, Qcow2Backend), (Qcow2Backend, RawBackend)):
            target = f"{self.target}.{late.name}"
            with (
                self.assertRaises(errors.DiskExistsError),
                self.backend(late).prepare(self.base, target, None) as pending,
            ):
                self.create(first, target)
                pending.commit()
            self.assertEqual(first.name, self.pinned()[target])
            self.assertEqual(first.name, self.backend(late).inspect(target).format)

    def test_a_file_that_nobody_pinned_is_not_pinned_by_who_may_not_have_its_name(self) -> None:
        path = pathlib.Path(self.target)
        with (
            self.assertRaises(errors.DiskExistsError),
            self.backend(Qcow2Backend).prepare(self.base, self.target, None) as pending,
        ):
            path.write_bytes(b"somebody's")
            pending.commit()
        self.assertEqual(b"somebody's", path.read_bytes())
        self.assertEqual(["disk"], os.listdir(self.instance))

    def test_disks_that_are_made_at_once_keep_each_others_pins(self) -> None:
        other = f"{self.target}.other"
        with (
            self.backend(Qcow2Backend).prepare(self.base, self.target, None) as one,
            self.backend(RawBackend).prepare(self.base, other, None) as two,
        ):
            one.commit()
            two.commit()
        self.assertEqual({self.target: "qcow2", other: "raw"}, self.pinned())
        self.assertEqual(["disk", "disk.info", "disk.other"], sorted(os.listdir(self.instance)))

    def test_a_disk_that_is_given_up_leaves_no_pin(self) -> None:
        with self.backend(Qcow2Backend).prepare(self.base, self.target, None):
            self.assertFalse(self.info.exists())
        self.assertEqual([], os.listdir(self.instance))

    def test_a_pin_that_is_taken_for_a_leftover_meanwhile_is_written_anew(self) -> None:
        with self.backend(Qcow2Backend).prepare(self.base, self.target, None) as pending:
            (written,) = self.instance.glob(".disk.info.*.new")
            written.unlink()
            pending.commit()
        self.assertEqual({self.target: "qcow2"}, self.pinned())

    def test_removing_one_disk_keeps_the_others_pins(self) -> None:
        one, two = self.create(RawBackend), self.create(Qcow2Backend, f"{self.target}.two")
        self.backend(RawBackend).remove(one)
        self.assertEqual({two.target: "qcow2"}, self.pinned())

    def test_a_disk_that_stands_alone_is_qcow2_whatever_its_base_is(self) -> None:
        for format in ("raw", "qcow2", "vmdk", "vdi", "vpc"):
            with self.subTest(format):
                path = self.root / "_base" / f"{format}-base"
                command = ["qemu-img", "convert", "-f", "raw", "-O", format, self.base.path, str(path)]
                subprocess.run(command, check=True)
                self.assert_stands_alone(path, format)

    def assert_stands_alone(self, base_path: pathlib.Path, format: str) -> None:
        info = subprocess.run(
            ["qemu-img", "info", "--output=json", "-f", format, str(base_path)],
            capture_output=True,
            check=True,
        )
        size = json.loads(info.stdout)["virtual-size"]  # vpc rounds up to its geometry
        fd = os.open(base_path, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        base = model.BaseImage("id", NAME, str(base_path), format, size, fd=fd)
        target = f"{self.target}.{format}"
        backend = self.backend(Qcow2Backend)
        disk = commit(backend.prepare_standalone(base, target, 4 * MIB))
        self.assertEqual(model.Disk(target, "qcow2", 4 * MIB), disk)
        self.assertEqual(disk, backend.inspect(target))
        self.assertEqual("qcow2", self.pinned()[target])
        compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", self.base.path, target]
        subprocess.run(compare, check=True, capture_output=True)
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", target], check=True)

    def test_a_raw_disk_of_an_earlier_release_goes_on_as_raw(self) -> None:
        disk = self.create(RawBackend)
        os.removexattr(disk.target, FORMAT_MARK)
        backend = self.backend(Qcow2Backend)
        found = backend.inspect(disk.target)
        self.assertEqual(("raw", None, MIB), (found.format, found.base, found.virtual_size))
        self.assertEqual(("raw", 2 * MIB), (backend.resize(found, 2 * MIB).format, 2 * MIB))
        self.assertEqual(2 * MIB, os.stat(disk.target).st_size)


class TestSizes(FileBackendCase):
    def test_an_overlay_of_a_base_that_ends_between_sectors_holds_all_of_it(self) -> None:
        base = self.make_base(MIB + 100, "f" * 40)
        disk = commit(self.backend(Qcow2Backend).prepare(base, self.target, None))
        self.assertEqual(MIB + 512, disk.virtual_size)

    def test_a_raw_copy_of_such_a_base_has_its_bytes(self) -> None:
        base = self.make_base(MIB + 100, "f" * 40)
        commit(self.backend(RawBackend).prepare(base, self.target, None))
        self.assertEqual(pathlib.Path(base.path).read_bytes(), pathlib.Path(self.target).read_bytes())

    def test_holes_stay_holes(self) -> None:
        fd = os.open(self.base.path, os.O_RDWR)
        os.ftruncate(fd, 2**30)
        os.close(fd)
        disk = self.create(RawBackend)
        self.assertEqual(2**30, os.stat(disk.target).st_size)
        self.assertLess(os.stat(disk.target).st_blocks * 512, 2 * MIB)

    def test_allocated_ahead_a_disk_has_all_its_blocks(self) -> None:
        for kind in (RawBackend, Qcow2Backend):
            backend = self.backend(kind, preallocate_images="space")
            disk = commit(backend.prepare(self.base, f"{self.target}.{kind.name}", 32 * MIB))
            self.assertGreaterEqual(os.stat(disk.target).st_blocks * 512, 32 * MIB)


class TestBackingFiles(FileBackendCase):
    def test_a_disk_is_cut_loose_from_a_base_of_this_cache_only(self) -> None:
        other = self.root / "elsewhere.img"
        other.write_bytes(b"else" * (MIB // 4))
        with open(self.target, "wb+") as disk:
            overlay.write_overlay(disk.fileno(), MIB, str(other), "raw")
        backend = self.backend(Qcow2Backend)
        for attempt in (backend.flatten, lambda disk: backend.resize(disk, 2 * MIB)):
            with self.assertRaises(errors.BackendError) as caught:
                attempt(backend.inspect(self.target))
            self.assertIn("elsewhere", str(caught.exception))
        self.assertEqual(MIB, backend.inspect(self.target).virtual_size)


class TestDisksThatCannotBeChanged(FileBackendCase):
    def test_a_disk_in_use_is_no_fault_of_the_host(self) -> None:
        backend = self.backend(Qcow2Backend)
        disk = self.create(Qcow2Backend)
        # A guest has it open, as its QEMU does.
        guest = subprocess.Popen(
            ["qemu-io", "-f", "qcow2", disk.target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with guest:
            assert guest.stdin is not None and guest.stdout is not None
            guest.stdin.write(b"read 0 512\n")
            guest.stdin.flush()
            guest.stdout.readline()
            for attempt in (backend.flatten, lambda disk: backend.resize(disk, 64 * MIB)):
                with self.assertRaises(errors.BackendError) as caught:
                    attempt(disk)
                self.assertIn("shut the guest down", caught.exception.next_step or "")
        self.assertEqual(disk, backend.inspect(disk.target))

    def test_a_disk_that_cannot_be_read_is_told_with_what_to_do(self) -> None:
        backend = self.backend(Qcow2Backend)
        disk = self.create(Qcow2Backend)
        with open(disk.target, "r+b") as file:
            file.seek(72)
            file.write((2).to_bytes(8, "big"))  # marked as corrupt
        for attempt in (backend.flatten, lambda disk: backend.resize(disk, 64 * MIB)):
            with self.assertRaises(errors.BackendError) as caught:
                attempt(disk)
            self.assertIn("qemu-img check", caught.exception.next_step or "")


class TestDurability(FileBackendCase):
    """What a power cut after the call leaves of a disk."""

    def unsynced_when_named(self, kind: type[FileBackend], base: model.BaseImage, **config: Any) -> int:
        """Return how many pages of a disk wait to be written at the moment in which it has its name."""
        seen: list[int] = []

        def trace(point: str) -> None:
            if point == "disk:placed":
                seen.append(dirty_pages(self.target))

        backend = self.backend(kind, system=System(trace=trace), **config)
        disk = commit(backend.prepare(base, self.target, None))
        backend.remove(disk)
        return seen[0]

    def test_the_content_is_durable_before_the_disk_has_its_name(self) -> None:
        for kind in (RawBackend, Qcow2Backend):
            with self.subTest(kind.name):
                self.assertEqual(0, self.unsynced_when_named(kind, self.base))

    def test_swap_and_overlays_are_synced_always(self) -> None:
        swap = self.make_base(MIB, "swap_1")
        self.assertEqual(0, self.unsynced_when_named(RawBackend, swap, sync_copied_disks=False))
        self.assertEqual(0, self.unsynced_when_named(Qcow2Backend, self.base, sync_copied_disks=False))

    def test_a_copy_that_was_not_synced_says_so(self) -> None:
        self.create(RawBackend, sync_copied_disks=False)
        self.assertIn(System().boot_id, os.getxattr(self.target, UNSYNCED_MARK).decode())

    def test_a_copy_that_was_not_synced_is_synced_before_it_is_used_again(self) -> None:
        self.create(RawBackend, sync_copied_disks=False)
        self.assertTrue(self.backend(RawBackend).ensure_durable(self.target))
        self.assertEqual(0, dirty_pages(self.target))
        self.assertNotIn(UNSYNCED_MARK, os.listxattr(self.target))

    def test_a_copy_that_was_not_synced_before_a_restart_is_not_durable(self) -> None:
        self.create(RawBackend, sync_copied_disks=False)
        restarted = self.backend(RawBackend, system=System(boot_id="another"))
        self.assertFalse(restarted.ensure_durable(self.target))

    def test_a_copy_that_a_guest_used_for_long_before_a_restart_is_good(self) -> None:
        self.create(RawBackend, sync_copied_disks=False)
        later = os.stat(self.target).st_mtime + 2 * 3600
        os.utime(self.target, (later, later))
        restarted = self.backend(RawBackend, system=System(boot_id="another"))
        self.assertTrue(restarted.ensure_durable(self.target))

    def test_a_link_whose_answer_was_lost_is_no_other_disk(self) -> None:
        # What an NFS client does: the link is made, and the repeated request is told that the name exists.
        with atomic_file.unfinished(self.target, System()) as file:
            file.seal()
            os.link(file.path, self.target)
            file.commit()
        self.assertEqual(["disk"], os.listdir(self.instance))
