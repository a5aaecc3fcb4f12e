# SPDX-License-Identifier: Apache-2.0
"""Many processes on several hosts that share one directory, with locks or without, some of them killed.

They spawn, reuse, rename, remove, cache, pin, lease, scrub, make room, evict, and run the pass over bases
that are made to look old. Each host has a disk root of its own beside the shared one. What a call returned is
written down by its caller: a promise. Whatever they did to each other: afterwards no overlay lacks its base,
no base has other bytes than its image, no promised disk or pin is lost, and nothing is left behind once it is
old enough to be nobody's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.formats.qcow2 import header
from imagecache_lib.store import layout, pins
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.testing.sources import FakeSource
from tests.support import files, leftovers

IMAGES = {f"image-{number}": random.Random(number).randbytes(20000) + bytes(480) for number in range(6)}
CONTENT = {layout.base_name(image_id): data for image_id, data in IMAGES.items()}

#: What is pinned, and must stay.
PINNED = "image-5"

#: Which processes have locks that lock, by the number of the process within its host.
LOCKING: Mapping[str, Callable[[int], bool]] = {
    "locks": lambda _number: True,
    "no locks": lambda _number: False,
    "mixed": lambda number: number % 2 == 0,
}

#: What the name of a directory begins with that others leave alone.
_BUSY = "busy-"

#: How many processes each host has.
_PROCESSES = 3

_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Arena:
    """Where one host works.

    :param mount: the shared directory as this host sees it.
    :param name: the host's.
    :param private: its own disk root.
    :param promises: where its processes write down what they were promised.
    """

    mount: pathlib.Path
    name: str
    private: pathlib.Path
    promises: pathlib.Path

    def manager(self, *, locking: bool = True, limit: int = 0) -> ic.ImageCacheManager:
        """Return a manager of this host.

        :param limit: of the cache's size, in bytes. 0: there is none.
        """
        config = ic.CacheConfig(
            instances_path=str(self.mount),
            disk_roots=(str(self.mount), str(self.private)),
            num_retries=0,
            lock_timeout=2.0,
            space_minimum_age_seconds=_HOUR,
            max_cache_size=limit,
        )
        host = ic.System(name=self.name, locking=locking)
        return ic.ImageCacheManager(config, FakeSource(IMAGES), host=host, observers=())

    def directories(self, *, busy: bool = False) -> list[pathlib.Path]:
        """Return the instance directories of this host.

        :param busy: those too that others leave alone: their maker works there, or was killed there.
        """
        names = [f"{self.name}-*", *([f"{_BUSY}{self.name}-*"] if busy else [])]
        return sorted(
            each for name in names for root in (self.mount, self.private) for each in root.glob(name)
        )

    def promise(self, *words: str) -> None:
        with (self.promises / f"{os.getpid()}").open("a", encoding="utf-8") as file:
            file.write(json.dumps(words) + "\n")


def run(mounts: Sequence[pathlib.Path], *, seconds: float, seed: int, locking: str = "mixed") -> int:
    """Let the hosts work, and check what they leave. Returns how many processes were killed.

    :param mounts: the shared directory as each host sees it.
    :param locking: a key of :data:`LOCKING`.
    """
    with tempfile.TemporaryDirectory(prefix="imagecache-stress-") as directory:
        arenas = []
        for number, mount in enumerate(mounts):
            arena = Arena(
                mount,
                f"host-{number}",
                pathlib.Path(directory, f"private-{number}"),
                pathlib.Path(directory, f"promises-{number}"),
            )
            arena.private.mkdir()
            arena.promises.mkdir()
            arenas.append(arena)
        kills = _let_them_work(arenas, LOCKING[locking], seconds=seconds, seed=seed)
        _check(arenas)
        return kills


def _let_them_work(
    arenas: Sequence[Arena], locking: Callable[[int], bool], *, seconds: float, seed: int
) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    chance = random.Random(seed)
    # The first child starts the server of all, which imports what they need: on a busy machine that takes
    # longer than a sample goes on.
    first = context.Process(target=os.getpid)
    first.start()
    first.join()
    end = time.monotonic() + seconds
    kills = 0

    def start(number: int) -> multiprocessing.process.BaseProcess:
        arena, locks = arenas[number % len(arenas)], locking(number // len(arenas))
        child = context.Process(target=_work, args=(arena, locks, chance.getrandbits(32), end))
        child.start()
        return child

    children = [start(number) for number in range(len(arenas) * _PROCESSES)]
    try:
        while time.monotonic() < end:
            number = chance.randrange(len(children))
            # Waits a while, and notices when the process fails, which none may.
            children[number].join(chance.uniform(0.1, 0.5))
            if children[number].is_alive():
                children[number].kill()
                children[number].join(60)
                kills += 1
            else:
                assert children[number].exitcode == 0
            children[number] = start(number)
        for child in children:
            child.join(120)
        assert [child.exitcode for child in children] == [0] * len(children)
    finally:
        # Whoever is left when this fails would keep the mounts busy.
        for child in children:
            child.kill()
            child.join(60)
    return kills


# -- what they do ------------------------------------------------------------------------------------


def _work(arena: Arena, locking: bool, seed: int, end: float) -> None:
    chance = random.Random(seed)
    manager = arena.manager(locking=locking)
    weights = {
        _spawn: 8,
        _reuse: 2,
        _fetch_file: 1,
        _rename: 2,
        _remove: 5,
        _cache: 2,
        _pin: 2,
        _lease: 1,
        _make_room: 1,
        _scrub: 1,
        _verify: 3,
        _evict: 2,
    }
    while time.monotonic() < end:
        action = chance.choices(list(weights), list(weights.values()))[0]
        try:
            action(manager, arena, chance)
        except (OSError, errors.ImageCacheError) as error:
            # What another mount of a GlusterFS removed meanwhile is answered with ESTALE: the request fails,
            # and must do no harm. Any other failure is one of the test.
            if not _is_stale(error):
                raise
    # A lock that another process holds may keep its file open here until the next lock is asked for.
    deadline = time.monotonic() + 60
    while (left := leftovers.open_below(arena.mount)) and time.monotonic() < deadline:
        with contextlib.suppress(OSError, errors.ImageCacheError), manager.lease_cached(_image(chance)):
            pass
    assert not left, left


def _is_stale(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ESTALE:
            return True
        error = error.__cause__ or error.__context__
    return False


def _image(chance: random.Random) -> str:
    return chance.choice(sorted(IMAGES))


@contextlib.contextmanager
def _making(path: pathlib.Path) -> Iterator[None]:
    """Pass over an error if another process of this host renamed or removed the directory meanwhile."""
    try:
        yield
    except errors.ImageCacheError:
        if path.parent.exists():
            raise


def _directory(arena: Arena, chance: random.Random, prefix: str = "") -> pathlib.Path:
    root = chance.choice((arena.mount, arena.private))
    directory = root / f"{prefix}{arena.name}-{chance.getrandbits(64):x}"
    directory.mkdir()
    return directory


def _spawn(manager: ic.ImageCacheManager, arena: Arena, chance: random.Random) -> None:
    directory, image_id = _directory(arena, chance), _image(chance)
    backend = chance.choice(("qcow2", "qcow2", "raw"))
    with _making(directory / "disk"):
        manager.create_disk(image_id, str(directory / "disk"), size=2**20, backend=backend)
        arena.promise("disk", directory.name, image_id, backend)


def _reuse(manager: ic.ImageCacheManager, arena: Arena, chance: random.Random) -> None:
    directory, image_id = _directory(arena, chance, _BUSY), _image(chance)
    target = str(directory / "disk")
    manager.create_disk(image_id, target, size=2**20)
    arena.promise("disk", directory.name.removeprefix(_BUSY), image_id, "qcow2")
    manager.create_disk(image_id, target, size=2**21, if_exists="reuse")
    directory.rename(directory.with_name(directory.name.removeprefix(_BUSY)))


def _fetch_file(manager: ic.ImageCacheManager, arena: Arena, chance: random.Random) -> None:
    directory, image_id = _directory(arena, chance), _image(chance)
    with _making(directory / "kernel"):
        manager.fetch_file(image_id, str(directory / "kernel"))
        arena.promise("file", directory.name, image_id, "")


def _rename(_manager: ic.ImageCacheManager, arena: Arena, chance: random.Random) -> None:
    """Rename instances to and fro, as a resize does."""
    found = arena.directories()
    for each in chance.sample(found, min(2, len(found))):
        if not (each / "disk").exists():
            continue  # it is being made
        other = each.name.removesuffix("_resize")
        with contextlib.suppress(OSError):
            each.rename(each.with_name(other if other != each.name else f"{each.name}_resize"))


def _remove(_manager: ic.ImageCacheManager, arena: Arena, chance: random.Random) -> None:
    found = [each for each in arena.directories() if (each / "disk").exists() or (each / "kernel").exists()]
    for each in chance.sample(found, min(2, len(found))):
        arena.promise("gone", each.name.removesuffix("_resize"))
        # Another process of this host may be removing it too, which GlusterFS answers with ESTALE,
        # and rmtree does not count that among the errors it can ignore.
        with contextlib.suppress(OSError):
            shutil.rmtree(each, ignore_errors=True)


def _cache(manager: ic.ImageCacheManager, _arena: Arena, chance: random.Random) -> None:
    manager.cache_image(_image(chance))


def _pin(manager: ic.ImageCacheManager, arena: Arena, chance: random.Random) -> None:
    manager.cache_image(PINNED)
    owner = f"{arena.name}-{chance.getrandbits(64):x}"
    manager.pin(PINNED, owner=owner)
    arena.promise("pin", owner)
    if chance.random() < 0.5:
        arena.promise("unpin", owner)
        manager.unpin(PINNED, owner=owner)


def _lease(manager: ic.ImageCacheManager, _arena: Arena, chance: random.Random) -> None:
    image_id = _image(chance)
    with contextlib.suppress(errors.LeaseLostError), manager.fetch_or_reuse(image_id) as base:
        assert base.fd is not None
        assert os.pread(base.fd, 2**20, 0) == IMAGES[image_id]


def _make_room(manager: ic.ImageCacheManager, arena: Arena, chance: random.Random) -> None:
    """Cache an image where there is room for half of them."""
    limit = sum(map(len, IMAGES.values())) // 2
    with contextlib.suppress(errors.NoSpaceError):
        arena.manager(locking=manager.host.locking, limit=limit).cache_image(_image(chance))


def _scrub(manager: ic.ImageCacheManager, _arena: Arena, chance: random.Random) -> None:
    report = manager.scrub([_image(chance)], rate=0)
    assert not report.damaged, report


def _verify(manager: ic.ImageCacheManager, arena: Arena, _chance: random.Random) -> None:
    _age_bases(arena.mount / "_base")
    manager.verify_base_images([])


def _evict(manager: ic.ImageCacheManager, _arena: Arena, chance: random.Random) -> None:
    with contextlib.suppress(errors.BackendError):  # somebody needs it
        manager.evict_image(_image(chance))


def _age_bases(bases: pathlib.Path) -> None:
    """Let the bases look unused for long, and nothing that is being written."""
    for name in CONTENT:
        for path in (bases / name, bases / ".imagecache" / "records" / f"{name}.json"):
            with contextlib.suppress(FileNotFoundError):
                files.age(path, seconds=48 * _HOUR)


# -- what they leave ---------------------------------------------------------------------------------


def _recover(arenas: Sequence[Arena]) -> None:
    """Let every host start anew and run its pass, long after, until all had their say."""
    problems: list[str] = []
    for _round in range(4):
        # What another host saw in its last pass keeps a base, and counts as a use, until it has looked again.
        for tree in (arenas[0].mount, *(arena.private for arena in arenas)):
            files.age_tree(tree, seconds=48 * _HOUR, directories=True)
        # A host that has not looked yet is a problem of the first rounds.
        problems = []
        for arena in arenas:
            report = arena.manager().verify_base_images([])
            problems.extend(report.problems)
    assert not problems, problems


def _promises(arenas: Sequence[Arena]) -> Iterator[list[str]]:
    for arena in arenas:
        for each in arena.promises.iterdir():
            for line in each.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # its writer was killed
                    yield json.loads(line)


def _check(arenas: Sequence[Arena]) -> None:
    _recover(arenas)
    promises = list(_promises(arenas))
    for arena in arenas:
        _check_disks(arena, promises)
        _check_bases(arena.mount)
        assert not (left := _leftovers(arena)), left
    _check_pins(arenas[0], promises)
    for arena in arenas:
        for directory in arena.directories(busy=True):
            shutil.rmtree(directory)
    _recover(arenas)
    for arena in arenas:
        assert not (left := _leftovers(arena)), left
    mount = arenas[0].mount
    assert not (left := sorted(set(os.listdir(mount / "_base")) - {".imagecache"})), left
    assert not (left := os.listdir(mount / "_base" / ".imagecache" / "records")), left


def _check_bases(mount: pathlib.Path) -> None:
    for name in set(os.listdir(mount / "_base")) - {".imagecache"}:
        assert (mount / "_base" / name).read_bytes() == CONTENT[name], (
            f"{name} has other bytes than its image"
        )


def _check_disks(arena: Arena, promises: Sequence[Sequence[str]]) -> None:
    gone = {words[1] for words in promises if words[0] == "gone"}
    there = {
        directory.name.removeprefix(_BUSY).removesuffix("_resize"): directory
        for directory in arena.directories(busy=True)
    }
    for words in promises:
        if words[0] in ("disk", "file") and words[1] not in gone and words[1].startswith(f"{arena.name}-"):
            assert words[1] in there, f"{words} is lost"
            path = there[words[1]] / ("disk" if words[0] == "disk" else "kernel")
            data = path.read_bytes()
            if words[3] != "qcow2":
                assert data.startswith(IMAGES[words[2]]), f"{path} has other bytes than {words[2]}"
    for directory in there.values():
        if not (disk := directory / "disk").exists():
            continue
        data = disk.read_bytes()[:65536]
        if data.startswith(header.MAGIC):
            base = os.path.basename(os.fsdecode(header.parse(data).backing_file or b""))
            assert (arena.mount / "_base" / base).exists(), f"the base of {disk} is gone"


def _check_pins(arena: Arena, promises: Sequence[Sequence[str]]) -> None:
    ended = {words[1] for words in promises if words[0] == "unpin"}
    promised = {words[1] for words in promises if words[0] == "pin"} - ended
    found = pins.read(
        CacheStore(arena.manager().config, ic.System(name=arena.name)), layout.base_name(PINNED)
    )
    owners = {pin.owner for pin in found.pins} if found is not None else set()
    assert promised <= owners, f"{len(promised - owners)} of {len(promised)} pins are lost"
    if promised:
        assert (arena.mount / "_base" / layout.base_name(PINNED)).exists(), "the pinned base is gone"
    for owner in owners:
        arena.manager().unpin(PINNED, owner=owner)


def _leftovers(arena: Arena) -> list[str]:
    private = arena.mount / "_base" / ".imagecache"
    found = [os.path.join(name, entry) for name in ("stage", "trash") for entry in os.listdir(private / name)]
    for tree in (arena.mount, arena.private):
        for parent, _directories, names in os.walk(tree):
            found += [
                os.path.join(parent, name) for name in names if name.endswith(".new") or "clock." in name
            ]
    return found
