# SPDX-License-Identifier: Apache-2.0
"""Work on a disk ends once its caller no longer waits, however long the program it takes would go on."""

from __future__ import annotations

import os
import pathlib
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from oslo_concurrency import processutils

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.nova.disk_info import DiskInfo
from imagecache_lib.store import layout, pins
from imagecache_lib.system import locks
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, MIB, CacheCase, content_of, disk_image, raw_image


class Stuck:
    """A :attr:`System.execute` with which a subcommand of qemu-img never ends.

    :param subcommand: of qemu-img.
    """

    def __init__(self, subcommand: str) -> None:
        self._subcommand = subcommand
        self.began = threading.Event()

    def __call__(self, *command: str, **options: Any) -> tuple[str, str]:
        if self._subcommand in command:
            self.began.set()
            end = next(at for at, word in enumerate(command) if word.endswith(("bwrap", "qemu-img")))
            command = (*command[:end], "sleep", "600")
        out, err = processutils.execute(*command, **options)
        return str(out), str(err)


class TestInterruptedDisks(CacheCase):
    def test_a_deadline_ends_growing_and_flattening_and_the_disk_stays_whole(self) -> None:
        made = self.manager().create_disk(ID, self.target())
        works: dict[str, Callable[[ic.ImageCacheManager, ic.Request], object]] = {
            "resize": lambda manager, request: manager.resize_disk(made, 8 * MIB, request=request),
            "rebase": lambda manager, request: manager.flatten_disk(made, request=request),
        }
        for subcommand, work in works.items():
            with self.subTest(subcommand):
                manager = self.manager(host=self.host(execute=Stuck(subcommand)))
                began = time.monotonic()
                with self.assertRaises(errors.LockTimeoutError):
                    work(manager, ic.Request(deadline=time.time() + 1))
                self.assertLess(time.monotonic() - began, 60)
                self.assertEqual(raw_image(1), content_of(made.target, "qcow2"))
                self.assertEqual(made, manager.inspect_disk(made.target))

    def test_a_service_may_outlive_the_directory_in_which_it_was_started(self) -> None:
        manager, gone = self.manager(), self.directory / "gone"
        disk = manager.create_disk(ID, self.target())
        self.addCleanup(os.chdir, os.getcwd())
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
        grown = manager.resize_disk(disk, 8 * MIB)
        self.assertIsNone(manager.flatten_disk(grown).base)
        manager.create_swap(self.target("swap"), size_mb=1)
        os.chdir(self.directory)
        self.assertEqual(raw_image(1), content_of(disk.target, "qcow2")[: len(raw_image(1))])

    def test_a_token_ends_what_is_at_work(self) -> None:
        made = self.manager().create_disk(ID, self.target())
        stuck, cancel = Stuck("rebase"), threading.Event()
        manager = self.manager(host=self.host(execute=stuck))
        running = self.running(lambda: manager.flatten_disk(made, request=ic.Request(cancel=cancel)))
        self.assertTrue(stuck.began.wait(60))
        cancel.set()
        with self.assertRaises(errors.CancelledError):
            running.result()
        self.assertEqual(made, manager.inspect_disk(made.target))

    def test_a_shutdown_ends_what_is_at_work(self) -> None:
        made = self.manager().create_disk(ID, self.target())
        stuck = Stuck("resize")
        manager = self.manager(host=self.host(execute=stuck))
        running = self.running(lambda: manager.resize_disk(made, 8 * MIB))
        self.assertTrue(stuck.began.wait(60))
        manager.shutdown()
        with self.assertRaises(errors.CancelledError):
            running.result()

    def test_a_deadline_and_a_shutdown_end_the_wait_for_a_process_that_makes_a_disk_beside_it(self) -> None:
        manager = self.manager()
        manager.create_disk(ID, self.target("first"))
        target, beside = self.target(), self.target("beside")
        with DiskInfo(manager.config, self.host()).pinned(beside, "qcow2"):
            with self.leaves_nothing(), self.assertRaises(errors.LockTimeoutError):
                manager.create_disk(ID, target, request=ic.Request(deadline=time.time() + 0.1))
            self.points.at("lock:waiting", manager.shutdown)
            with self.leaves_nothing(), self.assertRaises(errors.CancelledError):
                manager.create_disk(ID, target)

    def test_a_deadline_ends_the_wait_for_a_process_that_pins(self) -> None:
        manager = self.manager()
        lock = str(self.instances / "locks" / layout.lock_name(pins.LOCK))
        soon = ic.Request(deadline=time.time() + 0.1)
        with (
            locks.without_waiting(lock, host=self.host()),
            self.assertNoLogs("imagecache_lib.system.locks"),  # what the end of lock_timeout is told by
            self.assertRaises(errors.LockTimeoutError),
        ):
            manager.cache_image(ID, pin_until=time.time() + 1000, request=soon)
        self.assertEqual((), manager.list_pins())

    def test_a_deadline_ends_growing_a_copy_and_nothing_is_left(self) -> None:
        image = disk_image(self.directory, "qcow2")
        source = FakeSource({ID: image}, disk_format="qcow2")
        manager = self.manager(
            source, backend="raw", force_raw_images=False, host=self.host(execute=Stuck("resize"))
        )
        manager.cache_image(ID)
        target = self.target()
        with self.leaves_nothing(), self.assertRaises(errors.LockTimeoutError):
            manager.create_disk(ID, target, size=8 * MIB, request=ic.Request(deadline=time.time() + 1))


