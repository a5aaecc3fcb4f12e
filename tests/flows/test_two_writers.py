# SPDX-License-Identifier: Apache-2.0
"""Small files that several processes write at once, and what a power cut took of them."""

from __future__ import annotations

import json
import os
import pathlib
import threading

import imagecache_lib as ic
from imagecache_lib.store import last_scan
from imagecache_lib.store.layout import Layout
from imagecache_lib.store.seen import Identity, LastScan, SeenDirectory, SeenDisk
from imagecache_lib.system import durable
from tests.support.cache_case import ID, CacheCase


def scan_of(
    *paths: str, inode: int = 1, names: tuple[str, ...] = ("swap_1",), report: tuple[str, ...] | None = None
) -> LastScan:
    directory = SeenDirectory("/root", Identity(1, 2))
    reported = None if report is None else [ic.Instance(uuid, "here", (ID,)) for uuid in report]
    return LastScan({path: SeenDisk(path, names, directory, inode) for path in paths}, report=reported)


class TestLastScan(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.where = Layout(str(self.directory), str(self.directory))
        os.makedirs(self.where.hosts)

    def load(self) -> LastScan:
        return last_scan.load_last_scan(self.where, "here", {})

    def save(self, before: LastScan, now: LastScan) -> None:
        last_scan.save_last_scan(self.where, "here", before, now)

    def test_of_two_that_write_at_once_both_are_remembered(self) -> None:
        for turn in range(3):
            before, start = self.load(), threading.Barrier(8)

            def write(path: str, before: LastScan = before, start: threading.Barrier = start) -> None:
                start.wait()
                self.save(before, scan_of(path))

            wanted = {f"/root/{turn}.{number}" for number in range(8)}
            running = [threading.Thread(target=write, args=(path,)) for path in wanted]
            for each in running:
                each.start()
            for each in running:
                each.join()
            self.assertEqual(set(), wanted - self.load().disks.keys())

    def test_what_is_gone_is_not_brought_back_by_who_saw_it_before(self) -> None:
        self.save(LastScan(), scan_of("/root/gone", "/root/stays"))
        before = self.load()
        self.save(before, scan_of("/root/gone", "/root/stays", "/root/new"))
        self.save(before, scan_of("/root/stays"))
        self.assertEqual({"/root/stays", "/root/new"}, set(self.load().disks))

    def test_another_disk_at_the_path_of_one_that_is_gone_is_kept(self) -> None:
        self.save(LastScan(), scan_of("/root/disk"))
        before = self.load()
        self.save(before, scan_of("/root/disk", inode=7))
        self.save(before, scan_of("/root/other"))
        self.assertEqual({"/root/disk", "/root/other"}, set(self.load().disks))

    def test_the_base_of_a_disk_that_was_made_anew_is_not_forgotten_for_that_of_the_former_one(self) -> None:
        """The pass that saw the former one was stopped, and ends last."""
        self.save(LastScan(), scan_of("/root/disk"))
        before = self.load()
        self.save(before, scan_of("/root/disk", inode=7, names=("swap_2",)))
        self.save(before, scan_of("/root/disk"))
        self.assertEqual(
            {"swap_1", "swap_2"}, {name for disk in self.load().all_disks() for name in disk.names}
        )

    def test_what_was_reported_to_another_pass_meanwhile_is_not_forgotten(self) -> None:
        self.save(LastScan(), scan_of(report=("gone", "stays")))
        before = self.load()
        self.save(before, scan_of(report=("stays", "new", "newest")))
        self.save(before, scan_of(report=("stays", "new")))
        self.assertEqual(["stays", "new", "newest"], [each.uuid for each in self.load().report or ()])

    def test_both_forms_say_the_same_in_the_end(self) -> None:
        self.save(LastScan(), scan_of("/root/a"))
        readings = json.loads(pathlib.Path(self.where.readings("here")).read_bytes())
        self.assertEqual({"", "/root/a"}, set(readings))
        self.assertTrue(self.load().is_whole)


class TestExchange(CacheCase):
    def test_what_was_replaced_is_returned(self) -> None:
        path = str(self.directory / "file")
        self.assertIsNone(durable.exchange_file(path, b"one"))
        self.assertEqual(b"one", durable.exchange_file(path, b"two"))
        self.assertEqual(b"two", pathlib.Path(path).read_bytes())
        self.assertEqual(["file"], [name for name in os.listdir(self.directory) if "file" in name])

    def test_a_directory_is_never_moved_aside(self) -> None:
        (self.directory / "file").mkdir()
        before = sorted(os.listdir(self.directory))
        with self.assertRaises(IsADirectoryError):
            durable.exchange_file(str(self.directory / "file"), b"one")
        self.assertEqual(before, sorted(os.listdir(self.directory)))


class TestDiskInfo(CacheCase):
    def test_a_pin_that_a_power_cut_took_is_written_anew_where_the_disk_is_reused(self) -> None:
        for backend in ("raw", "qcow2"):
            manager = self.manager(backend=backend)
            target, swap = self.target("disk", backend), self.target("swap", backend)
            manager.create_disk(ID, target)
            manager.create_swap(swap, size_mb=16)
            pinned = self.instances / backend / "disk.info"
            before = json.loads(pinned.read_bytes())
            for left in ({}, {swap: before[swap]}):
                pinned.unlink()
                if left:
                    pinned.write_text(json.dumps(left))
                manager.create_disk(ID, target, if_exists="reuse")
                self.assertEqual(before, json.loads(pinned.read_bytes()))
            pinned.unlink()
            manager.create_swap(swap, size_mb=16, if_exists="reuse")
            self.assertEqual(before, json.loads(pinned.read_bytes()))

    def test_a_guest_that_wrote_a_header_meanwhile_does_not_choose(self) -> None:
        manager = self.manager(backend="raw")
        disk = manager.create_disk(ID, self.target())
        os.unlink(self.instances / "instance-1" / "disk.info")
        with open(disk.target, "r+b") as file:
            file.write(b"QFI\xfb")
        self.assertEqual("raw", manager.create_disk(ID, disk.target, if_exists="reuse").format)
        self.assertEqual(
            "raw", json.loads((self.instances / "instance-1" / "disk.info").read_bytes())[disk.target]
        )
