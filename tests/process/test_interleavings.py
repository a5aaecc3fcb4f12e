# SPDX-License-Identifier: Apache-2.0
"""Every interleaving of publish, spawn and evict at their trace points, with locks and with none.

Each actor runs in a thread of its own, which stops at each trace point until the scheduler lets it go on, so
that one schedule is one sequence of decisions, and can be repeated. The walk is depth first: all schedules of
two actors, and for more of them all that take the processor away from an actor that could go on at most so
many times. The source sends other bytes each time it is asked and has no digest: what one disk was made from
can be told from what another was made from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib import errors, model
from imagecache_lib.backends.interface import PendingDisk
from imagecache_lib.backends.qcow2 import Qcow2Backend
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.store import layout
from tests.support import campaign
from tests.support.cache_case import ID

NAME = layout.base_name(ID)
SIZE = 4096

#: Between the others nothing happens that another actor could see.
POINTS = frozenset(
    {
        "begin",
        "lease:shared",
        "lease:exclusive",
        "ingest:sealed",
        "publish:link",
        "publish:linked",
        "disk:begin",
        "disk:made",
        "disk:confirmed",
        "disk:placed",
        "references:known",
        "references:unfinished",
        "verify:read",
        "evict:announced",
        "evict:rename",
        "evict:renamed",
        "evict:read",
        "evict:unlink",
    }
)


class CountingSource(ImageSource):
    """An image whose bytes say which download they came with."""

    def __init__(self) -> None:
        self._count = 0

    def describe(self, image_id: str) -> model.Image:
        return model.Image(id=image_id, disk_format="raw", size=SIZE)

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        self._count += 1
        yield iter([b"%08d" % self._count * (SIZE // 8)])


class NotingBackend(Qcow2Backend):
    """Notes what each disk was made from."""

    def __init__(self, config: ic.CacheConfig, host: ic.System) -> None:
        super().__init__(config, host)
        self.made: dict[str, bytes] = {}

    @contextlib.contextmanager
    def prepare(self, base: model.BaseImage, target: str, size: int | None) -> Iterator[PendingDisk]:
        assert base.fd is not None
        self.made[target] = os.pread(base.fd, SIZE, 0)
        self._host.trace("disk:begin")  # type: ignore[arg-type]  # a point of this test alone
        with super().prepare(base, target, size) as pending:
            yield pending


class Actor:
    """One thread of a schedule: it runs from a trace point to the next when it is told to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.host = ic.System(
            name="one", trace=self._stop, sleep=lambda _seconds: self._stop("", waiting=True)
        )
        self.stopped = threading.Semaphore(0)
        self._go_on = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self.done = True
        self.waits = False
        self.error: BaseException | None = None

    def start(self, function: Callable[[], object]) -> None:
        self.done = self.waits = False
        self.error = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()
        self.stopped.acquire()

    def step(self) -> None:
        self._go_on.release()
        assert self.stopped.acquire(timeout=60), f"{self.name} hangs"

    def _run(self, function: Callable[[], object]) -> None:
        try:
            self._stop("begin")
            function()
        except BaseException as error:
            self.error = error
        self.done = True
        self.stopped.release()

    def _stop(self, point: str, *, waiting: bool = False) -> None:
        if threading.current_thread() is not self._thread:
            return  # the test's own thread uses the manager too
        if point not in POINTS and not waiting:
            return
        self.waits = waiting
        self.stopped.release()
        self._go_on.acquire()


@dataclasses.dataclass
class Choice:
    """A decision of a schedule: who went on, and who else could have."""

    taken: int
    others: list[int]


