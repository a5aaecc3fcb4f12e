# SPDX-License-Identifier: Apache-2.0
"""Swap and ephemeral disks, made by the real mkswap and mkfs."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib.formats import superblock
from imagecache_lib.formats.superblock import Signature
from imagecache_lib.ingest import generation
from imagecache_lib.store import layout
from imagecache_lib.system import sparse
from imagecache_lib.testing.sources import FakeSource
from tests.support import files, needs

MIB, GIB = 2**20, 2**30
BLOCK = 65536
#: What Nova calls the base of every ephemeral disk of 1 GiB unless it is told otherwise.
NAME = "ephemeral_1_0706d66"
#: What earlier releases of this library called an ext4 base.
EARLIER = "ephemeral_1_40d1d2c"
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Place:
    """An instances directory with one instance in it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        (path / "vm").mkdir(parents=True)
        self.base = path / "_base"

    def manager(
        self, backend: str = "qcow2", host: ic.System | None = None, **options: Any
    ) -> ic.ImageCacheManager:
        config = ic.CacheConfig(instances_path=str(self.path), backend=backend, **options)
        return ic.ImageCacheManager(config, FakeSource({}), host=host)

    def target(self, name: str = "disk") -> str:
        return str(self.path / "vm" / name)

    def bases(self) -> list[str]:
        return sorted(path.name for path in self.base.iterdir() if not path.name.startswith("."))

    def staged(self) -> list[str]:
        return os.listdir(self.base / ".imagecache" / "stage")


@pytest.fixture
def place(tmp_path: pathlib.Path) -> Place:
    return Place(tmp_path / "instances")