class TestDisksThatAreCutOff(CacheCase):
    """What an interrupted copy from another host left has a name, and some of its content."""

    def test_a_disk_that_is_smaller_than_its_image_is_not_used_again(self) -> None:
        for backend in ("raw", "qcow2"):
            manager = self.manager(backend=backend)
            disk = manager.create_disk(ID, self.target(backend), backend="raw")
            for size in (1, MIB, 3 * MIB - 512):
                with self.subTest(backend, size=size):
                    os.truncate(disk.target, size)
                    with self.assertRaisesRegex(errors.BackendError, "cut off") as caught:
                        manager.create_disk(ID, disk.target, size=8 * MIB, if_exists="reuse")
                    self.assertEqual((ID, disk.target), (caught.exception.image, caught.exception.path))
                    self.assertEqual(size, os.stat(disk.target).st_size)

    def test_a_disk_as_small_as_its_image_is_used_again(self) -> None:
        self.source = FakeSource({ID: raw_image(1)[: 3 * MIB - 100]})
        manager = self.manager(backend="raw")
        disk = manager.create_disk(ID, self.target())
        os.truncate(disk.target, 3 * MIB - 100)  # as another program makes it
        self.assertEqual(
            3 * MIB, manager.create_disk(ID, disk.target, size=3 * MIB, if_exists="reuse").virtual_size
        )

    def test_a_plain_file_says_nothing_of_a_disks_size(self) -> None:
        image = disk_image(self.directory, "qcow2", options="preallocation=full")
        self.source = FakeSource({ID: image}, disk_format="qcow2")
        manager = self.manager(backend="raw")
        manager.fetch_file(ID, self.target("kernel"))
        made = self.target()
        with open(made, "wb") as file:
            file.write(raw_image(1))
        self.assertLess(3 * MIB, len(image))
        self.assertEqual(3 * MIB, manager.create_disk(ID, made, if_exists="reuse").virtual_size)

    def test_a_kernel_of_another_size_is_not_used_again(self) -> None:
        manager = self.manager()
        kernel = self.target("kernel")
        manager.fetch_file(ID, kernel)
        manager.fetch_file(ID, kernel, if_exists="reuse")
        os.truncate(kernel, MIB)
        with self.assertRaisesRegex(errors.BackendError, "cut off"):
            manager.fetch_file(ID, kernel, if_exists="reuse")

    def test_a_qcow2_that_ends_before_one_of_its_tables_is_not_used_again(self) -> None:
        image = raw_image(1, 8 * MIB)
        self.source = FakeSource({ID: image})
        manager = self.manager()
        disk = manager.create_disk(ID, self.target(), size=64 * MIB)
        # With clusters of 4 KiB an L2 table maps 2 MiB, so that tables lie in all of the file.
        made = disk_image(self.directory, "qcow2", options="cluster_size=4096", data=image)
        with open(disk.target, "rb") as file:
            overlay = file.read()
        for name, whole, sizes in (
            ("tables in the data", made, (len(made) // 2, len(made) // 3, 16384)),
            ("an empty overlay", overlay, (len(overlay) - 65536, 65536)),
        ):
            for size in sizes:
                with self.subTest(name, size=size):
                    pathlib.Path(disk.target).write_bytes(whole)
                    manager.create_disk(ID, disk.target, if_exists="reuse")
                    os.truncate(disk.target, size)
                    with self.assertRaisesRegex(errors.BackendError, "cut off") as caught:
                        manager.create_disk(ID, disk.target, size=96 * MIB, if_exists="reuse")
                    self.assertEqual(disk.target, caught.exception.path)
                    self.assertEqual(size, os.stat(disk.target).st_size)

    def test_a_qcow2_without_the_last_data_that_a_guest_wrote_is_used_again(self) -> None:
        """A crash of the host leaves that, and QEMU reads zeros there."""
        disk = self.manager().create_disk(ID, self.target())
        command = ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "write 1M 64k", disk.target]
        subprocess.run(command, check=True, capture_output=True)
        os.truncate(disk.target, os.stat(disk.target).st_size - 65536)
        self.manager().create_disk(ID, disk.target, if_exists="reuse")

    def test_a_raw_disk_with_nothing_in_it_is_not_used_again(self) -> None:
        manager = self.manager(backend="raw")
        disk = manager.create_disk(ID, self.target())
        os.truncate(disk.target, 0)
        os.truncate(disk.target, 3 * MIB)
        with self.assertRaisesRegex(errors.BackendError, "nothing in the disk"):
            manager.create_disk(ID, disk.target, size=8 * MIB, if_exists="reuse")
        with open(disk.target, "r+b") as file:
            file.write(b"by the guest")
        manager.create_disk(ID, disk.target, size=8 * MIB, if_exists="reuse")

    def test_a_disk_of_an_image_with_nothing_in_it_is_used_again(self) -> None:
        self.source = FakeSource({ID: bytes(3 * MIB)})
        manager = self.manager(backend="raw")
        disk = manager.create_disk(ID, self.target())
        manager.create_disk(ID, disk.target, if_exists="reuse")

    def test_what_the_cache_does_not_know_is_used_again(self) -> None:
        manager = self.manager(backend="raw")
        disk = manager.create_disk(ID, self.target())
        self.base().unlink()
        os.truncate(disk.target, MIB)
        self.assertEqual(MIB, manager.create_disk(ID, disk.target, if_exists="reuse").virtual_size)
