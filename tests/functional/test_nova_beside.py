# SPDX-License-Identifier: Apache-2.0
"""Nova's own image cache and this library over one directory: names, formats, and Nova's pass."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import time
from typing import Any

import pytest
from oslo_concurrency import lockutils

import imagecache_lib as ic
from imagecache_lib.formats import superblock
from imagecache_lib.ingest import generation
from imagecache_lib.system import holders, locks
from imagecache_lib.testing.sources import FakeSource
from tests.lab.nova import Nova

UUID = "6d1a3a0e-0000-4000-8000-000000000001"
OTHER_UUID = "6d1a3a0e-0000-4000-8000-000000000002"
DAY = 86400
NAME = "ephemeral_1_0706d66"
OS_TYPES = ("linux", "windows", "solaris", None)
MKFS = "mkfs.ext4 -q -F -L %(fs_label)s %(target)s"


@pytest.fixture
def instances(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "instances"
    for name in ("_base", "locks", UUID, OTHER_UUID):
        (path / name).mkdir(parents=True)
    return path


def manager_for(instances: pathlib.Path, **options: Any) -> ic.ImageCacheManager:
    config = ic.CacheConfig(instances_path=str(instances), **options)
    source = FakeSource({"image": os.urandom(2**20), "kernel": b"kernel" * 100})
    return ic.ImageCacheManager(config, source, host=ic.System(name="here"))


def grow_old(path: pathlib.Path) -> None:
    for base in path.iterdir():
        os.utime(base, (time.time() - 2 * DAY,) * 2)


def filesystem_of(path: str) -> str | None:
    flat = f"{path}.flat"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, flat], check=True)
    with open(flat, "rb") as file:
        found = superblock.read(file.read(superblock.LENGTH))
    os.unlink(flat)
    return found.kind if found is not None else None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"default_ephemeral_format": "ext4"},
        {"default_ephemeral_format": "xfs"},
        {"virt_mkfs": [f"linux={MKFS}"]},
        {"virt_mkfs": [f"default={MKFS}"], "default_ephemeral_format": "ext3"},
        {"virt_mkfs": ["linux=", f"default={MKFS}"]},
        {"virt_mkfs": [f"linux={MKFS}", "windows=mkfs.ntfs %(target)s"]},
    ],
)
def test_ephemeral_bases_have_the_names_that_nova_gives_them(
    instances: pathlib.Path, options: dict[str, Any]
) -> None:
    nova = Nova(instances, **options)
    config = ic.CacheConfig(
        instances_path=str(instances),
        default_ephemeral_format=options.get("default_ephemeral_format"),
        virt_mkfs=tuple(options.get("virt_mkfs", ())),
    )
    ours = [generation.ephemeral_name(1, os_type, config) for os_type in OS_TYPES]
    assert ours == nova.call("names", os_types=OS_TYPES)


@pytest.mark.parametrize("os_type", OS_TYPES)
def test_novas_pass_removes_nothing_that_a_disk_of_ours_needs(
    instances: pathlib.Path, os_type: str | None
) -> None:
    manager = manager_for(instances)
    manager.create_disk("image", str(instances / UUID / "disk"))
    manager.create_swap(str(instances / UUID / "disk.swap"), size_mb=8)
    disks = [
        manager.create_ephemeral(
            str(instances / UUID / f"disk.eph{number}"),
            size_gb=1,
            os_type=os_type,
            label=f"ephemeral{number}",
        )
        for number in range(2)
    ]
    grow_old(instances / "_base")
    nova = Nova(instances)
    own = {"uuid": UUID, "os_type": os_type, "image_ref": "image", "ephemerals": [1, 1], "swap_mb": 8}
    left = nova.call("run_pass", instances=[own])
    needed = {disk.base for disk in disks if disk.base} | {"swap_8", ic.store.layout.base_name("image")}
    assert needed <= set(left)
    for path in (instances / UUID).glob("disk*"):
        if path.name != "disk.info":
            subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
    # And without the instance all of it goes, so that nothing stays for ever.
    grow_old(instances / "_base")
    (instances / UUID).rename(instances.parent / "gone")
    assert nova.call("run_pass", instances=[]) == [".imagecache"]


def test_every_disk_of_the_qcow2_backend_is_what_nova_takes_it_for(instances: pathlib.Path) -> None:
    manager = manager_for(instances)
    target = (str(instances / UUID / f"disk{number}") for number in itertools.count())
    manager.fetch_file("image", next(target))  # now a disk has to go around the base
    disks = [
        manager.create_disk("image", next(target)),
        manager.create_swap(next(target), size_mb=8),
        manager.create_ephemeral(next(target), size_gb=1, os_type="linux"),
        manager.create_ephemeral(next(target), size_gb=1, os_type="linux", label="ephemeral1"),
        manager.create_ephemeral(next(target), size_gb=1, os_type=None),
        manager.create_ephemeral(next(target), size_gb=1, fs="xfs"),
        manager.create_ephemeral(next(target), size_gb=1, fs="ext2"),
    ]
    found = Nova(instances).call("formats", paths=[disk.target for disk in disks])
    assert found == [disk.format for disk in disks] == ["qcow2"] * len(disks)


@pytest.mark.parametrize(
    ("os_type", "guest_format", "kind"),
    [("linux", None, "ext4"), (None, None, "vfat"), (None, "ext3", "ext3"), ("linux", "xfs", "xfs")],
)
def test_a_base_that_nova_made_serves_whoever_wants_its_filesystem(
    instances: pathlib.Path, os_type: str | None, guest_format: str | None, kind: str
) -> None:
    made = Nova(instances).call(
        "make_ephemeral", uuid=UUID, number=0, size_gb=1, os_type=os_type, guest_format=guest_format
    )
    assert filesystem_of(made) == kind
    manager = manager_for(instances)
    same = manager.create_ephemeral(str(instances / OTHER_UUID / "same"), size_gb=1, fs=kind)
    assert (same.base, filesystem_of(same.target)) == (NAME, kind)
    other = "vfat" if kind == "ext4" else "ext4"
    different = manager.create_ephemeral(str(instances / OTHER_UUID / "other"), size_gb=1, fs=other)
    assert (different.base, different.format, filesystem_of(different.target)) == (None, "qcow2", other)
    assert manager.ensure_backing(made, fs=kind) is not None
    assert manager.ensure_backing(made) is not None


def test_a_long_lease_neither_stops_novas_pass_nor_loses_its_base_to_it(instances: pathlib.Path) -> None:
    # Nova's pass has the same minimum age: the base must be touched in time.
    manager = manager_for(instances, remove_unused_resized_minimum_age_seconds=1)
    with manager.fetch_or_reuse("image") as base:
        path = instances / "_base" / base.name
        grow_old(instances / "_base")
        until = time.monotonic() + 60
        while path.stat().st_mtime < time.time() - DAY:
            assert time.monotonic() < until, "nothing touches the base"
            time.sleep(0.05)
        # It ends, and that while the lease goes on.
        assert base.name in Nova(instances).call("run_pass", instances=[])
    grow_old(instances / "_base")
    assert base.name not in Nova(instances).call("run_pass", instances=[])


def test_nova_locks_what_this_process_leases(instances: pathlib.Path) -> None:
    """Nova's code in a driver of this process, by the library that Nova locks with."""
    with (
        manager_for(instances).fetch_or_reuse("image") as base,
        lockutils.external_lock(base.name, lock_file_prefix="nova", lock_path=str(instances / "locks")),
    ):
        with open(base.path, "rb") as looker:
            assert holders.is_leased(looker.fileno())
        with locks.without_waiting(f"{instances}/locks/nova-{base.name}", host=ic.System()) as got:
            assert not got


def test_nova_makes_its_next_disk_from_a_base_of_ours(instances: pathlib.Path) -> None:
    ours = manager_for(instances).create_ephemeral(
        str(instances / UUID / "disk.eph0"), size_gb=1, os_type="linux"
    )
    before = (instances / "_base" / NAME).stat().st_ino
    made = Nova(instances).call("make_ephemeral", uuid=OTHER_UUID, number=0, size_gb=1, os_type="linux")
    assert (ours.base, filesystem_of(made)) == (NAME, "ext4")
    assert (instances / "_base" / NAME).stat().st_ino == before


def test_novas_instances_are_reported_without_a_call_for_each(instances: pathlib.Path) -> None:
    listed = [
        {
            "uuid": f"6d1a3a0e-0000-4000-8000-{number:012}",
            "image_ref": "image",
            "ephemerals": [1],
            "swap_mb": 8,
        }
        for number in range(100)
    ]
    found = Nova(instances).call("report", instances=listed)
    assert (found["calls"], found["queries"]) == ([], 1)
    assert found["instances"] == [[each["uuid"], "here", ["image"], 8, [1]] for each in listed]
