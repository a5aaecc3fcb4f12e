# SPDX-License-Identifier: Apache-2.0
"""An error of each kind from each system call of each public call, injected by strace, or a SIGKILL at it.

Only the library's errors may leave the public API, no descriptor may stay open, and afterwards every promise
holds, as after a crash: :meth:`tests.campaigns.crashes.World.check` looks.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from typing import NoReturn

import imagecache_lib as ic
from imagecache_lib import errors, model
from imagecache_lib.store import layout
from tests.campaigns import crashes
from tests.campaigns.crashes import A, Disk, Scene, World
from tests.support.recorded_calls import attached

_NAMES = ("EIO", "ENOSPC", "EDQUOT", "EACCES", "EROFS", "ESTALE")

#: What each call may fail with. The names are the kernel's, which sees preadv2 for os.preadv.
#: A call under any other name is never failed.
FAULTS: Mapping[str, tuple[str, ...]] = {
    "openat": ("EIO", "EMFILE", "ENFILE", "EACCES", "ENOSPC", "ESTALE"),
    "newfstatat": ("EIO", "EACCES", "ESTALE"),
    "statx": ("EIO", "EACCES", "ESTALE", "ENOSYS"),
    "readlink": ("EIO", "EACCES", "ESTALE"),
    "fstat": ("EIO", "ESTALE"),
    "getdents64": ("EIO", "ESTALE"),
    "read": ("EIO", "ESTALE"),
    "pread64": ("EIO",),
    "preadv": ("EIO",),
    "preadv2": ("EIO",),
    "write": ("EIO", "ENOSPC", "EDQUOT"),
    "pwrite64": ("EIO", "ENOSPC", "EFBIG"),
    "pwritev": ("EIO", "ENOSPC", "EFBIG"),
    "pwritev2": ("EIO", "ENOSPC", "EFBIG"),
    "ftruncate": ("EIO", "ENOSPC", "EFBIG"),
    "fallocate": ("EIO", "ENOSPC", "EOPNOTSUPP"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "fdatasync": ("EIO", "ENOSPC", "EDQUOT"),
    "rename": _NAMES,
    "renameat2": (*_NAMES, "EINVAL"),
    "link": (*_NAMES, "EPERM", "EMLINK"),
    "linkat": (*_NAMES, "EPERM", "EMLINK"),
    "unlink": ("EIO", "EACCES", "EROFS", "ESTALE"),
    "rmdir": ("EIO", "EACCES", "EROFS"),
    "mkdir": _NAMES,
    "fsetxattr": ("EIO", "ENOSPC", "EOPNOTSUPP"),
    "fgetxattr": ("EIO", "EOPNOTSUPP"),
    "fchmod": ("EIO", "EROFS"),
    "utimensat": ("EIO", "EACCES", "EROFS"),
    "getxattr": ("EIO", "EOPNOTSUPP"),
    "statfs": ("EIO",),
    "fstatfs": ("EIO", "ESTALE"),
    "fcntl": ("EIO", "ENOLCK"),
    "ioctl": ("EIO", "EOPNOTSUPP"),
    "access": ("EIO", "EACCES"),
    "lseek": ("EIO", "EINVAL"),
    "dup": ("EMFILE",),
    "pipe2": ("EMFILE",),
    "memfd_create": ("EMFILE",),
}

#: What stands for an error where the process, or the program that it runs, is killed before the call.
KILL = "SIGKILL"

#: Calls that read, open or change something: a crash anywhere else is one before the next of these.
_KILLED_AT = frozenset(
    (
        *("openat", "read", "write", "pwrite64", "pwritev2", "ftruncate", "fsync", "fdatasync", "rename"),
        *("renameat2", "link", "linkat", "unlink", "rmdir", "mkdir", "fsetxattr", "fchmod", "utimensat"),
    )
)

_OVERLAY = Disk("disk", A, "qcow2")


def _look(world: World) -> None:
    manager = world.manager()
    manager.list_bases()
    manager.list_hosts()
    manager.is_cached(A)
    manager.explain(A, [])
    manager.audit([])
    manager.get_disk_usage()
    manager.get_space()
    manager.verify_base_images([], dry_run=True)


def _about_to_change(world: World) -> None:
    crashes.SCENES["evict what is in use"].prepare(world)
    world.disks_change = True


def _grow(world: World) -> None:
    manager = world.manager()
    disk = manager.resize_disk(manager.inspect_disk(str(world.path(_OVERLAY))), 2**21)
    manager.flatten_disk(disk)
    manager.remove_disk(disk)


def _lease(world: World) -> None:
    with world.manager().fetch_or_reuse(A) as base:
        assert base.fd is not None


def _pin_ahead(world: World) -> None:
    world.manager().cache_image(A, pin_until=4e9)


def _reuse(world: World) -> None:
    world.make(world.manager(), _OVERLAY, if_exists="reuse")


def _ensure(world: World) -> None:
    world.manager().ensure_backing(str(world.path(_OVERLAY)), image_id=A)


def _lost_its_base(world: World) -> None:
    crashes.SCENES["evict what is in use"].prepare(world)
    for path in (world.bases / layout.base_name(A),):
        path.unlink()


def _many(world: World) -> None:
    instances = [model.Instance("instance", "here", images=(A,))]
    world.manager().verify_base_images(instances)


SCENES: Mapping[str, Scene] = {
    **crashes.SCENES,
    "look": Scene(crashes.SCENES["the pass"].prepare, _look),
    "preflight": Scene(crashes.SCENES["evict"].prepare, lambda world: world.manager().preflight()),
    "scrub": Scene(crashes.SCENES["the pass"].prepare, lambda world: world.manager().scrub(rate=0)),
    "lease": Scene(crashes.SCENES["evict"].prepare, _lease),
    "pin ahead": Scene(crashes.SCENES["publish"].prepare, _pin_ahead),
    "reuse": Scene(crashes.SCENES["evict what is in use"].prepare, _reuse),
    "ensure a backing file": Scene(_lost_its_base, _ensure),
    "grow, flatten, remove": Scene(_about_to_change, _grow),
    "prune": Scene(crashes.SCENES["the pass"].prepare, lambda world: world.manager().prune([])),
    "forget disks": Scene(
        crashes.SCENES["the pass"].prepare,
        lambda world: world.manager().forget_disks(str(world.instances)),
    ),
    "swap": Scene(
        crashes.SCENES["publish"].prepare,
        lambda world: world.manager().create_swap(str(world.instance / "disk.swap"), size_mb=1),
    ),
    "a pass with a report": Scene(crashes.SCENES["the pass"].prepare, _many),
    "preallocate": Scene(
        crashes.SCENES["spawn, copy"].prepare,
        crashes.SCENES["spawn, copy"].run,
        {"preallocate_images": "space"},
    ),
}

#: What a child ends with: it went well, a library's error came out, another one did, files stay open.
FINE, REFUSED, _RAW, _LEAKED = 0, 3, 4, 5


def count_calls(scene: Scene) -> Mapping[str, int]:
    """Return how often each call that can fail is made, by the thread or program that makes it most often.

    strace counts those of each tracee apart, so that it fails a call of every one that gets so far.
    """
    with world_of(scene) as world, tempfile.NamedTemporaryFile("r", encoding="ascii") as log:
        status = attached(
            lambda: scene.run(world), ["-e", f"trace={','.join(FAULTS)}", "-e", "signal=none", "-o", log.name]
        )
        assert status == FINE
        # Of a call in which strace finds the child as it attaches it may print any name.
        made = collections.Counter(re.findall(r"^(\d+) +(\w+)\(", log.read(), re.M))
        most: collections.Counter[str] = collections.Counter()
        for (_tracee, name), count in made.items():
            if name in FAULTS:
                most[name] = max(most[name], count)
        return most


def faults(name: str) -> Iterator[tuple[str, str, int, str]]:
    """Yield every fault of a scene: the scene, the call, which one of these, the error."""
    for call, count in sorted(count_calls(SCENES[name]).items()):
        for number in range(1, count + 1):
            for fault in FAULTS[call]:
                yield name, call, number, fault


def kills(name: str) -> Iterator[tuple[str, str, int, str]]:
    """Yield every place at which a scene is killed, as a fault."""
    for call, count in sorted(count_calls(SCENES[name]).items()):
        if call in _KILLED_AT:
            yield from ((name, call, number, KILL) for number in range(1, count + 1))


def inject(name: str, call: str, number: int, fault: str) -> str | None:
    """Inject one error, or kill. Returns what is wrong, or None."""
    scene = SCENES[name]
    with world_of(scene) as world, tempfile.NamedTemporaryFile("r", encoding="utf-8") as said:
        options = ["-o", os.devnull, "-e", "signal=none", "-e", f"trace={call}"]
        what = f"signal={KILL}" if fault == KILL else f"error={fault}"
        options += ["-e", f"inject={call}:{what}:when={number}"]
        try:
            status = attached(lambda: run(scene, world, said.name), options)
        except subprocess.TimeoutExpired:
            return "it hangs"
        if status not in (FINE, REFUSED) and (fault, status) != (KILL, -signal.SIGKILL):
            return said.read() or f"it ended with {status}"
        if name == "swap":
            return None
        try:
            world.check(frozenset())
        except (AssertionError, errors.ImageCacheError, OSError, KeyError):
            outcome = "it went well" if status == FINE else "it was refused"
            return f"afterwards ({outcome}):\n{traceback.format_exc()}"
    return None


def run(scene: Scene, world: World, said: str) -> NoReturn:
    """Make a scene's call, and end this process, a child, with how it went.

    :param said: the path of a file that gets what is wrong.
    """
    status = FINE
    try:
        scene.run(world)
    except ic.ImageCacheError:
        status = REFUSED
    except BaseException:
        pathlib.Path(said).write_text(f"not one of the library's errors:\n{traceback.format_exc()}")
        os._exit(_RAW)
    if left := open_below(world.instances):
        pathlib.Path(said).write_text(f"descriptors stay open: {left}")
        os._exit(_LEAKED)
    os._exit(status)


def open_below(directory: pathlib.Path) -> list[str]:
    """Return the files below a directory that this process has open."""
    found = []
    try:
        entries = os.listdir("/proc/self/fd")
    except OSError:  # the error was injected here
        entries = os.listdir("/proc/self/fd")
    for entry in entries:
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [path for path in found if path.startswith(f"{directory}/")]


@contextlib.contextmanager
def world_of(scene: Scene) -> Iterator[World]:
    """Give a world in which a scene is prepared, in memory."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="imagecache-", dir="/dev/shm"))
    try:
        world = World(directory, **scene.options)
        scene.prepare(world)
        yield world
    finally:
        shutil.rmtree(directory)


def warm_up(name: str) -> None:
    """Let everything be imported that an operation imports: an import that fails is none of the library's."""
    scene = SCENES[name]
    with world_of(scene) as world:
        scene.run(world)


def chosen(count: int, chance: random.Random, *, killed: bool = False) -> list[tuple[str, str, int, str]]:
    """Return so many faults at random, of a few scenes.

    :param killed: kills, and no errors.
    """
    found = []
    for name in chance.sample(sorted(SCENES), min(8, len(SCENES))):
        warm_up(name)
        every = list(kills(name) if killed else faults(name))
        found += chance.sample(every, min(len(every), count // 8))
    return found
