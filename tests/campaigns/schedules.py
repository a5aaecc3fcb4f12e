# SPDX-License-Identifier: Apache-2.0
"""Schedules of actors that share one cache: who goes on at which trace point.

Each actor runs in a thread of its own, which stops at each trace point until the scheduler lets it go on, so
that one schedule is one sequence of decisions, and can be repeated. The walk is depth first. The source sends
other bytes each time it is asked and has no digest: what one disk was made from can be told from what another
was made from.

Without a bound on preemptions, schedules are left out that differ from one that was walked only in the order
of neighbouring steps of two actors that changed nothing, neither a file nor a lock (sleep sets, as Godefroid
has them).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import imagecache_lib as ic
from imagecache_lib import errors, model
from imagecache_lib.backends.interface import PendingDisk
from imagecache_lib.backends.qcow2 import Qcow2Backend
from imagecache_lib.formats.qcow2 import header
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.store import layout
from tests.support.cache_case import ID, OTHER_ID

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
        "restore:linked",
        "rename:done",
    }
)

#: How long an actor may take for one step, in seconds of this process's own time, and by the clock.
_LONGEST_STEP = 60.0
_LONGEST_WAIT = 900.0

#: Where a reading goes on with another directory: what a rename can slip through.
READING = "references:directory"


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

    def __init__(self, name: str, points: frozenset[str]) -> None:
        self.name = name
        self.kind = name.partition("-")[0]
        self._points = points
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
        """Let it run to where it stops next.

        :raises AssertionError: a minute of this process's own time is spent, or a quarter of an hour goes by.
            A machine may be so busy that a step of milliseconds takes minutes.
        """
        until, spent = time.monotonic() + _LONGEST_WAIT, time.process_time() + _LONGEST_STEP
        self._go_on.release()
        while not self.stopped.acquire(timeout=1):
            where = self._where()
            assert time.process_time() < spent, f"{self.name} goes on and on:\n{where}"
            assert time.monotonic() < until, f"{self.name} hangs:\n{where}"

    def _where(self) -> str:
        """Return the stack of its thread, for people."""
        frame = sys._current_frames().get(self._thread.ident or 0) if self._thread is not None else None
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def _run(self, function: Callable[[], object]) -> None:
        try:
            self._stop("begin")
            function()
        except BaseException as error:
            self.error = error
        self.done = True
        self.stopped.release()

    def reach(self, point: str) -> None:
        """Stop at a point of this test's own."""
        self._stop(point)

    def _stop(self, point: str, *, waiting: bool = False) -> None:
        if threading.current_thread() is not self._thread:
            return  # the test's own thread uses the manager too
        if point not in self._points and not waiting:
            return
        self.waits = waiting
        self.stopped.release()
        self._go_on.acquire()


@dataclasses.dataclass
class Choice:
    """A decision of a schedule.

    :param taken: who went on.
    :param others: who else could have.
    :param asleep: of those who could not, whose step would be as good as one in a schedule that was walked.
    :param changed: whether the step changed a file or a lock.
    """

    taken: int
    others: list[int]
    asleep: frozenset[int]
    changed: bool = True


