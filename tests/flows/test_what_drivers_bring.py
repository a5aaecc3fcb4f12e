# SPDX-License-Identifier: Apache-2.0
"""What a driver brings along: a semaphore, what grows filesystems, its own right to an image, its end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors, model
from imagecache_lib.backends.raw import RawBackend
from imagecache_lib.sources.interface import NotPermitted
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, MIB, OTHER_ID, CacheCase, raw_image


class SlowSource(FakeSource):
    """Gives one byte, and then waits until it is told to go on."""

    def __init__(self, images: dict[str, bytes]) -> None:
        super().__init__(images)
        self.data = images
        self.begun, self.go_on = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        def chunks() -> Iterator[bytes]:
            data = self.data[image.id]
            self.begun.set()
            yield data[:1]
            while not self.go_on.wait(0.05):
                yield b"\0"
            yield data[1:]

        yield chunks()


class TestSemaphore(CacheCase):
    def test_one_limit_holds_for_the_driver_and_all_backends(self) -> None:
        limit = threading.BoundedSemaphore(1)
        config = ic.CacheConfig(instances_path=str(self.instances))
        manager = ic.ImageCacheManager(config, self.source, host=self.host(), disk_ops=limit)
        limit.acquire()
        done: list[model.Disk] = []
        threads = [
            threading.Thread(
                target=lambda backend=backend, image_id=image_id: done.append(
                    manager.create_disk(image_id, self.target(backend), backend=backend)
                )
            )
            for backend, image_id in (("qcow2", ID), ("raw", OTHER_ID))
        ]
        for thread in threads:
            thread.start()
            thread.join(0.5)
        self.assertEqual(([], 0), (done, self.source.opens))
        limit.release()
        for thread in threads:
            thread.join()
        self.assertEqual(2, len(done))
        self.assertTrue(limit.acquire(blocking=False))


class TestShutdown(CacheCase):
    def test_what_is_in_flight_ends_and_leaves_nothing(self) -> None:
        source = SlowSource({ID: raw_image(1)})
        self.addCleanup(source.go_on.set)
        manager = self.manager(source)
        caught: list[Exception] = []

        def spawn() -> None:
            try:
                manager.create_disk(ID, self.target())
            except errors.ImageCacheError as error:
                caught.append(error)

        thread = threading.Thread(target=spawn)
        thread.start()
        self.assertTrue(source.begun.wait(30))
        manager.shutdown()
        thread.join(30)
        self.assertIsInstance(caught[0], errors.CancelledError)
        self.assertEqual([], os.listdir(self.instances / "_base/.imagecache/stage"))
        with self.assertRaises(errors.CancelledError):
            manager.create_swap(self.target("swap"), size_mb=8)


def grow(path: str) -> None:
    if subprocess.run(["e2label", path], check=False, capture_output=True).returncode == 0:
        subprocess.run(["e2fsck", "-fp", path], check=False, capture_output=True)
        subprocess.run(["resize2fs", path], check=True, capture_output=True)


def blocks_of(path: str) -> int:
    out = subprocess.run(["dumpe2fs", "-h", path], check=True, capture_output=True, text=True).stdout
    return int(next(line.split()[-1] for line in out.splitlines() if line.startswith("Block count")))


class TestFilesystems(CacheCase):
    def filesystem(self) -> bytes:
        path = self.directory / "ext4"
        with open(path, "wb") as file:
            file.truncate(16 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-b", "4096", path], check=True)
        return path.read_bytes()

    def test_a_filesystem_without_partitions_grows_with_its_raw_disk(self) -> None:
        manager = self.manager(FakeSource({ID: self.filesystem()}), disable_deep_image_inspection=True)
        backend = RawBackend(manager.config, manager.host, grow_filesystem=grow)
        disk = manager.create_disk(ID, self.target(), size=32 * MIB, backend=backend)
        self.assertEqual(32 * MIB // 4096, blocks_of(disk.target))
        manager.resize_disk(disk, 64 * MIB, backend=backend)
        self.assertEqual(64 * MIB // 4096, blocks_of(disk.target))

    def test_a_filesystem_that_cannot_grow_leaves_no_disk(self) -> None:
        def fail(path: str) -> None:
            raise RuntimeError("no such program")

        manager = self.manager()
        backend = RawBackend(manager.config, manager.host, grow_filesystem=fail)
        with self.assertRaises(errors.BackendError) as caught:
            manager.create_disk(ID, self.target(), size=32 * MIB, backend=backend)
        self.assertIn("no such program", str(caught.exception))
        self.assertFalse(os.path.lexists(self.target()))


class Asked(FakeSource):
    """Counts who asks, and answers as it is told."""

    def __init__(self, images: dict[str, bytes], error: Exception | None = None) -> None:
        super().__init__(images)
        self.error, self.asked, self.hangs = error, 0, threading.Event()
        self.hangs.set()

    def describe(self, image_id: str) -> ic.Image:
        self.asked += 1
        self.hangs.wait()
        if self.error is not None:
            raise self.error
        return super().describe(image_id)


class TestRightToAHit(CacheCase):
    def hit(self, source: Any, **options: Any) -> model.Disk:
        self.manager().cache_image(ID)
        manager = self.manager(**options)
        return manager.create_disk(ID, self.target(), request=ic.Request(source=source))

    def test_nobody_is_asked_unless_it_is_configured(self) -> None:
        source = Asked({ID: raw_image(1)})
        self.hit(source)
        self.assertEqual(0, source.asked)

    def test_the_requests_own_source_is_asked_once(self) -> None:
        source = Asked({ID: raw_image(1)})
        self.hit(source, authorize_hits="closed")
        self.assertEqual(1, source.asked)

    def test_who_may_not_have_it_does_not_get_it(self) -> None:
        for error in (NotPermitted("not yours"), errors.ImageNotFound("there is none")):
            for mode in ("open", "closed"):
                with self.assertRaises(errors.ImageNotFound):
                    self.hit(Asked({}, error), authorize_hits=mode)
                self.assertFalse(os.path.lexists(self.target()))

    def test_who_may_not_have_it_does_not_get_what_another_caller_has_fetched_meanwhile(self) -> None:
        class Late(Asked):
            def describe(self, image_id: str) -> ic.Image:
                fetch(image_id)
                return super().describe(image_id)

        fetch = self.manager().cache_image
        for mode in ("open", "closed"):
            manager = self.manager(authorize_hits=mode)
            with self.assertRaises(errors.ImageNotFound):
                manager.create_disk(
                    ID, self.target(), request=ic.Request(source=Late({}, NotPermitted("not yours")))
                )
            self.assertFalse(os.path.lexists(self.target()))
            manager.evict_image(ID)

    def test_a_source_that_fails_is_taken_as_configured(self) -> None:
        down = Asked({}, errors.SourceError("down"))
        with self.assertRaises(errors.SourceError):
            self.hit(down, authorize_hits="closed")
        self.assertIsNotNone(self.hit(down, authorize_hits="open").base)

    def test_a_source_that_hangs_costs_a_bounded_time(self) -> None:
        source = Asked({ID: raw_image(1)})
        source.hangs.clear()
        self.addCleanup(source.hangs.set)
        with self.assertRaises(errors.SourceError) as caught:
            self.hit(source, authorize_hits="closed", authorize_timeout=0.2)
        self.assertIn("authorize_timeout", str(caught.exception))

    def test_a_disk_that_exists_keeps_its_base_without_asking(self) -> None:
        manager = self.manager(authorize_hits="closed")
        disk = manager.create_disk(ID, self.target())
        denied = ic.Request(source=Asked({}, NotPermitted("not yours")))
        self.assertIsNotNone(manager.ensure_backing(disk.target, image_id=ID, request=denied))

    def test_another_answer_is_refused_as_configuration(self) -> None:
        with self.assertRaises(errors.ConfigError):
            self.manager(authorize_hits="perhaps")
