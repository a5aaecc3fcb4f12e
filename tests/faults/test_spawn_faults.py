# SPDX-License-Identifier: Apache-2.0
"""Disks that fail, filesystems that fill up, and SIGKILL at every call that changes them. As root."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.sources.file import FileImage, FileSource
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource
from tests.lab import filesystems
from tests.support import files, recorded_calls
from tests.support.cache_case import ID, raw_image

NAME = layout.base_name(ID)
MIB = 2**20
DATA = raw_image(1)

#: What a spawn in a child ends with that the library refused.
REFUSED = 3


@pytest.fixture
def image(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "image"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def instances(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "instances"
    (path / "instance").mkdir(parents=True)
    return path


@pytest.fixture
def full_ext4(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    with filesystems.loop_mounted(tmp_path, 64 * MIB, ["mkfs.ext4", "-q", "-m", "0"]) as mount_point:
        yield mount_point


def prepare(instances: pathlib.Path) -> None:
    """Make the cache's directories."""
    manager_for(instances).unpin("x", owner="x")


def spawn(instances: pathlib.Path, image: pathlib.Path, if_exists: str = "error") -> None:
    """Make a disk from an image in a file."""
    digest = ic.Digest("sha512", hashlib.sha512(image.read_bytes()).hexdigest())
    source = FileSource({ID: FileImage(str(image), "raw", digest)})
    manager_for(instances, source).create_disk(ID, str(instances / "instance" / "disk"), if_exists=if_exists)


def spawn_in_child(
    instances: pathlib.Path, image: pathlib.Path, *injected: str, if_exists: str = "error"
) -> tuple[int, str]:
    """Spawn in a forked child, with faults injected into its system calls.

    Returns how it ended, as :func:`os.waitstatus_to_exitcode` has it, and what it said if it was refused.
    """
    said = image.with_name("said")
    said.write_text("")

    def child() -> None:
        try:
            spawn(instances, image, if_exists)
        except ic.ImageCacheError as error:
            said.write_text(f"{type(error).__name__}: {error}")
            os._exit(REFUSED)

    ended = recorded_calls.attached(child, ["-o", os.devnull, "-e", "signal=none", *injected])
    return ended, said.read_text()


def manager_for(
    instances: pathlib.Path, source: ImageSource | None = None, **options: Any
) -> ic.ImageCacheManager:
    config = ic.CacheConfig(instances_path=str(instances), num_retries=0, **options)
    return ic.ImageCacheManager(config, source or FakeSource({ID: DATA}), observers=())


def files_in(path: pathlib.Path) -> dict[str, int]:
    """Return every file's path and inode, but lock files, our registration and the history of failures."""
    found: dict[str, int] = {}
    for parent, _directories, names in os.walk(path):
        if os.path.basename(parent) not in ("history", "hosts", "locks"):
            paths = [os.path.join(parent, name) for name in names]
            found |= {path: os.lstat(path).st_ino for path in paths}
    return found


def content_of(disk: pathlib.Path) -> bytes:
    flat = disk.with_suffix(".flat")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, flat], check=True)
    data = flat.read_bytes()
    flat.unlink()
    return data


def test_a_spawn_that_fails_leaves_no_disk_whatever_becomes_of_disk_info(
    instances: pathlib.Path, image: pathlib.Path
) -> None:
    prepare(instances)
    directory, codes = instances / "instance", []
    for number in range(1, 5):
        (directory / "disk.info").write_text("{}")
        inject = f"inject=openat:error=EIO:when={number}"
        faults = ("-P", str(directory / "disk.info"), "-e", "trace=openat", "-e", inject)
        ended, said = spawn_in_child(instances, image, *faults)
        codes.append(ended)
        assert (directory / "disk").exists() == (ended == 0), (number, said)
        for name in ("disk", "disk.info"):
            (directory / name).unlink(missing_ok=True)
    # While a draft is made, which may fail; before the disk has its name; and twice after that.
    assert codes == [0, REFUSED, 0, 0]


