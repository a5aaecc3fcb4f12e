# SPDX-License-Identifier: Apache-2.0
"""Every state that a power cut may leave of an operation, and whether the library keeps its promises in it.

An operation is recorded once (:mod:`tests.support.recorded_calls`); its states are built one after the other
(:mod:`tests.support.crash_states`) where it ran, since overlays hold absolute paths. In each, before anything
is repaired, whatever has a base's name must be whole. Then the host starts again: what was acknowledged must
be there, the documented retry of what was not must work, and after passes that come long later nothing may be
left over, no overlay may lack its base, and what nobody needs any more must go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.backends.file import FileBackend
from imagecache_lib.backends.qcow2 import Qcow2Backend
from imagecache_lib.backends.raw import RawBackend
from imagecache_lib.formats.qcow2 import header
from imagecache_lib.nova import disk_info
from imagecache_lib.store import evidence, layout, pins
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.testing.sources import FakeSource
from tests.support import files
from tests.support.crash_states import Attribute, Data, File, Names, Recording, Size, State
from tests.support.recorded_calls import MODE, mark, record

A, B, C = (f"{digit * 8}-aaaa-4bbb-8ccc-0123456789ab" for digit in "123")

#: Two pieces of data, and between them one of zeros.
IMAGES = {
    image_id: random.Random(image_id).randbytes(4096) + bytes(4096) + random.Random(image_id).randbytes(512)
    for image_id in (A, B, C)
}
_CONTENT = {layout.base_name(image_id): data for image_id, data in IMAGES.items()}

_LATER = 48 * 3600

#: Made here and not looked up by their names, which reads files of every installed distribution.
_BACKENDS: Mapping[str, type[FileBackend]] = {"qcow2": Qcow2Backend, "raw": RawBackend}

#: Something that is done in a world.
Operation = Callable[["World"], object]


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk that an operation makes, or that was there before it.

    :param name: of its file, in the one instance's directory.
    :param backend: the name of its backend. Empty: it is a file, as a kernel is.
    """

    name: str
    image_id: str
    backend: str
    size: int | None = 2**20


