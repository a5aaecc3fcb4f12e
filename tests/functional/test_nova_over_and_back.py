# SPDX-License-Identifier: Apache-2.0
"""A directory that Nova filled is taken over by the adapter, used for a day, and handed back to Nova.

Nova's side is its own image types and its own pass, unpatched, in its own environment. The adapter's side is
what nova-compute loads of it, in the same environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from imagecache_lib.formats import superblock
from imagecache_lib.store import layout
from imagecache_lib.testing import bootdisk
from tests.lab import glance as glance_lab
from tests.lab import gluster, guest
from tests.lab.nova import Nova
from tests.support import files, needs

DAY = 86400
NOVAS, OURS = "6d1a3a0e-0000-4000-8000-00000000000a", "6d1a3a0e-0000-4000-8000-00000000000b"
LEGACY = f"{NOVAS[:-1]}e"
#: Last digits of the instances on Nova's host.
NOVAS_OWN = "ae"
CHECKS = {
    "ext2": ["e2fsck", "-fn"],
    "ext3": ["e2fsck", "-fn"],
    "ext4": ["e2fsck", "-fn"],
    "vfat": ["fsck.vfat", "-n"],
}


@dataclasses.dataclass
class Hosts:
    """Nova's host and the adapter's, over one directory.

    :param images: ids by what they are for.
    """

    instances: pathlib.Path
    glance: glance_lab.Glance
    images: dict[str, str]
    nova: Nova
    adapter: Nova

    @property
    def bases(self) -> pathlib.Path:
        return self.instances / "_base"

    def disks(self, uuid: str, kind: str = "qcow2", size_gb: int = 1) -> list[dict[str, Any]]:
        """Return every kind of disk that an instance may have."""
        found: list[dict[str, Any]] = [
            {"name": "disk", "image": self.images["root"], "size_gb": size_gb},
            {"name": "kernel", "image": self.images["kernel"]},
            {"name": "ramdisk", "image": self.images["ramdisk"]},
            {"name": "disk.swap", "swap": 8},
            {"name": "disk.eph0", "ephemeral": 1},
            {"name": "disk.eph1", "ephemeral": 1},
            {"name": "disk.eph2", "ephemeral": 1, "fs": "xfs"},
            {"name": "disk.eph3", "ephemeral": 1 if uuid[-1] in NOVAS_OWN else 2, "fs": "vfat"},
            {"name": "disk.rescue", "image": self.images["rescue"], "size_gb": 1},
        ]
        return [{"kind": kind, "of": self.report(uuid), **each} for each in found]

    def report(self, uuid: str) -> dict[str, Any]:
        """Return the instance as both are told of it."""
        host = "nova" if uuid[-1] in NOVAS_OWN else "ours"
        return {
            "uuid": uuid,
            "os_type": "linux",
            "image_ref": self.images["root"],
            "swap_mb": 8,
            "ephemerals": [1, 1, 1, 1 if host == "nova" else 2],
            "host": host,
        }

    def use(self, host: Nova, side: str, disks: list[dict[str, Any]]) -> list[tuple[str, str]]:
        found = host.call(
            "use_disks", side=side, glance_url=self.glance.url, token=glance_lab.MEMBER, disks=disks
        )
        return [tuple(each) for each in found]

    def evict(self, host: Nova, side: str, uuids: list[str]) -> set[str]:
        """Run the pass of one side, and return the bases that are left."""
        reports = [self.report(uuid) for uuid in uuids]
        left = host.call("run_pass", side=side, instances=reports)
        return set(left) - {".imagecache"}

    def needed(self) -> set[str]:
        """Return the bases that a disk lies on."""
        found = set()
        for path in self.instances.glob("*-*/disk*"):
            with path.open("rb") as file:
                if file.read(4) != b"QFI\xfb":
                    continue
            command = ["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", str(path)]
            told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            if backing := told.get("backing-filename"):
                found.add(os.path.basename(backing))
        return found

    def grow_old(self) -> None:
        """Have two days go by. The filesystem's clock measures ages, so that it is the files that move."""
        files.age_tree(self.bases, seconds=2 * DAY)


@pytest.fixture(scope="module")
def glance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[glance_lab.Glance]:
    """A Glance that Nova's own client never finds to have closed a connection."""
    with glance_lab.running_glance(tmp_path_factory.mktemp("glance"), tells=True) as running:
        yield running


