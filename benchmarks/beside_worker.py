# SPDX-License-Identifier: Apache-2.0
"""What :mod:`benchmarks.beside` has a revision do, in a process whose import path begins with that revision.

It uses nothing but what every revision has. A line of JSON comes in for each piece of work, and one goes out.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import imagecache_lib as ic
from imagecache_lib.testing.sources import FakeSource

_MIB = 2**20

#: The image that is cold each time: data that no filesystem shares.
_COLD = "cold"


class Worker:
    """A cache, and work on it."""

    def __init__(self, instances: str, images: int, cold_mib: int) -> None:
        self._instances = instances
        self._images = [f"image-{number}" for number in range(images)]
        content = {image_id: image_id.encode() * 4096 for image_id in self._images}
        content[_COLD] = os.urandom(cold_mib * _MIB)
        config = ic.CacheConfig(instances_path=instances)
        self._source = FakeSource(content)
        host = ic.Host(name="bench")
        self._managers = {
            backend: ic.ImageCacheManager(config, self._source, backend=backend, host=host, observers=())
            for backend in ("qcow2", "raw")
        }
        self._made = 0

    def prepare(self) -> None:
        for image_id in (*self._images, _COLD):
            self._managers["qcow2"].cache_image(image_id)

    def _directory(self) -> str:
        self._made += 1
        path = os.path.join(self._instances, f"spawn-{os.getpid()}-{self._made}")
        os.mkdir(path)
        return path

    def spawn(self, *, count: int, backend: str = "qcow2", image_id: str = "image-0") -> dict[str, Any]:
        """Make disks, and tell how long each took, and how long to sync it at once."""
        each, sync = [], []
        cpu = sync_cpu = 0.0
        for _number in range(count):
            directory = self._directory()
            target = os.path.join(directory, "disk")
            began, started = time.process_time(), time.perf_counter()
            self._managers[backend].create_disk(image_id, target)
            each.append(time.perf_counter() - started)
            cpu += time.process_time() - began
            # At once: a sync of another disk in between would have written this one's names as well.
            fd = os.open(target, os.O_RDWR)
            began, started = time.process_time(), time.perf_counter()
            os.fdatasync(fd)
            sync.append(time.perf_counter() - started)
            sync_cpu += time.process_time() - began
            os.close(fd)
            shutil.rmtree(directory)
        return {"each": each, "sync": sync, "cpu": cpu / count, "sync_cpu": sync_cpu / count}

    def cold(self, *, count: int) -> dict[str, Any]:
        """Make disks of an image that is evicted before each."""
        each, cpu = [], 0.0
        for _number in range(count):
            self._managers["qcow2"].evict_image(_COLD)
            directory = self._directory()
            began, started = time.process_time(), time.perf_counter()
            self._managers["qcow2"].create_disk(_COLD, os.path.join(directory, "disk"))
            each.append(time.perf_counter() - started)
            cpu += time.process_time() - began
            shutil.rmtree(directory)
        return {"each": each, "cpu": cpu / count}

    def verify(self, *, count: int) -> dict[str, Any]:
        """Run passes, with all instances reported."""
        names = [name for name in os.listdir(self._instances) if name not in ("_base", "locks")]
        reported = [ic.Instance(name, "bench") for name in sorted(names)]
        each = []
        cpu = time.process_time()
        for _number in range(count):
            started = time.perf_counter()
            report = self._managers["qcow2"].verify_base_images(reported)
            each.append(time.perf_counter() - started)
            assert not report.problems, report.problems
        return {"each": each, "cpu": (time.process_time() - cpu) / count}


def main() -> None:
    instances, images, cold_mib = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    worker = Worker(instances, images, cold_mib)
    for line in sys.stdin:
        asked = json.loads(line)
        work: Callable[..., Any] = getattr(worker, asked.pop("do"))
        print(json.dumps(work(**asked)), flush=True)


if __name__ == "__main__":
    main()
