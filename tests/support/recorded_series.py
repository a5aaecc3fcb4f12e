# SPDX-License-Identifier: Apache-2.0
"""A day of two caches, recorded as Prometheus would have scraped it: ``compute-1`` has a bad day.

Real caches with real files fetch, evict and scrub; that time passes is only said, by the timestamps and by
the files' ages. The size of the filesystem, and what guests take of it, are made up as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import random
from collections.abc import Iterator

import prometheus_client

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.observers import metrics
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource

MIB = 2**20

#: Seconds between two scrapes, and how many there are.
STEP = 300
STEPS = 288
DAY = STEP * STEPS

#: Steps between two passes: 40 minutes.
_PASS_EVERY = 8
#: What happens to the first host, as steps. Its image service is away; an image is bad; its disk changes
#: bytes; its agent hangs.
_AWAY = range(96, 132)
_BAD = 150
_ROTS = 180
_HANGS = 228

_IMAGES = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(9)]
_BAD_IMAGE = "99999999-0000-4000-8000-000000000000"


def record(home: pathlib.Path, end: float) -> str:
    """Return the series of the day that ends at ``end``, epoch seconds, as OpenMetrics text.

    :param home: an empty directory for the caches.
    """
    lines = [
        line
        for name, troubled in (("compute-1", True), ("compute-2", False))
        for line in _Host(home / name, f"{name}:9471", troubled, end - DAY).day()
    ]
    return "\n".join([*sorted(lines), "# EOF", ""])


class _Host:
    def __init__(self, home: pathlib.Path, instance: str, troubled: bool, begin: float) -> None:
        self._troubled = troubled
        self._begin = begin
        self._now = begin
        self._labels = {"instance": instance, "job": "imagecache"}
        self._instances = home / "instances"
        self._instances.mkdir(parents=True)
        self._chance = random.Random(instance)
        data = {image: self._chance.randbytes((4 + 3 * number) * MIB) for number, image in enumerate(_IMAGES)}
        self._source = FakeSource({**data, _BAD_IMAGE: b"no raw disk"})
        self._source.change_data(_BAD_IMAGE, b"not what its digest says")
        self._registry = prometheus_client.CollectorRegistry()
        observer = metrics.MetricsObserver(self._registry, clock=lambda: self._now)
        config = ic.CacheConfig(
            instances_path=str(self._instances),
            num_retries=0,
            remove_unused_original_minimum_age_seconds=4 * 3600,
        )
        self._observer = observer
        self._cache = ic.ImageCacheManager(config, self._source, backend="qcow2", observers=(observer,))
        self._disks: list[tuple[str, str]] = []

    def day(self) -> Iterator[str]:
        for step in range(STEPS):
            self._now = self._begin + (step + 1) * STEP
            self._let_time_pass()
            self._live(step)
            self._survey()
            yield from self._scraped()

    def _let_time_pass(self) -> None:
        """Make every base image older by a step."""
        base = self._instances / "_base"
        records = base / ".imagecache" / "records"
        for path in [*base.glob("[0-9a-f]*"), *records.glob("*.json")]:
            found = path.stat()
            os.utime(path, (found.st_atime - STEP, found.st_mtime - STEP))

    def _live(self, step: int) -> None:
        if self._troubled and step >= _HANGS:
            return
        # Who gets no instance asks again.
        if step % 6 == 0 or (self._troubled and step in _AWAY):
            self._spawn(step)
        if step % 16 == 10 and self._disks:
            target, _image = self._disks.pop(0)
            self._cache.remove_disk(self._cache.inspect_disk(target))
        if self._troubled and step == _ROTS:
            self._rot()
        if self._troubled and step == _BAD:
            with contextlib.suppress(errors.ImageCacheError):
                self._cache.cache_image(_BAD_IMAGE)
        if step % 72 == 40 or (self._troubled and step == _ROTS + 3):
            self._cache.scrub(rate=0)
        if step % _PASS_EVERY == 0:
            self._cache.verify_base_images([])
        if step == 60:
            self._cache.pin(_IMAGES[0], owner="operator")
            self._cache.cache_image(_IMAGES[0])

    def _spawn(self, step: int) -> None:
        image = self._chance.choice(_IMAGES[: 3 + step // 48])
        target = str(self._instances / f"instance-{step}" / "disk")
        os.mkdir(os.path.dirname(target))
        if self._troubled and step in _AWAY:
            image = _IMAGES[8]
            self._source.fail_describe(errors.SourceError("the image service does not answer"))
        try:
            self._cache.create_disk(image, target)
        except errors.ImageCacheError:
            os.rmdir(os.path.dirname(target))
        else:
            self._disks.append((target, image))

    def _rot(self) -> None:
        _target, image = self._disks[-1]
        with open(self._instances / "_base" / layout.base_name(image), "r+b") as stream:
            stream.seek(MIB)
            stream.write(b"not what was fetched")

    def _survey(self) -> None:
        seen = self._cache.survey().as_event()
        taken = sum(seen.allocated.values())
        guests = (8 + len(self._disks) * 3) * MIB
        scrubbed = None if seen.last_scrub is None else self._scrubbed_at(seen)
        size = 256 * MIB
        self._observer(
            dataclasses.replace(seen, size=size, free=max(0, size - taken - guests), last_scrub=scrubbed)
        )

    def _scrubbed_at(self, seen: events.Surveyed) -> float:
        """Return when the last scrub was, by the time that is said."""
        if seen.last_scrub != getattr(self, "_scrub_seen", None):
            self._scrub_seen, self._scrub_at = seen.last_scrub, self._now
        return self._scrub_at

    def _scraped(self) -> Iterator[str]:
        # The agent that hangs answers Prometheus still.
        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                labels = ",".join(
                    f'{key}="{value}"' for key, value in sorted({**sample.labels, **self._labels}.items())
                )
                yield f"{sample.name}{{{labels}}} {sample.value} {self._now}"
        up = ",".join(f'{key}="{value}"' for key, value in sorted(self._labels.items()))
        yield f"up{{{up}}} 1 {self._now}"
        yield f"imagecache_agent_listening{{{up}}} 1 {self._now}"