def test_each_fsync_that_fails_is_an_error_and_nothing_unproven_is_published(
    instances: pathlib.Path, image: pathlib.Path
) -> None:
    prepare(instances)
    before = files_in(instances)
    failed = 0
    for number in range(1, 40):
        inject = f"inject=fsync:error=EIO:when={number}"
        ended, said = spawn_in_child(instances, image, "-e", "trace=fsync", "-e", inject)
        if ended == 0:
            break
        failed += 1
        assert ended == REFUSED, ended
        assert said.startswith("BackendError: "), said
        assert ID in said and "Input/output error" in said
        assert not (instances / "instance" / "disk").exists()
        base = instances / "_base" / NAME
        if base.exists():
            # Only what came after the name failed; the data was durable before.
            assert base.read_bytes() == DATA
        else:
            assert files_in(instances) == before
        # The next spawn works, from the evidence that is there, and leaves nothing else.
        spawn(instances, image)
        assert content_of(instances / "instance" / "disk") == DATA
        records = instances / "_base" / ".imagecache" / "records"
        assert json.loads((records / f"{NAME}.json").read_bytes())["origin"] == "fetched", number
        (instances / "instance" / "disk").unlink()
        (instances / "instance" / "disk.info").unlink()
        for stage in (instances / "_base" / ".imagecache" / "stage").iterdir():
            stage.unlink()
        base.unlink()
        for record in records.iterdir():
            record.unlink()
    else:
        raise AssertionError("it never came to the end")
    assert failed >= 7  # data, its checksums and record-to-be, directory, checksums, record, disk.info


def test_a_base_whose_data_could_not_be_synced_never_gets_its_name(
    instances: pathlib.Path, image: pathlib.Path
) -> None:
    prepare(instances)
    fault = ("-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1")
    ended, _said = spawn_in_child(instances, image, *fault)
    assert ended == REFUSED
    assert not (instances / "_base" / NAME).exists()
    assert os.listdir(instances / "_base" / ".imagecache" / "stage") == []


def test_reuse_where_a_look_at_the_base_fails_ends_with_the_librarys_error_or_well(
    instances: pathlib.Path, image: pathlib.Path
) -> None:
    spawn(instances, image)
    for number in range(1, 7):
        faults = ("-P", str(instances / "_base" / NAME), "-e", "trace=newfstatat")
        inject = f"inject=newfstatat:error=EIO:when={number}"
        ended, _said = spawn_in_child(instances, image, *faults, "-e", inject, if_exists="reuse")
        assert ended in (0, REFUSED), number
    assert content_of(instances / "instance" / "disk") == DATA


@pytest.mark.parametrize(("call", "least"), [("linkat", 2), ("rename", 4), ("unlink", 3), ("fsync", 7)])
def test_sigkill_at_every_call_that_changes_something(
    instances: pathlib.Path, image: pathlib.Path, call: str, least: int
) -> None:
    """Whatever was done last, the state is sound, the next spawn works, and nothing stays behind."""
    for number in range(1, 40):
        injected = ("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}")
        ended, said = spawn_in_child(instances, image, *injected)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, said
        base = instances / "_base" / NAME
        published = base.exists()
        assert not published or base.read_bytes() == DATA
        happened: list[events.Event] = []
        source = FakeSource({ID: DATA})
        config = ic.CacheConfig(instances_path=str(instances))
        manager = ic.ImageCacheManager(config, source, observers=(happened.append,))
        disk = instances / "instance" / "disk"
        manager.create_disk(ID, str(disk), if_exists="reuse")
        assert content_of(disk) == DATA, number
        assert source.opens == (0 if published else 1)
        assert not [event for event in happened if isinstance(event, events.Adopted)]
        files.age_tree(instances, seconds=2 * 3600)
        manager.verify_base_images([ic.Instance("instance", "here", images=(ID,))])
        private = instances / "_base" / ".imagecache"
        left = {path for path in map(pathlib.Path, files_in(instances)) if path.parent.name != "hosts"}
        made = {
            base,
            disk,
            disk.parent / "disk.info",
            private / "records" / f"{NAME}.json",
            private / "records" / f"{NAME}.sums",
        }
        assert left == {*made, private / "version"}, number
        assert base.stat().st_nlink == 1
        for path in made:
            path.unlink()
    else:
        raise AssertionError("it never came to the end")
    assert number > least