class World:
    """A cache in which operations are recorded, and their crashes are looked at."""

    def __init__(self, directory: pathlib.Path, **options: object) -> None:
        self.instances = directory / "instances"
        self.instance = self.instances / "instance"
        self.instance.mkdir(parents=True)
        self.bases = self.instances / "_base"
        self.private = self.bases / ".imagecache"
        self.options = options
        self.disks: list[Disk] = []
        #: Whether what is recorded grows and flattens disks, so that they may be as they were or not.
        self.disks_change = False
        self.source = FakeSource(IMAGES)
        self.config = ic.CacheConfig(
            **{  # type: ignore[arg-type]
                "instances_path": str(self.instances),
                "num_retries": 0,
                "lock_timeout": 5.0,
                "remove_unused_original_minimum_age_seconds": 0,
                "space_minimum_age_seconds": 0,
                **options,
            }
        )

    def manager(
        self, *, boot_id: str = "before", trace: Callable[[TracePoint], None] | None = None
    ) -> ic.ImageCacheManager:
        more = {} if trace is None else {"trace": trace}
        host = ic.System(name="here", boot_id=boot_id, **more)  # type: ignore[arg-type]
        backend = _BACKENDS["qcow2"](self.config, host)
        return ic.ImageCacheManager(self.config, self.source, backend, host=host, observers=())

    def path(self, disk: Disk) -> pathlib.Path:
        return self.instance / disk.name

    def make(self, manager: ic.ImageCacheManager, disk: Disk, *, if_exists: str = "error") -> None:
        target = str(self.path(disk))
        if disk.backend:
            backend = _BACKENDS[disk.backend](self.config, manager.host)
            manager.create_disk(disk.image_id, target, size=disk.size, backend=backend, if_exists=if_exists)
        else:
            manager.fetch_file(disk.image_id, target, if_exists=if_exists)

    def killed_at(self, point: TracePoint, function: Callable[[ic.ImageCacheManager], object]) -> None:
        """Run a function in a process of its own that dies when it reaches a point."""

        def trace(reached: TracePoint) -> None:
            if reached == point:
                os._exit(9)

        child = os.fork()
        if child == 0:
            try:
                function(self.manager(trace=trace))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, f"it never reached {point}"

    # -- the promises --------------------------------------------------------------------------------

    def check(self, marks: frozenset[str]) -> None:
        """Check a state: what it holds, and what becomes of it.

        :param marks: what had been acknowledged.
        :raises AssertionError, ImageCacheError: a promise is broken.
        """
        self._check_bases()
        self.source = FakeSource(IMAGES)
        manager = self.manager(boot_id="after")
        manager.list_bases()
        self._check_acknowledged(manager, marks)
        for disk in self.disks:
            self._retry(manager, disk)
        self._check_disks(manager)
        for _round in range(2):
            self._pass()
        self._check_disks(manager)
        self._check_pins(marks)
        assert not (left := self._leftovers()), left
        self._check_the_end()

    def _check_bases(self) -> None:
        cache = CacheStore(self.config, ic.System(name="here"))
        for name in sorted(set(_names(self.bases)) - {".imagecache"}):
            assert (self.bases / name).read_bytes() == _CONTENT[name], f"the base {name} is torn"
            known = cache.evidence_of(name) if self.private.exists() else None
            assert known is None or (known.size == len(_CONTENT[name]) and known.digest_checked), known

    def _check_acknowledged(self, manager: ic.ImageCacheManager, marks: frozenset[str]) -> None:
        for image_id in (A, B, C):
            if f"cached {image_id}" in marks and f"evicting {image_id}" not in marks:
                with manager.lease_cached(image_id):
                    pass
                known = CacheStore(self.config, manager.host).evidence_of(layout.base_name(image_id))
                assert known is not None and known.origin is evidence.Origin.FETCHED, known
        self._check_pins(marks)

    def _check_pins(self, marks: frozenset[str]) -> None:
        cache = CacheStore(self.config, ic.System(name="here"))
        for said in marks:
            if (found := re.fullmatch(r"pinned (\S+) (\S+)", said)) is None:
                continue
            if f"unpinning {found[1]} {found[2]}" not in marks:
                known = pins.read(cache, layout.base_name(found[1]))
                owners = {pin.owner for pin in known.pins} if known is not None else set()
                assert found[2] in owners, f"the pin of {found[2]} is lost"
                if f"cached {found[1]}" in marks:
                    assert (self.bases / layout.base_name(found[1])).exists(), "a pinned base went"

    def _retry(self, manager: ic.ImageCacheManager, disk: Disk) -> None:
        """Do as a driver does whose host went down: ask again, for a disk that may be there."""
        try:
            self.make(manager, disk, if_exists="reuse")
        except errors.BackendError:
            # Allowed where the configuration says so, and only for a copy: what cannot be trusted is refused.
            if self.config.sync_copied_disks or disk.backend != "raw":
                raise
            self.path(disk).unlink()
            self.make(manager, disk)

    def _check_disks(self, manager: ic.ImageCacheManager) -> None:
        pinned = disk_info.parse(_read(self.instance / "disk.info") or b"{}")
        assert pinned is not None, "disk.info is torn"
        for disk in self.disks:
            data = self.path(disk).read_bytes()
            if disk.backend != "qcow2":
                assert data.startswith(IMAGES[disk.image_id]), f"{disk.name} has other bytes than its image"
                assert not any(data[len(IMAGES[disk.image_id]) :]), f"{disk.name} does not end in zeros"
                assert len(data) == (disk.size if disk.backend else len(IMAGES[disk.image_id])), len(data)
            else:
                found = header.parse(data)
                base = self.bases / layout.base_name(disk.image_id)
                if self.disks_change and found.backing_file is None:
                    held = _held_by(self.path(disk))
                    assert held.startswith(IMAGES[disk.image_id]), f"{disk.name} lost what it had of its base"
                    assert not any(held[len(IMAGES[disk.image_id]) :]), f"{disk.name} does not end in zeros"
                    continue
                assert os.fsdecode(found.backing_file or b"") == str(base), found
                assert base.exists(), f"the base of {disk.name} is gone"
                assert found.virtual_size == disk.size or self.disks_change
            if disk.backend:
                # The disk is marked with its format. Its entry for Nova may be lost, and must not be wrong.
                assert pinned.get(str(self.path(disk)), disk.backend) == disk.backend, pinned
                found_disk = manager.inspect_disk(
                    str(self.path(disk)), backend=_BACKENDS[disk.backend](self.config, manager.host)
                )
                assert found_disk.format == disk.backend, found_disk
        self._check_bases()

    def _pass(self) -> None:
        files.age_tree(self.instances, seconds=_LATER, directories=True)
        report = self.manager(boot_id="after").verify_base_images([])
        assert not report.problems, report.problems

    def _leftovers(self) -> list[str]:
        found = [f"{name}/{each}" for name in ("stage", "trash") for each in _names(self.private / name)]
        for parent, _directories, names in os.walk(self.instances):
            found += [os.path.join(parent, name) for name in names if name.endswith(".new")]
        return found

    def _check_the_end(self) -> None:
        """Nobody needs anything any more, and all goes."""
        manager = self.manager(boot_id="after")
        for image_id in (A, B, C):
            known = pins.read(CacheStore(self.config, manager.host), layout.base_name(image_id))
            for pin in known.pins if known is not None else ():
                manager.unpin(image_id, owner=pin.owner)
        for entry in list(self.instance.iterdir()):
            entry.unlink()
        for _round in range(2):
            self._pass()
        assert not (left := set(_names(self.bases)) - {".imagecache"}), left
        assert not (left := set(_names(self.private / "records"))), left
        assert not (left := set(_names(self.private / "pins"))), left
        assert not (found := self._leftovers()), found