def run(*command: str) -> str:
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": SBIN}
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def content(path: str | pathlib.Path) -> str:
    """Return a digest of a file's size and of its blocks that are not zeros: most are holes."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        found.update(b"%d" % os.fstat(file.fileno()).st_size)
        extents = sparse.data_extents(file.fileno())
        offsets = {each for start, end in extents for each in range(start // BLOCK * BLOCK, end, BLOCK)}
        for offset in sorted(offsets):
            block = os.pread(file.fileno(), BLOCK, offset)
            if block.strip(b"\0"):
                found.update(b"%d " % offset + block)
    return found.hexdigest()


def to_raw(disk: str) -> str:
    raw = disk + ".raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, raw)
    return raw


def seen_in(disk: ic.Disk) -> Signature | None:
    return seen(to_raw(disk.target) if disk.format == "qcow2" else disk.target)


def seen(path: str | pathlib.Path) -> Signature | None:
    with open(path, "rb") as file:
        return superblock.read(file.read(superblock.LENGTH))


def test_a_swap_disk_is_an_overlay_of_a_shared_base(place: Place) -> None:
    manager = place.manager()
    disk = manager.create_swap(place.target("disk.swap"), size_mb=64)
    assert (disk.format, disk.virtual_size, disk.base) == ("qcow2", 64 * MIB, "swap_64")
    assert seen(to_raw(disk.target)) == Signature("swap", 64 * MIB)
    assert "swap" in run("blkid", "-p", to_raw(disk.target))
    manager.create_swap(place.target("second"), size_mb=64)
    assert place.bases() == ["swap_64"]
    assert place.staged() == []


@pytest.mark.parametrize(("os_type", "fs"), [("linux", "ext4"), (None, "vfat"), ("linux", "ext3")])
def test_a_filesystem_is_named_checked_and_sound(place: Place, os_type: str | None, fs: str) -> None:
    manager = place.manager(default_ephemeral_format="ext3" if fs == "ext3" else None)
    disk = manager.create_ephemeral(place.target(), size_gb=1, os_type=os_type)
    assert disk.base == (layout.ephemeral_name(1, "ext3") if fs == "ext3" else NAME)
    found = seen(place.base / disk.base)
    assert found is not None
    assert (found.kind, found.label) == (fs, "ephemeral0")
    checker = ("fsck.vfat", "-n") if fs == "vfat" else ("e2fsck", "-f", "-n")
    run(*checker, to_raw(disk.target))


@pytest.mark.parametrize("kind", ["swap", "ext3", "ext4", "vfat"])
def test_shared_bases_are_the_same_on_every_host(tmp_path: pathlib.Path, kind: str) -> None:
    digests = set()
    # Another directory, another day, another mke2fs.conf: none of them may show.
    settings = tmp_path / "mke2fs.conf"
    settings.write_text("[defaults]\nbase_features = sparse_super\nblocksize = 1024\ninode_size = 128\n")
    for number, environment in enumerate(({}, {"MKE2FS_CONFIG": str(settings), "TZ": "Asia/Tokyo"})):

        def execute(*command: str, environment: Any = environment, **options: Any) -> tuple[str, str]:
            options["env_variables"] = {**options["env_variables"], **environment}
            return ic.System().execute(*command, **options)

        place = Place(tmp_path / str(number))
        manager = place.manager(
            host=ic.System(execute=execute), default_ephemeral_format=None if kind == "swap" else kind
        )
        if kind == "swap":
            disk = manager.create_swap(place.target(), size_mb=64)
        else:
            disk = manager.create_ephemeral(place.target(), size_gb=1)
        base = place.base / str(disk.base)
        digests.add(content(base))
        if kind.startswith("ext"):
            # Both were made within a second or two, so the dates would not differ by themselves.
            assert "Jan  1" in run("dumpe2fs", "-h", str(base)).partition("created:")[2].partition("\n")[0]
    assert len(digests) == 1


@pytest.mark.parametrize(
    "asked", [{"fs": "ext3"}, {"label": "ephemeral1"}, {"fs": "xfs"}, {"fs": "ntfs"}, {"fs": "ext2"}]
)
def test_what_has_no_name_of_its_own_is_made_in_place(place: Place, asked: dict[str, Any]) -> None:
    fs = asked.get("fs", "ext4")
    needs.program(f"mkfs.{fs}")
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type="linux", **asked)
    assert (disk.format, disk.base) == ("qcow2", None)
    found = seen_in(disk)
    assert found is not None
    assert found.kind == fs
    if fs != "ntfs":
        assert found.label == asked.get("label", "ephemeral0")
    assert place.bases() == []
    assert place.staged() == []


def test_two_disks_made_in_place_can_be_told_apart_by_their_guest(place: Place) -> None:
    manager = place.manager("raw")
    one = manager.create_ephemeral(place.target("one"), size_gb=1, os_type="linux", label="ephemeral0")
    two = manager.create_ephemeral(place.target("two"), size_gb=1, os_type="linux", label="ephemeral1")
    uuids = {run("blkid", "-p", "-o", "value", "-s", "UUID", disk.target) for disk in (one, two)}
    assert len(uuids) == 2


def test_raw_disks_share_nothing(place: Place) -> None:
    disk = place.manager("raw").create_swap(place.target(), size_mb=8)
    assert (disk.format, disk.base, place.bases()) == ("raw", None, [])
    assert seen(disk.target) == Signature("swap", 8 * MIB)


def test_the_operators_command_is_run_and_shared_with_nobody(place: Place) -> None:
    command = "linux=mkfs.ext4 -q -F -m 0 -L %(fs_label)s %(target)s"
    manager = place.manager(virt_mkfs=(command,))
    disk = manager.create_ephemeral(place.target(), size_gb=1, os_type="linux", label="mine")
    assert (disk.base, disk.format, place.bases()) == (None, "qcow2", [])
    found = seen_in(disk)
    assert found is not None
    assert (found.kind, found.label) == ("ext4", "mine")


@pytest.mark.parametrize(
    "command",
    [
        "default=mkfs.ext4 -X %(target)s",
        "default=true %(target)s",
        "default=/no/such/program %(target)s",
        "default=x %(nobody)s",
    ],
)
def test_a_command_that_makes_nothing_leaves_nothing(place: Place, command: str) -> None:
    with pytest.raises(ic.ImageCacheError) as caught:
        place.manager(virt_mkfs=(command,)).create_ephemeral(place.target(), size_gb=1)
    assert caught.value.next_step
    assert (os.listdir(place.path / "vm"), place.bases(), place.staged()) == ([], [], [])


def failing(program: str, *, silent: bool) -> ic.System:
    """A host on which one program ends without having done anything."""

    def execute(*command: str, **options: Any) -> tuple[str, str]:
        if program in command:
            command = (*command[: command.index(program)], "true" if silent else "false")
        return ic.System().execute(*command, **options)

    return ic.System(execute=execute)


def test_a_command_without_words_is_the_operators_to_correct(place: Place) -> None:
    with pytest.raises(ic.ConfigError, match="virt_mkfs"):
        place.manager(virt_mkfs=("default=  ",)).create_ephemeral(place.target(), size_gb=1)
    assert (os.listdir(place.path / "vm"), place.bases(), place.staged()) == ([], [], [])


def test_a_shutdown_ends_a_program_that_hangs(place: Place) -> None:
    command = place.path / "mkfs-that-hangs"
    begun = place.path / "begun"
    command.write_text(f"#!/bin/sh\n: > {begun}\nexec sleep 600\n")
    command.chmod(0o755)
    manager = place.manager(virt_mkfs=(f"default={command} %(target)s",))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(manager.create_ephemeral, place.target(), size_gb=1)
        while not begun.exists() and not running.done():
            time.sleep(0.01)
        manager.shutdown()
        with pytest.raises(ic.CancelledError):
            running.result(60)
    assert (os.listdir(place.path / "vm"), place.bases(), place.staged()) == ([], [], [])


def test_no_limit_is_asked_for_above_the_hard_one_of_the_service(place: Place) -> None:
    """Only a process with a privilege gets it."""
    script = f"""
