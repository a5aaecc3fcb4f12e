# SPDX-License-Identifier: Apache-2.0
"""A service that lives for simulated days: what it keeps in memory and on disk does not grow.

Guests come and go on images of the day, of which each day brings new ones; a pass looks, and bases are pinned
and cached ahead, scrubbed, and evicted by hand. Time goes by as the files' ages and the injected
clock tell it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import pathlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib import errors, model
from imagecache_lib.precache import job
from imagecache_lib.precache.database import Change, JobDatabase
from imagecache_lib.sources.interface import ImageSource
from tests.support import campaign, files

_HOUR = 3600
_DAY = 24 * _HOUR

#: For so long a guest lives at most, and a job is kept.
_LIFE = 20 * _HOUR

#: For so long what happened is kept: two of them are over within a sample.
_HISTORY = 2 * _DAY

#: SQLite's journal is written back once it has a thousand pages.
_JOURNAL = 1000 * 4200

#: So many images are new each day.
_IMAGES = 6


class Daily(ImageSource):
    """An image of any id, without keeping any."""

    def describe(self, image_id: str) -> model.Image:
        return model.Image(id=image_id, disk_format="raw", size=2**17)

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        yield iter([random.Random(image.id).randbytes(2**16), bytes(2**16)])


@dataclasses.dataclass(frozen=True)
class Kept:
    """What the service keeps, at the end of a day."""

    descriptors: int
    threads: int
    memory: int
    notes: int
    bytes_of_notes: int
    bases: int
    database: int


class Service:
    """One service, and the guests of its host."""

    def __init__(self, directory: pathlib.Path, seed: int) -> None:
        self.instances = directory / "instances"
        self.instances.mkdir()
        self._chance = random.Random(seed)
        self._ahead = 0.0
        self._guests: dict[pathlib.Path, float] = {}
        config = ic.CacheConfig(
            instances_path=str(self.instances),
            remove_unused_original_minimum_age_seconds=_DAY,
            history_age_seconds=_HISTORY,
            max_cache_size=2**21,
            num_retries=0,
        )
        host = ic.System(name="here", clock=lambda: time.time() + self._ahead)
        self.manager = ic.ImageCacheManager(config, Daily(), host=host, observers=())
        self._path = directory / "jobs.sqlite"
        self._jobs = JobDatabase(str(self._path))

    def close(self) -> None:
        self._jobs.close()

    def go_on(self, hours: int) -> None:
        """Let some hours go by, with all that happens after them."""
        self._ahead += hours * _HOUR
        now = self.manager.host.clock()
        _let_time_go_by(self.instances, hours * _HOUR)
        for directory in [each for each, end in self._guests.items() if end <= now]:
            del self._guests[directory]
            shutil.rmtree(directory)
        for _turn in range(3):
            self._spawn(now)
        image_id = self._image(now)
        with contextlib.suppress(errors.NoSpaceError):
            # Pins end by the filesystem's clock, which goes on as it does. These ended long ago.
            self.manager.cache_image(image_id, pin_until=time.time() - 2 * _HOUR)
        self.manager.pin(image_id, owner=f"job {now:.0f}")
        with contextlib.suppress(errors.BackendError):  # somebody needs it
            self.manager.evict_image(self._image(now))
        self.manager.unpin(image_id, owner=f"job {now:.0f}")
        self.manager.scrub([self._image(now)], rate=0)
        report = self.manager.verify_base_images([])
        assert not report.problems, report.problems
        self._job(image_id, now)

    def _image(self, now: float) -> str:
        return f"image-{now // _DAY:.0f}-{self._chance.randrange(_IMAGES)}"

    def _spawn(self, now: float) -> None:
        directory = self.instances / f"{self._chance.getrandbits(128):032x}"
        directory.mkdir()
        self._guests[directory] = now + self._chance.uniform(_HOUR, _LIFE)
        backend = self._chance.choice(("qcow2", "raw"))
        try:
            self.manager.create_disk(self._image(now), str(directory / "disk"), size=2**20, backend=backend)
        except errors.NoSpaceError:
            directory.rmdir()
            del self._guests[directory]

    def _job(self, image_id: str, now: float) -> None:
        made = self._jobs.add("racks", ["here"], [image_id], job.Terms(), now=now)
        assert self._jobs.take_lease(made.id, "runner", self._jobs.lease_of(made.id))
        done = job.Cell(job.Result.CACHED, "", 5, 5)
        assert not self._jobs.keep(made.id, "runner", [Change(0, 0, done)]), "nobody cancelled it"
        self._jobs.release_lease(made.id, "runner")
        self._jobs.prune(now - _LIFE)

    def kept(self) -> Kept:
        gc.collect()
        private = self.instances / "_base" / ".imagecache"
        notes = [path for path in private.rglob("*") if path.is_file()]
        memory = pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return Kept(
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=threading.active_count(),
            memory=int(memory) * os.sysconf("SC_PAGE_SIZE"),
            notes=len(notes),
            bytes_of_notes=sum(path.stat().st_size for path in notes),
            bases=len(list((self.instances / "_base").iterdir())),
            database=sum(path.stat().st_size for path in self._path.parent.glob("jobs.sqlite*")),
        )


def _let_time_go_by(tree: pathlib.Path, seconds: float) -> None:
    for parent, _directories, names in os.walk(tree):
        for name in names:
            path = os.path.join(parent, name)
            files.age(path, seconds=time.time() - os.lstat(path).st_mtime + seconds)


@pytest.mark.campaign
def test_a_service_of_many_days_keeps_no_more_than_one_of_few(
    tmp_path: pathlib.Path, record_property: Callable[[str, Any], None]
) -> None:
    days, hours = campaign.pick(sample=(8, 6), whole=(120, 1))
    service = Service(tmp_path, campaign.SEED)
    kept = []
    try:
        for _day in range(days):
            for _turn in range(24 // hours):
                service.go_on(hours)
            kept.append(service.kept())
    finally:
        service.close()
    # After three days as much is old enough to go as comes.
    early, late = kept[3 : days // 2 + 2], kept[-(days // 4) :]
    print(f"{days} days, seed {campaign.SEED}: {early[0]} after four, {late[-1]} at the end")  # noqa: T201
    record_property("days", days)
    for name in ("descriptors", "threads"):
        assert max(getattr(each, name) for each in late) <= max(getattr(each, name) for each in early), name
    assert max(each.database for each in late) < _JOURNAL + 2**20, f"the database grows: {kept}"
    for name in ("notes", "bytes_of_notes", "bases"):
        most = max(getattr(each, name) for each in early)
        assert max(getattr(each, name) for each in late) <= most * 1.5, f"{name} grows: {kept}"
    assert late[-1].memory - early[-1].memory < 8 * 2**20, f"memory grows: {kept}"
