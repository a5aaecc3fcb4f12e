# SPDX-License-Identifier: Apache-2.0
"""This library as a competitor: a process with one manager, asked over pipes."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks import meter, serving

if TYPE_CHECKING:
    from imagecache_lib import ImageSource

#: Modules that the extras bring to inflate faster, or at all.
INFLATERS = ("deflate", "isal", "zlib_ng", "zstandard")

#: What no spawn needs. A migration can only be imported by what runs it.
_UNIMPORTED = ("imagecache_lib.testing", "imagecache_lib.cli", "imagecache_lib.precache.migrations")

#: Trace points in the order of a cold spawn, and what has been done when the last of each is reached.
_PHASES = (
    ("transfer.open", "locks, metadata, reservation"),
    ("transfer.chunk", "transfer, with digest, inspection, decoding and writing beside it"),
    ("convert", "the rest of the spool"),
    ("stage:sync", "the rest of the digest and of the decoding"),
    ("ingest:sealed", "fsync of data and record"),
    ("publish:recorded", "publishing"),
    ("disk:made", "writing the disk"),
)


class Timeline:
    """A trace function that remembers when each point was last reached."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, point: str) -> None:
        self.last[point] = time.monotonic()

    def phases(self, began: float, ended: float) -> dict[str, float]:
        """Return the seconds that went by before each phase's end, since the end of the one before."""
        found, previous = {}, began
        for point, what in _PHASES:
            reached = self.last.get(point, 0.0)
            if reached >= previous:
                found[what] = reached - previous
                previous = reached
        found["naming the disk"] = ended - previous
        return found


class Driver:
    """One manager with an instances directory of its own, or one shared with others."""

    def __init__(self, options: argparse.Namespace) -> None:
        import imagecache_lib as ic

        self._ic = ic
        _import_everything()
        self._options = options
        self._source: ImageSource
        if options.images is None:
            self._source = ic.GlanceSource(options.glance, token=options.token)
        else:
            self._source = _web_source(options.images)
        self._new_manager()
        self._baseline = meter.peak_memory()

    def _new_manager(self) -> None:
        ic, self._timeline = self._ic, Timeline()
        config = ic.CacheConfig(
            instances_path=self._options.instances, force_raw_images=not self._options.keep_format
        )
        host = ic.System(trace=self._timeline)
        self._manager = ic.ImageCacheManager(config, self._source, self._options.backend, host=host)

    def forget(self) -> dict[str, Any]:
        """Begin with an empty directory and a new manager."""
        for name in os.listdir(self._options.instances):
            shutil.rmtree(os.path.join(self._options.instances, name))
        self._new_manager()
        return {}

    def spawn(self, image_id: str, size: int | None = None, keep: bool = True) -> dict[str, Any]:
        """Make a disk in a new instance directory."""
        directory = os.path.join(self._options.instances, str(uuid.uuid4()))
        os.makedirs(directory)
        self._timeline.last.clear()
        measured = meter.Meter()
        disk = self._manager.create_disk(image_id, os.path.join(directory, "disk"), size=size)
        answer = measured.read()
        answer["phases"] = self._timeline.phases(measured.began, answer["ended"])
        answer["peak_over_import"] = meter.peak_memory() - self._baseline
        base = os.path.join(self._options.instances, "_base", disk.base) if disk.base else disk.target
        answer["allocated"] = meter.allocated(base)
        if not keep:
            shutil.rmtree(directory)
        return answer

    def warm(self, image_id: str, count: int, size: int | None = None) -> dict[str, Any]:
        """Make many disks of an image that is in the cache; return the seconds of each."""
        answers = [self.spawn(image_id, size, keep=False) for _ in range(count)]
        return {"each": [answer["seconds"] for answer in answers], "phases": answers[-1]["phases"]}

    def swap(self, size: int) -> dict[str, Any]:
        """Make a swap disk of so many MiB."""
        return self._generate(lambda target: self._manager.create_swap(target, size_mb=size))

    def ephemeral(self, size: int) -> dict[str, Any]:
        """Make an ephemeral disk of so many GiB."""
        return self._generate(lambda target: self._manager.create_ephemeral(target, size_gb=size))

    def _generate(self, make: Callable[[str], object]) -> dict[str, Any]:
        directory = os.path.join(self._options.instances, str(uuid.uuid4()))
        os.makedirs(directory)
        measured = meter.Meter()
        make(os.path.join(directory, "disk"))
        return measured.read()

    def adopt(self, images: list[dict[str, str]]) -> dict[str, Any]:
        """Use bases that another program left, each once, with images in files that know their digests."""
        files = {}
        for image in images:
            with open(image["path"], "rb") as file:
                digest = self._ic.Digest("sha512", hashlib.file_digest(file, "sha512").hexdigest())
            files[image["id"]] = self._ic.FileImage(image["path"], "raw", digest)
        request = self._ic.Request(source=self._ic.FileSource(files))
        measured = meter.Meter()
        for image_id in files:
            with self._manager.fetch_or_reuse(image_id, request=request):
                pass
        return measured.read()

    def verify(self, image_ids: list[str], directories: list[str], fresh: bool = False) -> dict[str, Any]:
        """Run the periodic pass over instances whose directories exist; none of their bases may go.

        :param fresh: by a manager that was just made.
        """
        if fresh:
            self._new_manager()
        name = self._manager.host.name
        instances = [
            self._ic.Instance(uuid=directory, host=name, images=(image_id,))
            for image_id, directory in zip(image_ids, directories, strict=True)
        ]
        bases = os.path.join(self._options.instances, "_base")
        before = set(os.listdir(bases)) | {".imagecache"}
        measured = meter.Meter()
        self._manager.verify_base_images(instances)
        answer = measured.read()
        if set(os.listdir(bases)) != before:
            raise AssertionError("a base that is in use is gone")
        return answer

    def maps(self, clusters: int, threads: int) -> dict[str, Any]:
        """Feed the tables of an image with so many allocated clusters of 64 KiB, and none of its data yet."""
        from benchmarks import maps

        measured = meter.Meter()
        maps.feed(clusters, self._options.instances, threads=threads)
        return {**measured.read(), "peak_over_import": meter.peak_memory() - self._baseline}


