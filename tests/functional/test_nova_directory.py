# SPDX-License-Identifier: Apache-2.0
"""A directory laid out as Nova's image cache lays it out: adopted in place, and left as it was found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import random
import subprocess
import time

import pytest

import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.testing import bootdisk
from tests.lab import glance as glance_lab
from tests.lab import guest
from tests.support import files

MIB = 2**20
DAY = 86400
UUID = "6d1a3a0e-0000-4000-8000-000000000001"
OTHER_UUID = "6d1a3a0e-0000-4000-8000-000000000002"


def name_of(image_id: str) -> str:
    return hashlib.sha1(image_id.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class NovaDirectory:
    """What Nova left behind.

    :param path: the instances path.
    :param booted: image of a disk that an instance uses; stored raw, uploaded as qcow2.
    :param kernel: image of a kernel that an instance uses.
    :param unused: image that nobody uses any more, for two days.
    :param recent: image that nobody uses any more, for an hour.
    """

    path: pathlib.Path
    booted: str
    kernel: str
    unused: str
    recent: str

    @property
    def bases(self) -> pathlib.Path:
        return self.path / "_base"

    def base(self, image_id: str) -> pathlib.Path:
        return self.bases / name_of(image_id)

    @property
    def disk(self) -> pathlib.Path:
        return self.path / UUID / "disk"

    def files(self) -> dict[str, tuple[int, int, bytes]]:
        """Return every file that is not our own, with what it is and holds."""
        return {
            str(path.relative_to(self.path)): (path.stat().st_ino, path.stat().st_mode, path.read_bytes())
            for path in self.path.rglob("*")
            if path.is_file()
            and ".imagecache" not in path.parts
            and "imagecache" not in path.name
            and path.name != "compute_nodes"  # where every host, ours too, says when it was last alive
        }


@pytest.fixture
def nova(glance: glance_lab.Glance, tmp_path: pathlib.Path) -> NovaDirectory:
    path = tmp_path / "instances"
    (path / "_base").mkdir(parents=True)
    (path / "locks").mkdir()
    bootable, image = tmp_path / "boot", tmp_path / "boot.qcow2"
    bootdisk.write_boot_disk(str(bootable))
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", bootable, image], check=True)
    content = {
        "booted": bootable.read_bytes(),
        "kernel": random.Random(1).randbytes(MIB),
        "unused": random.Random(2).randbytes(MIB),
        "recent": random.Random(3).randbytes(MIB),
    }
    ids = {
        "booted": glance.upload(image, disk_format="qcow2"),
        "kernel": glance.upload(content["kernel"], disk_format="aki"),
        "unused": glance.upload(content["unused"]),
        "recent": glance.upload(content["recent"]),
    }
    found = NovaDirectory(path, **ids)
    for key, image_id in ids.items():
        found.base(image_id).write_bytes(content[key])
        (path / "locks" / f"nova-{name_of(image_id)}").touch()
    (found.bases / f"{name_of(found.unused)}_10").write_bytes(content["unused"])
    subprocess.run(["truncate", "-s", "512M", found.bases / "swap_512"], check=True)
    subprocess.run(["mkswap", "-q", found.bases / "swap_512"], check=True)
    subprocess.run(["truncate", "-s", "1G", found.bases / "ephemeral_1_40d1d2c"], check=True)
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-L", "ephemeral0", found.bases / "ephemeral_1_40d1d2c"], check=True
    )
    (path / "locks" / "nova-swap_512").touch()
    (path / "compute_nodes").write_text(json.dumps({"here": time.time()}))
    files.overlay(found.disk, found.base(found.booted), size="8M")
    files.overlay(path / UUID / "disk.swap", found.bases / "swap_512", size="512M")
    files.overlay(path / UUID / "disk.eph0", found.bases / "ephemeral_1_40d1d2c", size="1G")
    pinned = {str(path / UUID / disk): "qcow2" for disk in ("disk", "disk.swap", "disk.eph0")}
    (path / UUID / "disk.info").write_text(json.dumps(pinned))
    (path / UUID / "kernel").write_bytes(content["kernel"])
    (path / UUID / "console.log").write_text("login:")
    for base in found.bases.iterdir():
        age = 3600 if base.name == name_of(found.recent) else 2 * DAY
        files.age(base, seconds=age)
    return found


def manager_for(
    glance: glance_lab.Glance, nova: NovaDirectory, happened: list[events.Event] | None = None
) -> ic.ImageCacheManager:
    return ic.ImageCacheManager(
        ic.CacheConfig(instances_path=str(nova.path)),
        ic.GlanceSource(glance.url, token=glance_lab.MEMBER),
        host=ic.System(name="here"),
        observers=() if happened is None else (happened.append,),
    )


def instances_of(nova: NovaDirectory) -> list[ic.Instance]:
    return [ic.Instance(UUID, "here", images=(nova.booted, nova.kernel), swap_mb=512)]


def test_its_bases_are_hit_without_a_download_and_stay_as_they_are(
    glance: glance_lab.Glance, nova: NovaDirectory
) -> None:
    before = nova.files()
    happened: list[events.Event] = []
    manager = manager_for(glance, nova, happened)
    for number in range(2):
        directory = nova.path / OTHER_UUID / str(number)
        directory.mkdir(parents=True)
        disk = manager.create_disk(nova.booted, str(directory / "disk"), size=16 * MIB)
        assert disk.base == name_of(nova.booted)
        assert "HELLO BOOT 0" in guest.boot(bootdisk.boot_command(disk.target, "qcow2"))
        manager.fetch_file(nova.kernel, str(directory / "kernel"))
    for image_id in (nova.booted, nova.kernel, nova.unused, nova.recent):
        assert glance.downloads(image_id) == []
    assert sum(isinstance(event, events.Adopted) for event in happened) == 2
    assert {path: found for path, found in nova.files().items() if path in before} == before
    added = {path.split("/")[0] for path in set(nova.files()) - set(before)}
    assert added == {OTHER_UUID}


def test_an_overlay_that_nova_made_finds_its_base(glance: glance_lab.Glance, nova: NovaDirectory) -> None:
    manager = manager_for(glance, nova)
    nova.base(nova.booted).unlink()
    base = manager.ensure_backing(str(nova.disk), image_id=nova.booted)
    assert base is not None
    assert (base.format, base.path) == ("raw", str(nova.base(nova.booted)))
    assert "HELLO BOOT 0" in guest.boot(bootdisk.boot_command(str(nova.disk), "qcow2"))


def test_it_is_aged_as_nova_would_and_nothing_but_the_old_unused_goes(
    glance: glance_lab.Glance, nova: NovaDirectory
) -> None:
    before = nova.files()
    manager = manager_for(glance, nova)
    dry = manager.verify_base_images(instances_of(nova), dry_run=True)
    assert nova.files() == before
    report = manager.verify_base_images(instances_of(nova))
    gone = {f"_base/{name_of(nova.unused)}", f"_base/{name_of(nova.unused)}_10"}
    assert set(before) - set(nova.files()) == gone
    assert {f"_base/{base.name}" for base in report.evicted} == gone
    assert {f"_base/{base.name}" for base in dry.evicted} == gone
    after = nova.files()
    kept = {path: found for path, found in before.items() if path not in gone}
    assert {path: after[path] for path in kept} == kept
    assert {path.split("/")[0] for path in set(after) - set(before)} <= {"locks"}
    reasons = {base.name: base.reason for base in report.bases}
    assert str(nova.disk) in reasons[name_of(nova.booted)]
    assert "young" in reasons[name_of(nova.recent)]
    for in_use in (name_of(nova.booted), name_of(nova.kernel), "swap_512", "ephemeral_1_40d1d2c"):
        # What is in use counts as used now, for Nova too, which looks at the mtime.
        assert time.time() - (nova.bases / in_use).stat().st_mtime < 600


def test_when_its_instance_is_gone_its_bases_go_a_day_later(
    glance: glance_lab.Glance, nova: NovaDirectory
) -> None:
    manager = manager_for(glance, nova)
    manager.verify_base_images(instances_of(nova))
    subprocess.run(["rm", "-r", nova.path / UUID], check=True)
    assert manager.verify_base_images([]).evicted == ()
    for base in nova.bases.iterdir():
        files.age(base, seconds=2 * DAY)
    records = nova.bases / ".imagecache" / "records"
    assert list(records.iterdir()) == []  # nothing was adopted, as nothing was used
    assert len(manager.verify_base_images([]).evicted) == 5
    assert [path.name for path in nova.bases.iterdir()] == [".imagecache"]
    assert {path.name for path in (nova.path / "locks").iterdir()} >= {
        "nova-swap_512",
        f"nova-{name_of(nova.booted)}",
    }
    assert (nova.path / "compute_nodes").exists()


def test_a_truncated_kernel_and_a_damaged_image_are_not_used(
    glance: glance_lab.Glance, nova: NovaDirectory
) -> None:
    manager = manager_for(glance, nova)
    for image_id in (nova.kernel, nova.unused):
        with nova.base(image_id).open("r+b") as file:
            file.truncate(MIB // 2)
        files.age(nova.base(image_id), seconds=DAY)
    (nova.path / OTHER_UUID).mkdir()
    kernel = nova.path / OTHER_UUID / "kernel"
    manager.fetch_file(nova.kernel, str(kernel))
    assert kernel.read_bytes() == random.Random(1).randbytes(MIB)
    disk = nova.path / OTHER_UUID / "disk"
    manager.create_disk(nova.unused, str(disk))
    flat = nova.path / "flat"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, flat], check=True)
    assert flat.read_bytes() == random.Random(2).randbytes(MIB)
