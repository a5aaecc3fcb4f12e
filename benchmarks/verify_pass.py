# SPDX-License-Identifier: Apache-2.0
"""How long the periodic pass takes, and how much memory, by the number of instances and of base images.

Each instance directory holds an overlay and four other files, as Nova leaves them. Run it directly, for
example ``python -m benchmarks.verify_pass --instances 10000 --bases 1000``; one line of JSON comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
import uuid

import imagecache_lib as ic
from imagecache_lib.formats.qcow2 import overlay
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource

OTHERS = {
    "console.log": b"booting\n" * 100,
    "disk.config": bytes(4096),
    "libvirt.xml": b"<domain/>\n",
}


def build(root: str, instances: int, bases: int) -> list[ic.Instance]:
    """Make the directories. Every other base is used, by as many instances as there are."""
    base_path = os.path.join(root, "_base")
    os.makedirs(base_path, exist_ok=True)
    images = [f"image-{number}" for number in range(bases)]
    for image in images:
        with open(os.path.join(base_path, layout.base_name(image)), "wb") as file:
            file.write(b"x")
    reported = []
    for number in range(instances):
        name = str(uuid.UUID(int=number))
        directory = os.path.join(root, name)
        os.mkdir(directory)
        image = images[number * 2 % bases]
        disk = os.path.join(directory, "disk")
        fd = os.open(disk, os.O_WRONLY | os.O_CREAT)
        overlay.write_overlay(fd, 2**30, os.path.join(base_path, layout.base_name(image)), "raw")
        os.close(fd)
        info = json.dumps({disk: "qcow2", os.path.join(directory, "disk.config"): "raw"}).encode()
        for other, content in {**OTHERS, "disk.info": info}.items():
            with open(os.path.join(directory, other), "wb") as file:
                file.write(content)
        reported.append(ic.Instance(name, "bench", images=(image,)))
    return reported


def measure(
    instances: int, bases: int, *, rounds: int = 3, directory: str | None = None
) -> dict[str, object]:
    """Return seconds of the quickest pass, microseconds per instance, and peak memory."""
    with tempfile.TemporaryDirectory(prefix="imagecache-bench-", dir=directory) as root:
        reported = build(root, instances, bases)
        config = ic.CacheConfig(instances_path=root)
        manager = ic.ImageCacheManager(config, FakeSource({}), host=ic.System(name="bench"), observers=())
        seconds = []
        for _round in range(rounds):
            started = time.perf_counter()
            report = manager.verify_base_images(reported)
            seconds.append(time.perf_counter() - started)
            assert not report.problems and not report.evicted
        return {
            "instances": instances,
            "bases": bases,
            "seconds": round(min(seconds), 3),
            "seconds_first": round(seconds[0], 3),
            "us_per_instance": round(min(seconds) / max(1, instances) * 1e6, 1),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--bases", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory")
    options = parser.parse_args()
    found = measure(options.instances, options.bases, rounds=options.rounds, directory=options.directory)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