def images_of(glance: glance_lab.Glance, home: pathlib.Path) -> dict[str, str]:
    """Upload what the instances are made from."""
    found = {}
    for name in ("root", "rescue", "legacy", "unused"):
        raw, image = home / f"{name}.raw", home / f"{name}.qcow2"
        bootdisk.write_boot_disk(str(raw), greeting=name.upper())
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
        found[name] = glance.upload(image, disk_format="qcow2")
    found["kernel"] = glance.upload(os.urandom(2**16), disk_format="aki")
    found["ramdisk"] = glance.upload(os.urandom(2**16), disk_format="ari")
    return found


def hosts_for(
    glance: glance_lab.Glance,
    instances: pathlib.Path,
    home: pathlib.Path,
    kind: str = "qcow2",
    mounts: tuple[pathlib.Path | None, pathlib.Path | None] = (None, None),
) -> Hosts:
    for name in ("_base", "locks"):
        ((mounts[0] or instances) / name).mkdir(parents=True)
    site = home / "site"
    site.mkdir()
    return Hosts(
        instances,
        glance,
        images_of(glance, home),
        Nova(instances, host="nova", images_type=kind, under=under(mounts[0], instances)),
        Nova(instances, host="ours", images_type=kind, under=under(mounts[1], instances), site=site),
    )


def sound(hosts: Hosts, found: list[tuple[str, str]], home: pathlib.Path) -> None:
    """Every disk opens in the format that Nova names, and its filesystem is whole."""
    for path, disk_format in found:
        if os.path.basename(path) in ("kernel", "ramdisk"):
            image = hosts.images[os.path.basename(path)]
            assert pathlib.Path(path).read_bytes() == hosts.glance.stored_file(image).read_bytes()
            continue
        if disk_format == "qcow2":
            subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
        flat = home / "flat"
        subprocess.run(["qemu-img", "convert", "-f", disk_format, "-O", "raw", path, flat], check=True)
        with flat.open("rb") as file:
            told = superblock.read(file.read(superblock.LENGTH))
        if os.path.basename(path) in ("disk", "disk.rescue"):
            assert "BOOT 0" in guest.boot(bootdisk.boot_command(str(flat), "raw"))
            continue
        assert told is not None, path
        if told.kind in CHECKS:
            program, option = CHECKS[told.kind]
            done = subprocess.run([needs.program(program), option, flat], capture_output=True, check=False)
            assert done.returncode == 0, (path, done.stdout)


def kinds_of(found: list[tuple[str, str]], home: pathlib.Path) -> dict[str, str]:
    """Return the filesystem in each disk that has one."""
    kinds = {}
    for path, disk_format in found:
        flat = home / "kind"
        subprocess.run(["qemu-img", "convert", "-f", disk_format, "-O", "raw", path, flat], check=True)
        with flat.open("rb") as file:
            told = superblock.read(file.read(superblock.LENGTH))
        if told is not None:
            kinds[os.path.basename(path)] = told.kind
    return kinds


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_directory_of_novas_is_used_for_a_day_and_handed_back(
    glance: glance_lab.Glance, tmp_path: pathlib.Path, kind: str
) -> None:
    hosts = hosts_for(glance, tmp_path / "instances", tmp_path, kind)
    theirs = hosts.disks(NOVAS, kind)
    filled = hosts.use(hosts.nova, "nova", theirs)
    hosts.nova.call("resize_disk", uuid=NOVAS, name="disk", kind=kind, size_gb=2)
    if kind == "qcow2":
        legacy_disk(hosts)
    left_over = [
        {**theirs[0], "image": hosts.images["unused"], "name": "disk.old"},
        # Of a third disk, which Nova's pass does not know.
        {**theirs[7], "ephemeral": 2, "name": "disk.eph9"},
    ]
    for path, _format in hosts.use(hosts.nova, "nova", left_over):
        os.unlink(path)
    kinds = kinds_of(filled, tmp_path)

    # Taken over: a hard reboot and a resize of what Nova made, and an instance of ours.
    assert hosts.use(hosts.adapter, "adapter", theirs) == filled
    grown = hosts.use(hosts.adapter, "adapter", [{**theirs[0], "size_gb": 3}])
    assert grown == filled[:1]
    ours = hosts.disks(OURS, kind)
    made = hosts.use(hosts.adapter, "adapter", ours)
    assert {os.path.basename(path) for path, _format in made} == {each["name"] for each in ours}
    uuids = [NOVAS, OURS, LEGACY]
    needed = hosts.needed()
    assert needed <= hosts.evict(hosts.adapter, "adapter", uuids)
    hosts.grow_old()
    left = hosts.evict(hosts.adapter, "adapter", uuids)
    assert needed <= left
    assert layout.base_name(hosts.images["unused"]) not in left

    # Nova's pass does not know what a guest is rescued with either, whoever made it.
    for rescue in hosts.instances.glob("*/disk.rescue"):
        rescue.unlink()
    theirs, ours = theirs[:-1], ours[:-1]
    filled, made = filled[:-1], made[:-1]
    needed = hosts.needed()

    # Handed back: Nova's pass, twice and a day apart, and a hard reboot of everything.
    for _ in range(2):
        hosts.grow_old()
        assert needed <= hosts.evict(hosts.nova, "nova", uuids)
    assert hosts.use(hosts.nova, "nova", [{**theirs[0], "size_gb": 3}, *theirs[1:]]) == filled
    assert hosts.use(hosts.nova, "nova", ours) == made
    sound(hosts, filled + made, tmp_path)
    assert kinds_of(filled, tmp_path) == kinds
    # Ours are what was asked for.
    asked = {
        "disk.swap": "swap",
        "disk.eph0": "ext4",
        "disk.eph1": "ext4",
        "disk.eph2": "xfs",
        "disk.eph3": "vfat",
    }
    assert kinds_of(made, tmp_path) == asked
    assert len(glance.downloads(hosts.images["root"])) == 1