def _web_source(path: str) -> ImageSource:
    """Return the source that a JSON file describes: URL, format and SHA-512 by id."""
    import imagecache_lib as ic

    with open(path) as file:
        return ic.HttpSource(
            {
                image_id: ic.HttpImage(each["url"], each["disk_format"], ic.Digest("sha512", each["sha512"]))
                for image_id, each in json.load(file).items()
            }
        )


def _import_everything() -> None:
    """Load every module, so that what is loaded when used is not counted as work."""
    import imagecache_lib

    for module in pkgutil.walk_packages(imagecache_lib.__path__, "imagecache_lib."):
        if not module.name.startswith(_UNIMPORTED):
            with contextlib.suppress(ImportError):  # of an optional part
                importlib.import_module(module.name)
    for name in ("oslo_concurrency.processutils", *INFLATERS):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--instances", required=True)
    parser.add_argument("--glance")
    parser.add_argument("--token")
    parser.add_argument("--images", help="JSON file of images on a web server, instead of Glance")
    parser.add_argument("--backend", default="qcow2")
    parser.add_argument("--keep-format", action="store_true", help="store qcow2 images as they are")
    parser.add_argument("--without-extras", action="store_true")
    options = parser.parse_args()
    if options.without_extras:
        # As if they were not installed.
        sys.modules.update(dict.fromkeys(INFLATERS))  # type: ignore[arg-type]
    driver = Driver(options)
    serving.serve(
        {
            "ready": dict,
            "forget": driver.forget,
            "spawn": driver.spawn,
            "warm": driver.warm,
            "swap": driver.swap,
            "ephemeral": driver.ephemeral,
            "adopt": driver.adopt,
            "verify": driver.verify,
            "maps": driver.maps,
        }
    )


if __name__ == "__main__":
    main()