def test_a_full_filesystem_is_told_apart_and_life_goes_on_after_room_is_made(full_ext4: pathlib.Path) -> None:
    (full_ext4 / "instance").mkdir()
    fits = os.urandom(20 * MIB)
    source = FakeSource({ID: os.urandom(100 * MIB), "fits": fits}, sizes=False)
    manager = manager_for(full_ext4, source)
    manager.unpin("x", owner="x")  # makes the cache's directories
    before, free = files_in(full_ext4), os.statvfs(full_ext4).f_bavail
    target = str(full_ext4 / "instance" / "disk")
    for attempt in (manager.create_disk, manager.fetch_file):
        with pytest.raises(errors.NoSpaceError, match=ID):
            attempt(ID, target)
        assert files_in(full_ext4) == before
        assert os.statvfs(full_ext4).f_bavail >= free - 8
    # What does not fit beside what somebody else wrote meanwhile.
    blocker = full_ext4 / "blocker"
    blocker.write_bytes(os.urandom(45 * MIB))
    with pytest.raises(errors.NoSpaceError):
        manager.create_disk("fits", target)
    blocker.unlink()
    manager.create_disk("fits", target)
    assert content_of(pathlib.Path(target).rename(full_ext4 / "instance" / "renamed")) == fits


def test_a_filesystem_that_fills_up_under_the_fetch_ends_cleanly(full_ext4: pathlib.Path) -> None:
    (full_ext4 / "instance").mkdir()
    blocker = full_ext4 / "blocker"
    data = os.urandom(20 * MIB)

    def trace(point: str) -> None:
        if point == "ingest:reserved" and not blocker.exists():
            with blocker.open("wb") as file:
                try:
                    while file.write(bytes([1]) * MIB):
                        file.flush()
                except OSError:
                    pass

    config = ic.CacheConfig(instances_path=str(full_ext4), num_retries=0)
    manager = ic.ImageCacheManager(config, FakeSource({ID: data}), host=ic.System(trace=trace), observers=())
    target = full_ext4 / "instance" / "disk"
    with pytest.raises(errors.NoSpaceError, match=ID):
        manager.create_disk(ID, str(target))
    assert os.listdir(full_ext4 / "instance") == []
    assert os.listdir(full_ext4 / "_base" / ".imagecache" / "stage") == []
    assert not (full_ext4 / "_base" / NAME).exists()
    # Even with no block left at all, it is the space that is blamed.
    with pytest.raises(errors.NoSpaceError):
        manager_for(full_ext4).create_disk(ID, str(target))
    blocker.write_bytes(b"")
    manager.create_disk(ID, str(target))
    assert content_of(target) == data


def test_a_read_only_filesystem_is_told_apart_and_life_goes_on_after_it_is_writable(
    full_ext4: pathlib.Path,
) -> None:
    (full_ext4 / "instance").mkdir()
    target = str(full_ext4 / "instance" / "disk")
    started = manager_for(full_ext4)

    def attempts(manager: ic.ImageCacheManager, expected: type[errors.ImageCacheError]) -> None:
        for attempt in (manager.create_disk, manager.fetch_file):
            with pytest.raises(expected, match=str(full_ext4)) as caught:
                attempt(ID, target)
            assert caught.value.next_step
        assert not os.path.lexists(target)

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", full_ext4], check=True)

    remount("ro")
    attempts(started, errors.ConfigError)  # the cache's directories cannot be made
    remount("rw")
    started.cache_image(ID)
    before = files_in(full_ext4)
    remount("ro")
    attempts(manager_for(full_ext4), errors.ConfigError)
    attempts(started, errors.BackendError)  # it was writable when this one began, as when a disk fails
    remount("rw")
    assert files_in(full_ext4) == before
    started.create_disk(ID, target)
    assert content_of(pathlib.Path(target)) == DATA