def _names(path: pathlib.Path) -> list[str]:
    return os.listdir(path) if path.exists() else []


def _held_by(path: pathlib.Path) -> bytes:
    """Return what the guest of a qcow2 disk reads."""
    with tempfile.TemporaryDirectory() as directory:
        flat = pathlib.Path(directory, "flat")
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, flat], check=True)
        return flat.read_bytes()


def _read(path: pathlib.Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


# -- building a state --------------------------------------------------------------------------------

#: Where lock files lie, which hold nothing.
LOCKS = "locks"


def build(root: pathlib.Path, state: State) -> None:
    """Make a directory hold exactly a state. Directories that are there stay the same ones."""
    _clear(root, {path for path, found in state.items() if found is None}, "")
    made: dict[int, pathlib.Path] = {}
    for path in sorted(state):
        found = state[path]
        if found is None:
            (root / path).mkdir(exist_ok=True)
        elif found[0] in made:
            os.link(made[found[0]], root / path)
        else:
            made[found[0]] = root / path
            _write(root / path, found[1])
    _bind(list(made.values()))


def _clear(root: pathlib.Path, kept: set[str], below: str) -> None:
    for entry in list(os.scandir(root / below)):
        path = os.path.join(below, entry.name)
        if path == LOCKS:
            continue
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
        elif path in kept:
            _clear(root, kept, path)
        else:
            shutil.rmtree(entry.path)


def _write(path: pathlib.Path, file: File) -> None:
    path.write_bytes(file.data)
    for name, value in file.attributes:
        if name == MODE:
            path.chmod(int(value, 8))
        else:
            os.setxattr(path, name, value)


_BASE_ID = re.compile(rb'base_id\\*": \\*"([0-9a-f]{32})')
_INODE = re.compile(rb'(inode\\*": )\d+')


def _bind(paths: list[pathlib.Path]) -> None:
    """Let records name the inodes that their bases have now, which building a state has changed."""
    inodes = {}
    for path in paths:
        with contextlib.suppress(OSError):
            inodes[os.getxattr(path, layout.ID_ATTRIBUTE)] = b"%d" % path.stat().st_ino
    for path in paths:
        data = path.read_bytes()
        found = _BASE_ID.search(data)
        if found is not None and found[1] in inodes:
            # Through the same inode: other names may mean it.
            path.write_bytes(_INODE.sub(rb"\g<1>" + inodes[found[1]], data))


# -- what is recorded --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scene:
    """An operation, and what is there before it.

    :param prepare: makes that, and says in :attr:`World.disks` which disks there are, or will be.
    :param run: what is recorded.
    :param options: of the configuration.
    :param ordered: look only at what a filesystem leaves that keeps names, sizes and attributes in their
        order, as one with a journal does.
    """

    prepare: Operation
    run: Operation
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    ordered: bool = False


def _started(world: World) -> ic.ImageCacheManager:
    manager = world.manager()
    manager.list_bases()
    return manager


def _cached(*image_ids: str, disks: tuple[Disk, ...] = (), to_be: tuple[Disk, ...] = ()) -> Operation:
    def prepare(world: World) -> None:
        manager = _started(world)
        for image_id in image_ids:
            manager.cache_image(image_id)
        for disk in disks:
            world.make(manager, disk)
        world.disks.extend((*disks, *to_be))

    return prepare


def _cache(image_id: str) -> Operation:
    def run(world: World) -> None:
        world.manager().cache_image(image_id)
        mark(f"cached {image_id}")

    return run


def _spawn(disk: Disk) -> Operation:
    def run(world: World) -> None:
        world.make(world.manager(), disk)
        mark(f"made {disk.name}")

    return run


def _evict(image_id: str) -> Operation:
    def run(world: World) -> None:
        mark(f"evicting {image_id}")
        with contextlib.suppress(errors.BackendError):  # somebody needs it
            world.manager().evict_image(image_id)

    return run


def _pin(image_id: str, owner: str, expires: float | None = None) -> Operation:
    def run(world: World) -> None:
        world.manager().pin(image_id, owner=owner, expires=expires)
        mark(f"pinned {image_id} {owner}")

    return run


def _unpin(image_id: str, owner: str) -> Operation:
    def run(world: World) -> None:
        mark(f"unpinning {image_id} {owner}")
        world.manager().unpin(image_id, owner=owner)

    return run


def _pass(world: World) -> None:
    world.manager().verify_base_images([])


def _last_pass(world: World) -> None:
    # Whatever has no disk and no pin is old enough to go, as soon as the clock has moved on.
    for image_id in (A, B, C):
        mark(f"evicting {image_id}")
    _pass(world)


def _remove(disk: Disk) -> Operation:
    def run(world: World) -> None:
        manager = world.manager()
        manager.remove_disk(manager.inspect_disk(str(world.path(disk))))

    return run


def _after(*operations: Operation) -> Operation:
    def run(world: World) -> None:
        for operation in operations:
            operation(world)

    return run


def _interrupted(point: TracePoint, image_id: str) -> Operation:
    def prepare(world: World) -> None:
        _started(world)
        world.killed_at(point, lambda manager: manager.cache_image(image_id))
        world.disks.append(Disk("disk", image_id, "qcow2"))

    return prepare


def _thrown(world: World) -> None:
    """A base lies in the trash, and a disk came to need it since."""
    disk = Disk("disk", A, "qcow2")
    _cached(A, disks=(disk,))(world)
    kept = world.path(disk).rename(world.instance.parent.parent / "aside")
    world.killed_at(TracePoint.EVICT_RENAMED, lambda manager: manager.evict_image(A))
    kept.rename(world.path(disk))


def _damaged(world: World) -> None:
    """A base does not serve, since a scrub found it damaged."""
    _cached(A, to_be=(OVERLAY,))(world)
    cache = CacheStore(world.config, world.manager().host)
    known = cache.evidence_of(layout.base_name(A))
    assert known is not None
    cache.write_record(dataclasses.replace(known, damaged=True))


OVERLAY = Disk("disk", A, "qcow2")
COPY = Disk("disk", A, "raw")
SECOND = Disk("disk.second", B, "raw")
KERNEL = Disk("kernel", A, "", None)

SCENES: Mapping[str, Scene] = {
    "the first start": Scene(lambda world: None, _cache(A)),
    "publish": Scene(_cached(), _cache(A)),
    "spawn, overlay, miss": Scene(_cached(to_be=(OVERLAY,)), _spawn(OVERLAY)),
    "spawn, overlay, hit": Scene(_cached(A, to_be=(OVERLAY,)), _spawn(OVERLAY)),
    "spawn, copy": Scene(_cached(A, to_be=(COPY,)), _spawn(COPY)),
    "spawn, copy that is not synced": Scene(
        # Its mark, by which reuse can tell, is not synced either: a filesystem that reorders can lose it.
        _cached(A, to_be=(COPY,)),
        _spawn(COPY),
        {"sync_copied_disks": False},
        ordered=True,
    ),
    "spawn, a second disk": Scene(_cached(A, B, disks=(OVERLAY,), to_be=(SECOND,)), _spawn(SECOND)),
    "fetch a file": Scene(_cached(to_be=(KERNEL,)), _spawn(KERNEL)),
    "evict": Scene(_cached(A), _evict(A)),
    "replace what does not serve": Scene(_damaged, _spawn(OVERLAY)),
    "evict what is in use": Scene(_cached(A, disks=(OVERLAY,)), _evict(A)),
    "the pass": Scene(_cached(A, B, disks=(OVERLAY,)), _pass),
    "pin": Scene(_cached(A), _after(lambda _world: mark(f"cached {A}"), _pin(A, "one"))),
    "pin anew": Scene(_after(_cached(A), _pin(A, "one", 4e9)), _pin(A, "one")),
    "unpin": Scene(_after(_cached(A), _pin(A, "one"), _pin(A, "two")), _unpin(A, "one")),
    "remove a disk": Scene(_cached(A, B, disks=(OVERLAY, SECOND)), _remove(OVERLAY)),
    "recovery of a publication, linked": Scene(_interrupted(TracePoint.PUBLISH_LINKED, A), _pass),
    "recovery of a publication, sealed": Scene(_interrupted(TracePoint.PUBLISH_LINK, A), _spawn(OVERLAY)),
    "recovery of an eviction": Scene(_thrown, _pass),
    "a spawn that wants what lies in the trash": Scene(_thrown, _spawn(Disk("disk.second", A, "qcow2"))),
}

#: Each of these may come before or after each of the others.
_PARTS: Mapping[str, Operation] = {
    "publish": _cache(C),
    "spawn an overlay": _spawn(Disk("disk.overlay", A, "qcow2")),
    "spawn a copy": _spawn(Disk("disk.copy", B, "raw")),
    "evict": _evict(B),
    "pin": _pin(A, "one"),
    "pin another": _pin(B, "two"),
    "unpin": _unpin(A, "zero"),
    "pass": _pass,
    "remove": _remove(OVERLAY),
}

PAIRS: Mapping[str, Scene] = {
    f"{first}, then {second}": Scene(
        _after(_cached(A, B, disks=(OVERLAY,)), _pin(A, "zero")),
        _after(_PARTS[first], _last_pass if second == "pass" else _PARTS[second]),
    )
    for first in _PARTS
    for second in _PARTS
    if first != second
}


def _is_in_flight(path: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}|\..+\.new", os.path.basename(path)) is not None


class Crashes:
    """The crash states of one scene."""

    def __init__(self, directory: pathlib.Path, scene: Scene) -> None:
        self.world = World(directory, **scene.options)
        scene.prepare(self.world)
        self.recording: Recording = record(
            self.world.instances, lambda: scene.run(self.world), ignored=(LOCKS,)
        )
        self._ordered = scene.ordered
        self.checked = 0
        self._seen: set[tuple[State, ...] | object] = set()

    def everything(self) -> Iterator[tuple[frozenset[int], frozenset[str]]]:
        """Yield all states that can be told apart, with what was acknowledged before each.

        Of a file in flight, whose content nobody looks at, all or nothing of what waits is there.
        """
        for cut in self.recording.cuts():
            marks = self.recording.marks(cut)
            for present in self.recording.all_states(cut, is_whole=_is_in_flight):
                if self._is_new(present := self._possible(present, cut), marks):
                    yield present, marks

    def some(self, count: int, chance: random.Random) -> Iterator[tuple[frozenset[int], frozenset[str]]]:
        """Yield so many states at most that can be told apart, chosen at random."""
        cuts = self.recording.cuts()
        for _turn in range(10 * count):
            cut = chance.choice(cuts)
            present = self._possible(self.recording.some_state(cut, chance), cut)
            marks = self.recording.marks(cut)
            if self._is_new(present, marks):
                yield present, marks
                count -= 1
            if count == 0:
                return

    def _possible(self, present: frozenset[int], cut: int) -> frozenset[int]:
        """Return what is there of that, where the filesystem keeps an order."""
        if not self._ordered:
            return present
        steps = self.recording.steps
        metadata = [each for each in range(cut) if isinstance(steps[each], Names | Size | Attribute)]
        end = next((each for each in metadata if each not in present), cut)
        return frozenset(each for each in present if each < end or isinstance(steps[each], Data))

    def _is_new(self, present: frozenset[int], marks: frozenset[str]) -> bool:
        known = hash((frozenset(self.recording.state(present).items()), marks))
        if known in self._seen:
            return False
        self._seen.add(known)
        return True

    def check(self, present: frozenset[int], marks: frozenset[str]) -> None:
        """Build a state and check it.

        :raises AssertionError: a promise is broken; says which steps were lost.
        """
        state = self.recording.state(present)
        build(self.world.instances, state)
        self.checked += 1
        try:
            self.world.check(marks)
        except (AssertionError, errors.ImageCacheError, OSError, KeyError, header.HeaderError) as error:
            raise AssertionError(self._told(present, marks, state)) from error

    def _told(self, present: frozenset[int], marks: frozenset[str], state: State) -> str:
        last = max(present, default=-1)
        lost = [
            f"  {position} {str(step)[:200]}"
            for position, step in enumerate(self.recording.steps[: last + 1])
            if position not in present and not type(step).__name__.startswith(("Sync", "Mark"))
        ]
        there = [
            path if found is None else f"{path} {len(found[1].data)}" for path, found in sorted(state.items())
        ]
        return "\n".join(
            (
                "a promise is broken after this power cut",
                f"acknowledged: {sorted(marks)}",
                f"the last step that arrived is {last}, and before it these were lost:",
                *lost,
                "there was:",
                *(f"  {each}" for each in there),
            )
        )