@pytest.mark.parametrize("first", ["nova", "adapter"])
def test_a_host_of_novas_and_one_of_ours_share_a_directory(
    glance: glance_lab.Glance, tmp_path: pathlib.Path, first: str
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    with gluster.mounted_twice(volume) as (one, two):
        instances = tmp_path / "instances"
        instances.mkdir()
        # Each host has the volume under the same path, by a mount of its own.
        hosts = hosts_for(glance, instances, tmp_path, mounts=(one, two))
        sides = [(hosts.nova, "nova", NOVAS), (hosts.adapter, "adapter", OURS)]
        if first == "adapter":
            sides.reverse()
        made: list[tuple[str, str]] = []
        for host, side, uuid in sides:
            made += hosts.use(host, side, hosts.disks(uuid)[:-1])
        assert len(glance.downloads(hosts.images["root"])) == 1
        with bound(one, instances):
            needed = hosts.needed()
        # Each tends what the other made, and a guest of each is started again on the other's host.
        for host, side, _uuid in sides:
            with bound(one, instances):
                hosts.grow_old()
            assert needed <= hosts.evict(host, side, [NOVAS, OURS])
        for (host, side, _own), (_host, _side, uuid) in zip(sides, reversed(sides), strict=True):
            hosts.use(host, side, hosts.disks(uuid)[:-1])
        with bound(two, instances):
            sound(hosts, made, tmp_path)


@contextlib.contextmanager
def bound(mount: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
    """Have a mount under another path too, for the length of the context."""
    subprocess.run([needs.program("mount"), "--bind", mount, path], check=True)
    try:
        yield
    finally:
        subprocess.run([needs.program("umount"), path], check=True)


def under(mount: pathlib.Path | None, path: pathlib.Path) -> list[str]:
    """Return what a process is run under that has a mount under another path, and nobody else has."""
    if mount is None:
        return []
    script = f'mount --bind {mount} {path} && exec "$@"'
    return [needs.program("unshare"), "--mount", needs.program("sh"), "-c", script, "sh"]


def legacy_disk(hosts: Hosts) -> None:
    """Give an instance a disk as Nova made them once: on a base that was resized for its flavor."""
    directory, name = hosts.instances / LEGACY, layout.base_name(hosts.images["legacy"])
    directory.mkdir()
    disk = {
        "of": hosts.report(LEGACY),
        "kind": "qcow2",
        "name": "disk",
        "image": hosts.images["legacy"],
        "size_gb": 1,
    }
    ((path, _format),) = hosts.use(hosts.nova, "nova", [disk])
    resized = hosts.bases / f"{name}_1"
    resized.write_bytes((hosts.bases / name).read_bytes())
    os.truncate(resized, 2**30)
    os.unlink(path)
    files.overlay(pathlib.Path(path), resized, size="1G")