import imagecache_lib as ic
from imagecache_lib.testing.sources import FakeSource

def execute(*command, **options):
    print(*command[:3])
    return ic.System().execute(*command, **options)

config = ic.CacheConfig(instances_path={str(place.path)!r})
manager = ic.ImageCacheManager(config, FakeSource({{}}), host=ic.System(execute=execute))
manager.create_swap({place.target()!r}, size_mb=16)
"""
    memory = 3 * 2**30
    limited = ("prlimit", "--cpu=600", f"--as={memory}", "--", sys.executable, "-c", script)
    said = subprocess.run(limited, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["prlimit", "--cpu=600", f"--as={memory}"]


@pytest.mark.parametrize("silent", [True, False])
def test_a_base_is_published_only_if_its_program_made_it(place: Place, silent: bool) -> None:
    broken = place.manager(host=failing("mkswap", silent=silent))
    with pytest.raises(ic.BackendError, match="mkswap"):
        broken.create_swap(place.target(), size_mb=16)
    assert (os.listdir(place.path / "vm"), place.bases(), place.staged()) == ([], [], [])
    assert place.manager().create_swap(place.target(), size_mb=16).base == "swap_16"


def test_a_size_that_cannot_be_is_refused(place: Place) -> None:
    for size in (0, -1):
        with pytest.raises(ic.BackendError):
            place.manager().create_swap(place.target(), size_mb=size)
        with pytest.raises(ic.BackendError):
            place.manager().create_ephemeral(place.target(), size_gb=size)
    with pytest.raises(ic.BackendError, match="use one of ext2"):
        place.manager().create_ephemeral(place.target(), size_gb=1, fs="befs")


def test_an_existing_target_is_kept(place: Place) -> None:
    pathlib.Path(place.target()).write_text("a guest's")
    with pytest.raises(ic.DiskExistsError):
        place.manager().create_swap(place.target(), size_mb=16)
    assert pathlib.Path(place.target()).read_text() == "a guest's"


def nova_made(place: Place, name: str, size: int, *command: str, days_old: int = 0) -> pathlib.Path:
    place.base.mkdir(exist_ok=True)
    path = place.base / name
    with open(path, "wb") as file:
        file.truncate(size)
    if command:
        run(needs.program(command[0]), *command[1:], str(path))
    when = os.stat(path).st_mtime - days_old * 86400
    os.utime(path, (when, when))
    return path


def test_a_base_that_nova_made_is_adopted(place: Place) -> None:
    path = nova_made(place, "swap_32", 32 * MIB, "mkswap")
    before = os.stat(path).st_ino
    assert place.manager().create_swap(place.target(), size_mb=32).base == "swap_32"
    assert os.stat(path).st_ino == before


@pytest.mark.parametrize("fs", ["ext4", "vfat"])
def test_half_a_copy_of_a_base_is_made_anew(place: Place, fs: str) -> None:
    manager = place.manager(default_ephemeral_format=fs)
    first = manager.create_ephemeral(place.target("first"), size_gb=1)
    name = first.base
    assert name is not None
    path, copy = place.base / name, place.base.parent / "copy"
    whole = content(path)
    os.unlink(first.target)
    for damaged in (False, True):
        run("cp", "--no-preserve=all", "--sparse=always", str(path), str(copy))
        if damaged:
            with open(copy, "r+b") as file:
                *_others, (_start, end) = sparse.data_extents(file.fileno())
                file.seek(end - BLOCK)
                file.write(bytes(BLOCK))
            assert content(copy) != whole
        path.unlink()
        copy.rename(path)
        files.age(path, seconds=2 * 86400)  # another program may still be making a younger one
        with open(path, "rb") as held:  # so that no other file gets its inode
            disk = place.manager(default_ephemeral_format=fs).create_ephemeral(
                place.target("next"), size_gb=1
            )
            assert disk.base == name
            assert content(path) == whole
            assert os.path.samestat(path.stat(), os.fstat(held.fileno())) is not damaged
        os.unlink(disk.target)


def test_a_base_that_a_crash_left_unformatted_is_made_anew(place: Place) -> None:
    nova_made(place, "swap_32", 32 * MIB, days_old=2)
    disk = place.manager().create_swap(place.target(), size_mb=32)
    assert disk.base == "swap_32"
    assert seen(place.base / "swap_32") == Signature("swap", 32 * MIB)


def test_an_unformatted_base_in_use_is_passed_by(place: Place) -> None:
    path = nova_made(place, "swap_32", 32 * MIB, days_old=2)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(path), "-F", "raw", place.target("old"))
    before = content(path)
    disk = place.manager().create_swap(place.target(), size_mb=32)
    assert (disk.base, disk.format) == (None, "qcow2")
    assert seen_in(disk) == Signature("swap", 32 * MIB)
    assert content(path) == before


@pytest.mark.parametrize("size", [GIB // 2, 2 * GIB])
def test_a_base_of_another_size_than_its_name_says_is_made_anew(place: Place, size: int) -> None:
    nova_made(place, NAME, size, "mkfs.ext4", "-q", "-F", "-L", "ephemeral0", days_old=2)
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type="linux")
    found = seen(place.base / NAME)
    assert disk.base == NAME
    assert found is not None
    assert (found.kind, found.label, found.size) == ("ext4", "ephemeral0", GIB)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(
    "there",
    [
        ("mkfs.vfat", "-F", "32", "-n", "ephemeral0"),
        ("mkfs.ext3", "-q", "-F", "-L", "ephemeral0"),
        ("mkfs.ext4", "-q", "-F", "-L", "ephemeral1"),
        ("mkfs.xfs", "-q", "-L", "ephemeral0"),
    ],
)
def test_a_base_with_another_filesystem_stays_and_the_disk_gets_its_own(
    place: Place, there: tuple[str, ...], used: bool, known: bool
) -> None:
    base = nova_made(place, NAME, GIB, *there, days_old=2)
    if known:  # from an earlier use, with a record
        fs = there[0].removeprefix("mkfs.")
        place.manager().create_ephemeral(place.target("known"), size_gb=1, fs=fs, label=there[-1])
    if used:
        overlay(place, str(base), name="user")
    before = content(base)
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type="linux")
    assert (disk.base, disk.format) == (None, "qcow2")
    assert seen_in(disk) == Signature("ext4", GIB, "ephemeral0")
    assert (content(base), place.staged()) == (before, [])


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        (("mkfs.xfs", "-q", "-L", "ephemeral0"), {"fs": "xfs"}),
        (("mkfs.ext3", "-q", "-F", "-L", "ephemeral0"), {"fs": "ext3"}),
        (("mkfs.vfat", "-F", "32", "-n", "ephemeral0"), {"os_type": "solaris"}),
    ],
)
def test_a_base_that_is_there_serves_whoever_wants_its_filesystem(
    place: Place, there: tuple[str, ...], asked: dict[str, Any]
) -> None:
    base = nova_made(place, NAME, GIB, *there)
    before = content(base)
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, **asked)
    assert (disk.base, disk.format, content(base)) == (NAME, "qcow2", before)


def test_a_second_ephemeral_disk_stands_alone(place: Place) -> None:
    base = nova_made(place, NAME, GIB, "mkfs.ext4", "-q", "-F", "-L", "ephemeral1")
    before = content(base)
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type="linux", label="ephemeral1")
    assert (disk.base, disk.format, content(base)) == (None, "qcow2", before)
    assert seen_in(disk) == Signature("ext4", GIB, "ephemeral1")


def test_two_filesystems_at_once_share_a_name_and_no_base(place: Place) -> None:
    manager, made = place.manager(), {}

    def make(number: int) -> None:
        os_type = "linux" if number % 2 else None
        made[number] = manager.create_ephemeral(place.target(str(number)), size_gb=1, os_type=os_type)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {number: seen_in(disk) for number, disk in made.items()}
    assert [signature.kind for number, signature in sorted(found.items()) if signature] == [
        "vfat",
        "ext4",
    ] * 3
    assert place.bases() == [NAME]


def test_many_at_once_make_one_base(place: Place) -> None:
    manager, made = place.manager(), []

    def make(number: int) -> None:
        made.append(manager.create_swap(place.target(str(number)), size_mb=16))

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {disk.base for disk in made} == {"swap_16"}
    assert len(made) == 8


def test_a_full_filesystem_is_said_and_leaves_nothing(place: Place) -> None:
    with pytest.raises(ic.NoSpaceError):
        place.manager(free_space_low=2**60).create_ephemeral(place.target(), size_gb=1)
    assert (place.bases(), place.staged()) == ([], [])


def test_an_unused_one_is_evicted_and_a_used_one_stays(place: Place) -> None:
    manager = place.manager(remove_unused_original_minimum_age_seconds=0)
    disk = manager.create_swap(place.target(), size_mb=16)
    assert manager.verify_base_images([]).evicted == ()
    manager.remove_disk(disk)
    assert [base.name for base in manager.verify_base_images([]).evicted] == ["swap_16"]


def test_the_label_of_the_first_disk_is_the_shared_one() -> None:
    assert generation.LABEL == "ephemeral0"


def arrive(disk: ic.Disk, here: Place, there: Place) -> str:
    """Move an overlay to another host, whose cache has the same path, and is empty."""
    shutil.rmtree(here.base)
    moved = there.target(os.path.basename(disk.target))
    shutil.move(disk.target, moved)
    return moved


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("swap", {}),
        ("ext4", {"os_type": "linux"}),
        ("ext4", {"fs": "ext4", "label": "ephemeral0"}),
        ("vfat", {"os_type": "solaris"}),
        ("vfat", {"fs": "vfat"}),
    ],
)
def test_the_base_of_an_overlay_that_arrives_is_made_as_it_was(
    place: Place, kind: str, told: dict[str, Any]
) -> None:
    first = place.manager()
    if kind == "swap":
        disk = first.create_swap(place.target(), size_mb=64)
    else:
        disk = first.create_ephemeral(place.target(), size_gb=1, os_type="linux" if kind == "ext4" else None)
    before = content(to_raw(disk.target))
    moved = arrive(first.resize_disk(disk, 2 * GIB), place, place)
    base = place.manager().ensure_backing(moved, **told)
    assert base is not None
    assert (base.name, base.format, place.bases()) == (disk.base, "raw", [disk.base])
    run("qemu-img", "resize", "--shrink", "-q", "-f", "qcow2", moved, str(disk.virtual_size))
    assert content(to_raw(moved)) == before


def overlay(
    place: Place, backing: str, *, size: str = "1G", backing_format: str = "raw", name: str = "disk"
) -> str:
    path = place.target(name)
    command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", backing_format, "-b", backing, path]
    run(*command, size)
    return path


@pytest.mark.parametrize(
    ("name", "backing_format"),
    [
        ("swap_0", "raw"),
        ("swap_2048", "raw"),
        ("ephemeral_2_40d1d2c", "raw"),
        ("swap_64", "qcow2"),
        ("../swap_64", "raw"),
        ("swap_64x", "raw"),
        (hashlib.sha1(b"image").hexdigest(), "raw"),
    ],
)
def test_nothing_is_made_for_a_header_that_this_library_would_not_write(
    place: Place, name: str, backing_format: str
) -> None:
    disk = overlay(place, f"{place.base}/{name}", backing_format=backing_format)
    with pytest.raises(ic.BackendError) as caught:
        place.manager().ensure_backing(disk)
    assert caught.value.next_step
    assert not place.base.exists() or place.bases() == []


def test_an_image_cannot_name_a_generated_base_as_its_own(place: Place) -> None:
    disk = overlay(place, f"{place.base}/swap_64")
    with pytest.raises(ic.BackendError, match="not this image's base"):
        place.manager().ensure_backing(disk, image_id="image")


def test_what_only_its_maker_can_make_is_checked_and_never_made(place: Place) -> None:
    disk = overlay(place, f"{place.base}/ephemeral_1_fedcba9")
    with pytest.raises(ic.BackendError, match="nothing tells which filesystem"):
        place.manager().ensure_backing(disk)
    assert place.bases() == []
    nova_made(place, "ephemeral_1_fedcba9", GIB, "mkfs.xfs", "-q")
    base = place.manager().ensure_backing(disk)
    assert base is not None
    assert base.name == "ephemeral_1_fedcba9"


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        ({}, "nothing tells which filesystem it had"),
        ({"os_type": "windows"}, "no two hosts make ntfs alike"),
        ({"fs": "xfs"}, "no two hosts make xfs alike"),
        ({"os_type": "linux", "label": "ephemeral1"}, "its label is 'ephemeral1'"),
        ({"fs": "befs"}, "cannot have the filesystem 'befs'"),
    ],
)
def test_what_cannot_be_told_or_made_is_refused_with_what_to_do(
    place: Place, told: dict[str, Any], cause: str
) -> None:
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type="linux")
    moved = arrive(disk, place, place)
    with pytest.raises(ic.BackendError, match=cause) as caught:
        place.manager().ensure_backing(moved, **told)
    assert caught.value.next_step
    assert place.bases() == []


def test_an_operators_command_is_not_taken_to_make_the_same_again(place: Place) -> None:
    disk = overlay(place, f"{place.base}/ephemeral_1_fedcba9")
    manager = place.manager(virt_mkfs=("linux=mkfs.ext4 -q -F %(target)s",))
    with pytest.raises(ic.BackendError, match="an operator's command made it"):
        manager.ensure_backing(disk, os_type="linux")
    assert place.bases() == []


@pytest.mark.parametrize("told", [{}, {"os_type": "linux"}])
def test_the_filesystem_that_nova_made_is_not_made_anew_under_its_guests_writes(
    place: Place, told: dict[str, Any]
) -> None:
    base = nova_made(place, NAME, GIB, "mkfs.ext4", "-q", "-F", "-L", "ephemeral0")
    disk = overlay(place, str(base))
    mounted(disk, base)
    assert place.manager().ensure_backing(disk, **told) is not None
    before = content(disk)
    base.unlink()
    with pytest.raises(ic.BackendError, match="another host's"):
        place.manager().ensure_backing(disk, **told)
    assert (place.bases(), content(disk)) == ([], before)


@pytest.mark.parametrize("os_type", ["linux", None])
def test_an_overlay_that_was_mounted_tells_which_base_it_needs(place: Place, os_type: str | None) -> None:
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type=os_type)
    mounted(disk.target, place.base / NAME)
    before = content(place.base / NAME)
    moved = arrive(disk, place, place)
    assert place.manager().ensure_backing(moved) is not None
    assert content(place.base / NAME) == before


def test_an_overlay_is_not_put_on_another_filesystem_of_its_bases_name(place: Place) -> None:
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type="linux")
    mounted(disk.target, place.base / NAME)
    shutil.copy(disk.target, copy := place.target("untold"))
    (place.base / NAME).unlink()
    nova_made(place, NAME, GIB, "mkfs.vfat", "-F", "32", "-n", "ephemeral0", days_old=2)
    before = content(place.base / NAME)
    tries: tuple[dict[str, Any], ...] = ({}, {"os_type": "linux"}, {"fs": "ext4"})
    for told in tries:
        with pytest.raises(ic.BackendError, match="it is vfat and not ext4") as caught:
            place.manager().ensure_backing(copy, **told)
        assert caught.value.next_step
    with pytest.raises(ic.BackendError, match="it holds ext4"):
        place.manager().ensure_backing(copy, os_type="solaris")
    assert content(place.base / NAME) == before


def test_nothing_is_made_under_an_overlay_that_shows_another_filesystem(place: Place) -> None:
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type="linux")
    mounted(disk.target, place.base / NAME)
    moved = arrive(disk, place, place)
    tries: tuple[dict[str, Any], ...] = ({"os_type": "solaris"}, {"fs": "vfat"})
    for told in tries:
        with pytest.raises(ic.BackendError, match="it holds ext4 with the label 'ephemeral0'"):
            place.manager().ensure_backing(moved, **told)
    assert place.bases() == []


def test_a_guest_that_made_another_filesystem_with_the_same_label_is_believed_when_told(place: Place) -> None:
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type="linux")
    own = nova_made(place, "own", GIB, "mkfs.ext3", "-q", "-F", "-L", "ephemeral0")
    mounted(disk.target, own)
    with pytest.raises(ic.BackendError, match="it is ext4 and not ext3"):
        place.manager().ensure_backing(disk.target)
    assert place.manager().ensure_backing(disk.target, fs="ext4") is not None


@pytest.mark.parametrize("fs", ["ext4", "ext3"])
def test_an_overlay_on_a_name_of_an_earlier_release_goes_on_working(place: Place, fs: str) -> None:
    first = place.manager(default_ephemeral_format=fs)  # where that name is made to this day
    disk = first.create_ephemeral(place.target(), size_gb=1)
    assert disk.base == layout.ephemeral_name(1, fs) != NAME
    before = content(to_raw(disk.target))
    assert place.manager().ensure_backing(disk.target) is not None
    moved = arrive(disk, place, place)
    for manager in (place.manager(), place.manager(default_ephemeral_format="xfs")):
        assert manager.ensure_backing(moved) is not None
        assert content(to_raw(moved)) == before
        (place.base / str(disk.base)).unlink()
    report = place.manager().verify_base_images([])
    assert report.problems == ()


def test_guests_writes_without_a_superblock_are_put_on_no_base_that_a_name_suggests(place: Place) -> None:
    base = nova_made(place, EARLIER, GIB)
    disk = overlay(place, str(base))
    run("qemu-io", "-f", "qcow2", "-c", "write -q 512M 64k", disk)
    base.unlink()
    with pytest.raises(ic.BackendError, match="nothing tells which filesystem"):
        place.manager().ensure_backing(disk)
    assert place.manager().ensure_backing(disk, os_type="linux") is not None


def test_the_identities_of_shared_filesystems_are_known(place: Place) -> None:
    for kind, identity in generation.IDENTITIES.items():
        manager = place.manager(default_ephemeral_format=kind)
        disk = manager.create_ephemeral(place.target(kind), size_gb=1)
        found = seen(place.base / str(disk.base))
        assert found is not None
        assert (found.kind, found.identity) == (kind, identity)


def test_a_raw_disk_stands_alone_whatever_its_guest_wrote_into_it(place: Place) -> None:
    manager = place.manager("raw")
    disk = manager.create_swap(place.target(), size_mb=64)
    forged = overlay(Place(place.path / "forger"), f"{place.base}/swap_8")
    with open(disk.target, "r+b") as file:
        file.write(pathlib.Path(forged).read_bytes())
    assert place.manager().ensure_backing(disk.target) is None
    assert place.manager().inspect_disk(disk.target).format == "raw"
    assert place.bases() == []


def mounted(disk: str, base: pathlib.Path) -> None:
    """Have the superblock written into the overlay, as mounting it would."""
    data = base.parent.parent / "superblock"
    with base.open("rb") as file:
        data.write_bytes(file.read(65536))
    run("qemu-io", "-f", "qcow2", "-c", f"write -q -s {data} 0 65536", disk)


@pytest.mark.parametrize("os_type", ["linux", None])
def test_a_disk_that_was_made_on_another_base_of_the_name_is_refused(
    place: Place, os_type: str | None
) -> None:
    program = ("mkfs.ext4", "-q", "-F", "-L") if os_type else ("mkfs.vfat", "-F", "32", "-n")
    other = nova_made(place, NAME, GIB, *program, "ephemeral0")
    disk = overlay(place, str(other))
    shutil.copy(disk, untouched := place.target("untouched"))
    mounted(disk, other)
    assert place.manager().ensure_backing(disk) is not None
    other.unlink()
    # Nothing of a filesystem is in it yet: it takes the one that is here.
    assert place.manager().ensure_backing(untouched, fs="ext4" if os_type else "vfat") is not None
    with pytest.raises(ic.BackendError, match="another host's base"):
        place.manager().ensure_backing(disk)


def test_a_disk_that_was_used_on_the_shared_base_goes_on_where_that_is_made_anew(place: Place) -> None:
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type="linux")
    mounted(disk.target, place.base / NAME)
    moved = arrive(disk, place, place)
    assert place.manager().ensure_backing(moved) is not None


def test_a_guest_may_have_made_another_filesystem(place: Place) -> None:
    disk = place.manager().create_ephemeral(place.target(), size_gb=1, os_type="linux")
    own = nova_made(place, "own", GIB, "mkfs.ext4", "-q", "-F", "-L", "data")
    mounted(disk.target, own)
    assert place.manager().ensure_backing(disk.target) is not None
