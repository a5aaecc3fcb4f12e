# SPDX-License-Identifier: Apache-2.0
"""Many processes on several hosts that share one directory, some with broken locks, some killed.

They spawn, remove, cache, evict, and run the pass over bases that are made to look old. Whatever they did to
each other: afterwards no overlay lacks its base, no base has other bytes than its image, and nothing is left
behind once it is old enough to be nobody's.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pathlib
import random
import shutil
import time
from collections.abc import Sequence

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.formats.qcow2 import header
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource
from tests.support import files

IMAGES = {f"image-{number}": random.Random(number).randbytes(20000) + bytes(480) for number in range(6)}
CONTENT = {layout.base_name(image_id): data for image_id, data in IMAGES.items()}

#: How many processes each host has; every other one has broken locks.
_PROCESSES = 3

_HOUR = 3600


def run(mounts: Sequence[pathlib.Path], *, seconds: float, seed: int) -> int:
    """Let the hosts work, and check what they leave. Returns how many processes were killed.

    :param mounts: the shared directory as each host sees it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    chance = random.Random(seed)
    end = time.monotonic() + seconds
    kills = 0

    def start(number: int) -> multiprocessing.process.BaseProcess:
        host = number % len(mounts)
        locking = (number // len(mounts)) % 2 == 0
        child = context.Process(
            target=_work, args=(mounts[host], f"host-{host}", locking, chance.getrandbits(32), end)
        )
        child.start()
        return child

    children = [start(number) for number in range(len(mounts) * _PROCESSES)]
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
    _check(mounts)
    return kills


def _manager(mount: pathlib.Path, name: str, *, locking: bool = True) -> ic.ImageCacheManager:
    config = ic.CacheConfig(instances_path=str(mount), num_retries=0, lock_timeout=2.0)
    host = ic.System(name=name, locking=locking)
    return ic.ImageCacheManager(config, FakeSource(IMAGES), host=host, observers=())


def _work(mount: pathlib.Path, name: str, locking: bool, seed: int, end: float) -> None:
    chance = random.Random(seed)
    manager = _manager(mount, name, locking=locking)
    while time.monotonic() < end:
        try:
            _act(manager, mount, name, chance)
        except (OSError, errors.ImageCacheError) as error:
            # What another mount of a GlusterFS removed meanwhile is answered with ESTALE: the request fails,
            # and must do no harm. Any other failure is one of the test.
            if not _is_stale(error):
                raise


def _is_stale(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ESTALE:
            return True
        error = error.__cause__ or error.__context__
    return False


def _act(manager: ic.ImageCacheManager, mount: pathlib.Path, name: str, chance: random.Random) -> None:
    image_id = chance.choice(sorted(IMAGES))
    action = chance.choices(("spawn", "remove", "cache", "verify", "evict"), (8, 5, 2, 3, 2))[0]
    if action == "spawn":
        directory = mount / f"{name}-{chance.getrandbits(64):x}"
        directory.mkdir()
        manager.create_disk(image_id, str(directory / "disk"), size=2**20)
    elif action == "remove":
        disks = sorted(mount.glob(f"{name}-*/disk"))
        for disk in chance.sample(disks, min(2, len(disks))):
            # Another process of this host may be removing it too, which GlusterFS answers with ESTALE,
            # and rmtree does not count that among the errors it can ignore.
            with contextlib.suppress(OSError):
                shutil.rmtree(disk.parent, ignore_errors=True)
    elif action == "cache":
        manager.cache_image(image_id)
    elif action == "verify":
        _age_bases(mount / "_base")
        manager.verify_base_images([])
    else:
        with contextlib.suppress(errors.BackendError):  # somebody needs it
            manager.evict_image(image_id)


def _age_bases(bases: pathlib.Path) -> None:
    """Let the bases look unused for long, and nothing that is being written."""
    for name in CONTENT:
        for path in (bases / name, bases / ".imagecache" / "records" / f"{name}.json"):
            with contextlib.suppress(FileNotFoundError):
                files.age(path, seconds=48 * _HOUR)


def _age_everything(mount: pathlib.Path) -> None:
    files.age_tree(mount, seconds=48 * _HOUR, directories=True)


def _recover(mounts: Sequence[pathlib.Path]) -> None:
    """Let every host start anew and run its pass, long after, until all had their say."""
    problems: list[str] = []
    for _round in range(3):
        # What another host saw in its last pass keeps a base, and counts as a use, until it has looked again.
        _age_everything(mounts[0])
        # A host that has not looked yet is a problem of the first rounds.
        problems = []
        for number, mount in enumerate(mounts):
            report = _manager(mount, f"host-{number}").verify_base_images([])
            problems.extend(report.problems)
    assert not problems, problems


def _check(mounts: Sequence[pathlib.Path]) -> None:
    _recover(mounts)
    for mount in mounts:
        bases = mount / "_base"
        for disk in mount.glob("host-*/disk"):
            backing = header.parse(disk.read_bytes()[:65536]).backing_file or b""
            name = os.path.basename(os.fsdecode(backing))
            assert (bases / name).exists(), f"the base of {disk} is gone"
        for name in set(os.listdir(bases)) - {".imagecache"}:
            assert (bases / name).read_bytes() == CONTENT[name], f"{name} has other bytes than its image"
        assert not (left := _leftovers(mount)), left
    for directory in mounts[0].glob("host-*"):
        shutil.rmtree(directory)
    _recover(mounts)
    assert not (left := _leftovers(mounts[0])), left
    assert not (left := sorted(set(os.listdir(mounts[0] / "_base")) - {".imagecache"})), left
    assert not (left := os.listdir(mounts[0] / "_base" / ".imagecache" / "records")), left


def _leftovers(mount: pathlib.Path) -> list[str]:
    private = mount / "_base" / ".imagecache"
    found = [os.path.join(name, entry) for name in ("stage", "trash") for entry in os.listdir(private / name)]
    for parent, _directories, names in os.walk(mount):
        found += [os.path.join(parent, name) for name in names if name.endswith(".new") or "clock." in name]
    return found