class World:
    """A cache, and the actors that race in it."""

    def __init__(self, directory: pathlib.Path, names: list[str], *, locking: bool) -> None:
        self.instances = directory
        self.actors = [Actor(name) for name in names]
        config = ic.CacheConfig(instances_path=str(directory), remove_unused_original_minimum_age_seconds=0)
        source = CountingSource()
        self.managers = []
        for actor in self.actors:
            actor.host = dataclasses.replace(actor.host, locking=locking)
            backend = NotingBackend(config, actor.host)
            self.managers.append(ic.ImageCacheManager(config, source, backend, host=actor.host, observers=()))
        for manager in self.managers:
            manager.verify_base_images([])
        self.schedules = 0

    def walk(self, *, cached: bool, preemptions: int | None, most: int) -> None:
        """Walk all schedules, and check the cache after each."""
        pending: list[list[int]] = [[]]
        while pending:
            prefix = pending.pop()
            self._prepare(cached=cached)
            choices = self._run(prefix, preemptions)
            self._check([choice.taken for choice in choices])
            self.schedules += 1
            assert self.schedules <= most, "more schedules than this test is meant to take"
            for position in range(len(prefix), len(choices)):
                taken = [choice.taken for choice in choices[:position]]
                pending.extend([*taken, other] for other in choices[position].others)

    def _prepare(self, *, cached: bool) -> None:
        for actor in self.actors:
            directory = self.instances / actor.name
            directory.mkdir(exist_ok=True)
            for entry in directory.iterdir():
                entry.unlink()
        if cached:
            self.managers[0].cache_image(ID)
        elif (self.instances / "_base" / NAME).exists():
            self.managers[0].evict_image(ID)

    def _functions(self) -> Iterator[Callable[[], object]]:
        for actor, manager in zip(self.actors, self.managers, strict=True):
            kind = actor.name.partition("-")[0]
            target = str(self.instances / actor.name / "disk")
            if kind == "spawn":
                yield functools.partial(manager.create_disk, ID, target)
            elif kind == "cache":
                yield functools.partial(manager.cache_image, ID)
            else:
                yield functools.partial(manager.verify_base_images, [])

    def _run(self, prefix: list[int], preemptions: int | None) -> list[Choice]:
        for actor, function in zip(self.actors, self._functions(), strict=True):
            actor.start(function)
        choices: list[Choice] = []
        current: int | None = None
        spent = 0
        idle: set[int] = set()  # those who waited in vain since somebody else last got on
        while not all(actor.done for actor in self.actors):
            able = [i for i, actor in enumerate(self.actors) if not actor.done and i not in idle]
            if not able:
                # All wait for each other: real time must pass, for the patience of those who wait.
                idle.clear()
                continue
            goes_on = current in able
            if len(choices) < len(prefix):
                taken, others = prefix[len(choices)], []
            else:
                taken = current if goes_on and current is not None else able[0]
                free = preemptions is None or not goes_on or spent < preemptions
                others = [i for i in able if i != taken] if free else []
            choices.append(Choice(taken, others))
            if goes_on and taken != current:
                spent += 1
            actor = self.actors[taken]
            actor.step()
            if actor.waits and not actor.done:
                idle.add(taken)
            else:
                idle.clear()
            current = taken
        return choices

    def _check(self, schedule: list[int]) -> None:
        told = " ".join(self.actors[each].name for each in schedule)
        for actor, manager in zip(self.actors, self.managers, strict=True):
            if actor.error is not None and not isinstance(actor.error, errors.ImageCacheError):
                raise AssertionError(f"{actor.name} failed in: {told}") from actor.error
            assert actor.error is None, f"{actor.name}: {actor.error} in: {told}"
            disk = self.instances / actor.name / "disk"
            entries = sorted(entry.name for entry in disk.parent.iterdir())
            if not actor.name.startswith("spawn"):
                assert entries == [], told
                continue
            assert entries == ["disk", "disk.info"], told
            base = self.instances / "_base" / NAME
            assert base.exists(), f"the base of {disk} is gone after: {told}"
            assert base.read_bytes() == manager.backend.made[str(disk)], f"{disk} changed in: {told}"  # type: ignore[attr-defined]
        private = self.instances / "_base" / ".imagecache"
        assert list((private / "stage").iterdir()) == [], told
        assert list((private / "trash").iterdir()) == [], told


@pytest.fixture
def directory() -> Iterator[pathlib.Path]:
    # In memory, where a sync takes no time: it is the order that is tested.
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="imagecache-", dir=where) as path:
        yield pathlib.Path(path)


# A campaign walks all schedules of two actors without locks too, and two preemptions of the others: 126,000.
THREE = campaign.pick(sample=3, whole=None)
ONE = campaign.pick(sample=1, whole=2)


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("names", "cached", "locking", "preemptions"),
    [
        (["spawn-1", "evict"], True, True, None),
        (["spawn-1", "evict"], False, True, None),
        (["spawn-1", "cache"], False, True, None),
        (["spawn-1", "evict"], True, False, THREE),
        (["spawn-1", "evict"], False, False, THREE),
        (["spawn-1", "cache"], False, False, THREE),
        (["spawn-1", "spawn-2", "evict"], True, True, ONE),
        (["spawn-1", "spawn-2", "evict"], True, False, ONE),
        (["spawn-1", "cache", "evict"], False, True, ONE),
        (["spawn-1", "cache", "evict"], False, False, 2),
        (["spawn-1", "spawn-2", "evict", "cache"], False, True, campaign.pick(sample=0, whole=2)),
        (["spawn-1", "spawn-2", "evict", "cache"], False, False, ONE),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_no_schedule_loses_or_changes_a_base_in_use(
    directory: pathlib.Path,
    names: list[str],
    cached: bool,
    locking: bool,
    preemptions: int | None,
    record_property: Callable[[str, Any], None],
) -> None:
    world = World(directory, names, locking=locking)
    world.walk(cached=cached, preemptions=preemptions, most=500_000)
    record_property("schedules", world.schedules)