class World:
    """A cache, and the actors that race in it.

    :param names: of the actors: the kind, and for the second of a kind a dash and a number.
    :ivar schedules: how many were walked.
    :ivar diverged: how many of these could not be walked as they were meant: an actor had other steps on
        a machine that was slower or faster than when they were found.
    """

    def __init__(self, directory: pathlib.Path, names: list[str], *, locking: bool) -> None:
        self.instances = directory
        points = POINTS | {READING} if "rename" in names else POINTS
        self.actors = [Actor(name, points) for name in names]
        self._config = ic.CacheConfig(
            instances_path=str(directory),
            remove_unused_original_minimum_age_seconds=0,
            space_minimum_age_seconds=0,
        )
        self._source = CountingSource()
        for actor in self.actors:
            actor.host = dataclasses.replace(actor.host, locking=locking)
        self.managers = [self._manager(actor) for actor in self.actors]
        for manager in self.managers:
            manager.verify_base_images([])
        self.schedules = 0
        self.diverged = 0

    def _manager(self, actor: Actor) -> ic.ImageCacheManager:
        config = self._config
        if actor.kind == "room":
            config = dataclasses.replace(config, max_cache_size=SIZE * 3 // 2)
        backend = NotingBackend(config, actor.host)
        return ic.ImageCacheManager(config, self._source, backend, host=actor.host, observers=())

    def walk(self, *, cached: bool, preemptions: int | None, most: int) -> None:
        """Walk all schedules, and check the cache after each."""
        pending: list[tuple[list[int], frozenset[int]]] = [([], frozenset())]
        while pending:
            prefix, asleep = pending.pop()
            self._prepare(cached=cached)
            choices = self._run(prefix, asleep, preemptions)
            self._check([choice.taken for choice in choices])
            self.schedules += 1
            assert self.schedules <= most, "more schedules than this test is meant to take"
            for position in range(len(prefix), len(choices)):
                choice = choices[position]
                taken = [each.taken for each in choices[:position]]
                sleeping = choice.asleep
                if preemptions is None and not choice.changed:
                    sleeping |= {choice.taken}
                pending.extend(([*taken, other], sleeping) for other in choice.others)

    # -- what there is before ------------------------------------------------------------------------

    def _prepare(self, *, cached: bool) -> None:
        for directory in self._directories():
            directory.mkdir(parents=True, exist_ok=True)
            for entry in directory.iterdir():
                entry.unlink()
        for image_id in (ID, OTHER_ID):
            if (self.instances / "_base" / layout.base_name(image_id)).exists():
                if image_id == ID and cached and not self._kinds("rename", "scrub"):
                    continue
                self.managers[0].evict_image(image_id)
        if cached or self._kinds("rename"):
            self.managers[0].cache_image(ID)
        if self._kinds("rename"):
            self.managers[0].create_disk(ID, str(self.instances / "pool" / "moved" / "disk"))
        if self._kinds("scrub") and cached:
            with (self.instances / "_base" / NAME).open("r+b") as base:
                base.write(b"damaged!")
                base.seek(0)
                # A disk that is there already is on this, and has to stay there.
                made = self.managers[0].backend.made  # type: ignore[attr-defined]
                made.update(dict.fromkeys(filter(os.path.exists, made), base.read()))

    def _kinds(self, *kinds: str) -> bool:
        return any(actor.kind in kinds for actor in self.actors)

    def _directories(self) -> Iterator[pathlib.Path]:
        for actor in self.actors:
            yield self.instances / actor.name
        if self._kinds("rename"):
            yield self.instances / "pool" / "moved"
            yield self.instances / "pool" / "other"

    # -- what they do --------------------------------------------------------------------------------

    def _functions(self) -> Iterator[Callable[[], object]]:
        for actor, manager in zip(self.actors, self.managers, strict=True):
            target = str(self.instances / actor.name / "disk")
            functions: dict[str, Callable[[], object]] = {
                "spawn": functools.partial(manager.create_disk, ID, target),
                "cache": functools.partial(manager.cache_image, ID),
                "evict": functools.partial(manager.verify_base_images, []),
                "room": functools.partial(self._make_room, manager),
                "scrub": functools.partial(manager.scrub, rate=0),
                "start": functools.partial(self._start, actor),
                "rename": functools.partial(self._rename, actor),
            }
            yield functions[actor.kind]

    def _make_room(self, manager: ic.ImageCacheManager) -> None:
        """Fetch an image for which there is room only without the other."""
        with contextlib.suppress(errors.NoSpaceError):  # the other is needed
            manager.cache_image(OTHER_ID)

    def _start(self, actor: Actor) -> None:
        self._manager(actor).list_bases()

    def _rename(self, actor: Actor) -> None:
        """Rename a disk's directory, as a resize does, and move it to and fro through another directory."""
        moved, resized = self.instances / "pool" / "moved", self.instances / "pool" / "moved_resize"
        moved.rename(resized)
        actor.reach("rename:done")
        resized.rename(self.instances / "pool" / "other" / "moved")
        actor.reach("rename:done")
        (self.instances / "pool" / "other" / "moved").rename(moved)

    # -- one schedule --------------------------------------------------------------------------------

    def _run(self, prefix: list[int], asleep: frozenset[int], preemptions: int | None) -> list[Choice]:
        """Run one schedule. Returns its decisions, up to where it becomes as good as another.

        :param asleep: who sleeps at the last decision of the prefix.
        """
        for actor, function in zip(self.actors, self._functions(), strict=True):
            actor.start(function)
        choices: list[Choice] = []
        sleeping: frozenset[int] = frozenset()
        current: int | None = None
        spent = 0
        redundant = False
        state = self._state() if preemptions is None else ()
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
                if taken not in able:
                    # Its steps were others this time: a directory that was young then is settled now, say.
                    self.diverged += 1
                    prefix, redundant, taken = prefix[: len(choices)], True, able[0]
                if len(choices) == len(prefix) - 1:
                    sleeping = asleep
            else:
                awake = [i for i in able if i not in sleeping]
                if not awake:
                    redundant, awake = True, able
                taken = current if current in awake and current is not None else awake[0]
                free = preemptions is None or not goes_on or spent < preemptions
                others = [i for i in awake if i != taken] if free else []
            if not redundant:
                choices.append(Choice(taken, others, sleeping))
            if goes_on and taken != current:
                spent += 1
            actor = self.actors[taken]
            actor.step()
            if preemptions is None and not redundant:
                before, state = state, self._state()
                choices[-1].changed = state != before
                # Only who would change nothing sleeps, and only as long as nothing changes.
                sleeping = frozenset() if choices[-1].changed else sleeping - {taken}
            if actor.waits and not actor.done:
                idle.add(taken)
            else:
                idle.clear()
            current = taken
        return choices

    def _state(self) -> tuple[object, ...]:
        """Return what of files and locks an actor can see."""
        found: list[tuple[object, ...]] = []
        inodes = set()
        for parent, directories, names in os.walk(self.instances):
            for name in (*directories, *names):
                path = os.path.join(parent, name)
                status = os.lstat(path)
                inodes.add(f":{status.st_ino}")
                found.append((path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_nlink))
        with open("/proc/locks", encoding="ascii") as file:
            locks = [line.split()[3:] for line in file]
        mine = [tuple(words) for words in locks if any(words[2].endswith(inode) for inode in inodes)]
        return (*sorted(found, key=str), *sorted(mine, key=str))

    # -- what it leaves ------------------------------------------------------------------------------

    def _check(self, schedule: list[int]) -> None:
        told = " ".join(self.actors[each].name for each in schedule)
        made = {}
        for actor, manager in zip(self.actors, self.managers, strict=True):
            if actor.error is not None and not isinstance(actor.error, errors.ImageCacheError):
                raise AssertionError(f"{actor.name} failed in: {told}") from actor.error
            if self._is_in_the_way(actor):
                continue
            assert actor.error is None, f"{actor.name}: {actor.error} in: {told}"
            disk = self.instances / actor.name / "disk"
            entries = sorted(entry.name for entry in disk.parent.iterdir())
            assert entries == (["disk", "disk.info"] if actor.kind == "spawn" else []), told
            made.update(manager.backend.made)  # type: ignore[attr-defined]
        for target in sorted(made):
            if os.path.exists(target):
                self._check_disk(pathlib.Path(target), made[target], told)
        if self._kinds("rename"):
            assert (self.instances / "pool" / "moved" / "disk").exists(), told
        private = self.instances / "_base" / ".imagecache"
        assert list((private / "stage").iterdir()) == [], told
        assert list((private / "trash").iterdir()) == [], told

    def _is_in_the_way(self, actor: Actor) -> bool:
        """Whether an actor was told to come again: a disk is on the base that a scrub found damaged, or
        without locks it cannot wait for the scrub to let go of that."""
        is_told = isinstance(actor.error, errors.BaseInUseError) and self._kinds("scrub")
        return is_told and (not actor.host.locking or self._kinds("spawn", "rename"))

    def _check_disk(self, disk: pathlib.Path, content: bytes, told: str) -> None:
        if header.parse(disk.read_bytes()).backing_file is None:
            return  # the base did not serve, and the disk stands alone
        base = self.instances / "_base" / NAME
        assert base.exists(), f"the base of {disk} is gone after: {told}"
        assert base.read_bytes() == content, f"{disk} changed in: {told}"