def test_a_base_that_belongs_to_another_user_is_adopted_once(
    instances: pathlib.Path, image: pathlib.Path
) -> None:
    """libvirt gives bases to QEMU's user: an unprivileged service can neither mark nor touch them."""
    nobody = 65534
    base = instances / "_base" / NAME
    base.parent.mkdir()
    base.write_bytes(DATA)
    for path in (instances, instances / "instance", base.parent):
        os.chown(path, nobody, nobody)
    for parent in instances.parents:
        if parent.stat().st_uid == 0 and parent != pathlib.Path("/") and "pytest" in str(parent):
            parent.chmod(0o755)
    program = """
import json, os, sys
import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.testing.sources import FakeSource
data = open(sys.argv[2], "rb").read()
happened = []
source = FakeSource({sys.argv[3]: data})
config = ic.CacheConfig(instances_path=sys.argv[1])
manager = ic.ImageCacheManager(config, source, observers=(happened.append,))
os.setgid(65534)
os.setuid(65534)
for number in range(3):
    manager.create_disk(sys.argv[3], f"{sys.argv[1]}/instance/disk{number}")
print(json.dumps([source.opens, sum(isinstance(each, events.Adopted) for each in happened)]))
"""
    command = [sys.executable, "-c", program, str(instances), str(image), ID]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [0, 1]
    assert base.stat().st_uid == 0


def test_a_source_on_a_failing_disk_is_a_source_that_fails(
    instances: pathlib.Path, image: pathlib.Path
) -> None:
    manager = manager_for(instances, FileSource({ID: FileImage(image, "raw")}))
    image.unlink()
    with pytest.raises(errors.ImageNotFound):
        manager.create_disk(ID, str(instances / "instance" / "disk"))


@pytest.mark.parametrize(
    ("where", "call"),
    [
        pytest.param(f"_base/{NAME}", "fgetxattr", id="the base's attributes cannot be read"),
        pytest.param("instance/disk", "fsync", id="it is not known that the copy is durable"),
    ],
)
def test_a_disk_keeps_its_base_where_a_call_of_flatten_fails(
    instances: pathlib.Path, where: str, call: str
) -> None:
    config = ic.CacheConfig(instances_path=str(instances))
    manager = ic.ImageCacheManager(config, FakeSource({ID: DATA}), observers=())
    disk = manager.create_disk(ID, str(instances / "instance" / "disk"))

    def flatten() -> None:
        with pytest.raises(ic.BackendError):
            manager.flatten_disk(disk)

    failing = ["-o", os.devnull, "-P", str(instances / where), "-e", f"trace={call}"]
    assert recorded_calls.attached(flatten, [*failing, "-e", f"inject={call}:error=EIO"]) == 0
    assert manager.inspect_disk(disk.target).base == NAME
    assert manager.flatten_disk(disk).base is None


def test_a_disk_forgets_its_base_after_all_that_it_needs_of_it_is_durable(instances: pathlib.Path) -> None:
    config = ic.CacheConfig(instances_path=str(instances))
    manager = ic.ImageCacheManager(config, FakeSource({ID: DATA}), observers=())
    disk = manager.create_disk(ID, str(instances / "instance" / "disk"), size=32 * MIB)
    log = instances / "log"
    calls = [
        "-o",
        str(log),
        "-P",
        disk.target,
        "-e",
        "trace=pwrite64,pwritev,fdatasync,fsync",
        "-e",
        "signal=none",
    ]
    assert recorded_calls.attached(lambda: manager.flatten_disk(disk), calls) == 0
    began = [line for line in log.read_text().splitlines() if "resumed>" not in line]
    writes = [number for number, line in enumerate(began) if "pwrite" in line]
    forgets = max(number for number in writes if '"QFI' in began[number])
    assert forgets == writes[-1], began[forgets:]
    copied = writes[-2]
    assert any("sync(" in line for line in began[copied:forgets]), began[copied:]
    assert content_of(pathlib.Path(disk.target)) == DATA + bytes(32 * MIB - len(DATA))
