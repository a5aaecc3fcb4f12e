# SPDX-License-Identifier: Apache-2.0
"""A cache in a directory of its own, for tests of the whole spawn flow with real files."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import random
import subprocess
import tempfile
import threading
import unittest
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.store import layout
from imagecache_lib.system.host import System
from imagecache_lib.testing.sources import FakeSource

ID = "11111111-aaaa-4bbb-8ccc-0123456789ab"
OTHER_ID = "22222222-aaaa-4bbb-8ccc-0123456789ab"
MIB = 2**20


@functools.lru_cache(maxsize=8)
def raw_image(seed: int = 1, size: int = 3 * MIB) -> bytes:
    """Return a raw disk: data at both ends, zeros between them."""
    noise = random.Random(seed).randbytes(size // 4)
    return noise + bytes(size - 2 * len(noise)) + noise


def disk_image(
    directory: pathlib.Path, format: str, *, options: str = "", data: bytes | None = None
) -> bytes:
    """Return a disk image of a format, made by qemu-img from raw data."""
    raw, made = directory / "source.raw", directory / f"source.{format}"
    raw.write_bytes(data if data is not None else raw_image())
    more = ["-o", options] if options else []
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, *more, raw, made], check=True)
    found = made.read_bytes()
    raw.unlink()
    made.unlink()
    return found


def content_of(path: str, format: str) -> bytes:
    """Return what a guest sees on a disk, backing chain included, read by qemu-img."""
    with tempfile.TemporaryDirectory() as directory:
        flat = pathlib.Path(directory) / "flat"
        subprocess.run(["qemu-img", "convert", "-f", format, "-O", "raw", path, flat], check=True)
        return flat.read_bytes()


class Stop:
    """A place where execution waits until the test lets it go on."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._go_on = threading.Event()

    def __call__(self) -> None:
        self._reached.set()
        if not self._go_on.wait(60):
            raise AssertionError("nobody let it go on")

    def wait(self) -> None:
        """Wait until execution is there."""
        if not self._reached.wait(60):
            raise AssertionError("it never got there")

    def go_on(self) -> None:
        self._go_on.set()


class Points:
    """A :attr:`System.trace` that calls something when a point is reached, once each."""

    def __init__(self) -> None:
        self._actions: dict[str, list[Callable[[], object]]] = {}
        self.seen: list[str] = []

    def __call__(self, point: str) -> None:
        self.seen.append(point)
        waiting = self._actions.get(point)
        if waiting:
            waiting.pop(0)()

    def at(self, point: str, action: Callable[[], object]) -> None:
        """Call ``action`` the next time that the point is reached; a second one the time after that."""
        self._actions.setdefault(point, []).append(action)

    def stop_at(self, point: str) -> Stop:
        stop = Stop()
        self.at(point, stop)
        return stop


class CacheCase(unittest.TestCase):
    """Gives each test an instances directory, and managers for it."""

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory(prefix="imagecache-")
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.instances = self.directory / "instances"
        self.instances.mkdir()
        self.points = Points()
        self.events: list[events.Event] = []
        self.source = FakeSource({ID: raw_image(1), OTHER_ID: raw_image(2)})

    def host(self, **options: Any) -> System:
        # Retries come at once: the waits between them are tested elsewhere.
        return System(**{"name": "here", "trace": self.points, **options})

    def manager(
        self,
        source: ImageSource | None = None,
        *,
        backend: str = "qcow2",
        host: System | None = None,
        **options: Any,
    ) -> ic.ImageCacheManager:
        config = ic.CacheConfig(
            **{"instances_path": str(self.instances), "num_retries": 0, "lock_timeout": 30.0, **options}
        )
        return ic.ImageCacheManager(
            config,
            source or self.source,
            backend=backend,
            host=host or self.host(),
            observers=(self.events.append,),
        )

    def target(self, name: str = "disk", instance: str = "instance-1") -> str:
        """Return a path for a disk in an instance directory."""
        (self.instances / instance).mkdir(exist_ok=True)
        return str(self.instances / instance / name)

    def base(self, image_id: str = ID) -> pathlib.Path:
        return self.instances / "_base" / layout.base_name(image_id)

    def record(self, image_id: str = ID) -> pathlib.Path:
        return self.instances / "_base" / ".imagecache" / "records" / f"{layout.base_name(image_id)}.json"

    def tree(self) -> Mapping[str, tuple[int, int, int]]:
        """Return inode, mode and length of everything but lock files, which stay for ever."""
        found = {}
        for parent, directories, names in os.walk(self.instances):
            if os.path.basename(parent) == "locks":
                continue
            for name in (*directories, *names):
                path = os.path.join(parent, name)
                status = os.lstat(path)
                length = 0 if name in directories else status.st_size
                found[os.path.relpath(path, self.instances)] = (status.st_ino, status.st_mode, length)
        return found

    def in_flight(self) -> list[str]:
        return sorted(os.listdir(self.instances / "_base" / ".imagecache" / "stage"))

    def happened(self, kind: type[events.Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def spawn(self, manager: ic.ImageCacheManager, image_id: str = ID, **options: Any) -> bytes:
        """Make a disk, return its content as a guest sees it, and remove it."""
        target = self.target(instance=f"instance-{random.getrandbits(32)}")
        disk = manager.create_disk(image_id, target, **options)
        content = content_of(disk.target, disk.format)
        manager.remove_disk(disk)
        os.rmdir(os.path.dirname(target))
        return content

    @contextlib.contextmanager
    def leaves_nothing(self) -> Iterator[None]:
        """Check that the body adds, changes and removes no file."""
        before = self.tree()
        yield
        self.assertEqual(before, self.tree())

    def running(self, function: Callable[[], object]) -> Running:
        running = Running(function)
        self.addCleanup(running.thread.join, 60)
        return running


class Running:
    """A call in a thread of its own."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._result: object = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        """Return what the call returned, or raise what it raised."""
        self.thread.join(60)
        if self.thread.is_alive():
            raise AssertionError("it does not end")
        if self._error is not None:
            raise self._error
        return self._result
