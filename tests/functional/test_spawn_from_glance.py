# SPDX-License-Identifier: Apache-2.0
"""The whole spawn flow against a real Glance, qemu-img and a guest that boots."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import random
import subprocess
import threading
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.store import layout
from imagecache_lib.testing import bootdisk
from imagecache_lib.testing.bad_server import BadServer
from tests.lab import glance as glance_lab
from tests.lab import guest
from tests.lab import relay as relay_lab
from tests.support.ports import free_port

MIB = 2**20
SIZE = 16 * MIB
MANY = 32
DATA = random.Random(7).randbytes(3 * MIB) + bytes(4 * MIB) + random.Random(8).randbytes(MIB)


@pytest.fixture
def instances(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "instances"
    path.mkdir()
    return path


def manager_for(
    instances: pathlib.Path,
    url: str,
    *,
    token: str = glance_lab.MEMBER,
    backend: str = "qcow2",
    **options: Any,
) -> ic.ImageCacheManager:
    config = ic.CacheConfig(instances_path=str(instances), **options)
    return ic.ImageCacheManager(config, ic.GlanceSource(url, token=token), backend=backend, observers=())


def target(instances: pathlib.Path, name: str) -> str:
    (instances / name).mkdir()
    return str(instances / name / "disk")


def converted(tmp_path: pathlib.Path, format: str, *options: str) -> pathlib.Path:
    raw, image = tmp_path / "source", tmp_path / f"source.{format}"
    raw.write_bytes(DATA)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, *options, raw, image], check=True)
    return image


def check(disk: ic.Disk, tmp_path: pathlib.Path) -> None:
    """It is sound and holds the image, grown, as qemu-img sees it."""
    reference = tmp_path / "reference"
    if not reference.exists():
        reference.write_bytes(DATA + bytes(SIZE - len(DATA)))
    if disk.format == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", disk.target], check=True)
    compare = ["qemu-img", "compare", "-q", "-f", disk.format, "-F", "raw", disk.target, str(reference)]
    subprocess.run(compare, check=True)


@pytest.mark.parametrize("backend", ["qcow2", "raw"])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("raw", ()),
        ("qcow2", ("-c",)),
        ("qcow2", ("-c", "-o", "compression_type=zstd")),
        ("vmdk", ("-o", "subformat=streamOptimized")),
        ("vmdk", ("-o", "subformat=monolithicSparse")),
        ("vpc", ("-o", "force_size=on")),
        ("vhdx", ()),
        ("vdi", ()),
    ],
)
def test_a_disk_of_each_format_that_glance_has(
    glance: glance_lab.Glance,
    instances: pathlib.Path,
    tmp_path: pathlib.Path,
    format: str,
    options: Any,
    backend: str,
) -> None:
    claimed = {"vpc": "vhd"}.get(format, format)
    image_id = glance.upload(converted(tmp_path, format, *options), disk_format=claimed)
    manager = manager_for(instances, glance.url, backend=backend)
    for name in ("one", "two"):
        check(manager.create_disk(image_id, target(instances, name), size=SIZE), tmp_path)
    assert len(glance.downloads(image_id)) == 1
    assert (instances / "_base" / layout.base_name(image_id)).read_bytes()[: len(DATA)] == DATA


def spawn(instances: pathlib.Path, url: str, image_id: str, number: int, start: Barrier) -> None:
    backend = ("qcow2", "raw")[number % 2]
    manager = manager_for(instances, url, backend=backend)
    disk = target(instances, f"process-{number}")
    start.wait(300)
    manager.create_disk(image_id, disk, size=SIZE)


def test_processes_and_threads_that_want_one_cold_image_at_once_download_it_once(
    glance: glance_lab.Glance, instances: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image_id = glance.upload(converted(tmp_path, "qcow2", "-c"), disk_format="qcow2")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    start = context.Barrier(MANY + 1)
    children = [
        context.Process(target=spawn, args=(instances, glance.url, image_id, number, start))
        for number in range(MANY)
    ]
    for child in children:
        child.start()
    manager = manager_for(instances, glance.url)
    disks = {}

    def create(number: int) -> None:
        disks[number] = manager.create_disk(image_id, target(instances, f"thread-{number}"), size=SIZE)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(MANY)]
    start.wait(300)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0] * MANY
    assert len(disks) == MANY
    assert len(glance.downloads(image_id)) == 1
    for number in range(MANY):
        check(disks[number], tmp_path)
        format = ("qcow2", "raw")[number % 2]
        check(ic.Disk(str(instances / f"process-{number}" / "disk"), format, SIZE), tmp_path)
    assert os.listdir(instances / "_base" / ".imagecache" / "stage") == []


def test_another_tenants_private_image_is_not_found_and_its_own_is(
    glance: glance_lab.Glance, instances: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image_id = glance.upload(DATA)
    disk = target(instances, "one")
    with pytest.raises(errors.ImageNotFound, match=image_id):
        manager_for(instances, glance.url, token=glance_lab.STRANGER).create_disk(image_id, disk)
    assert os.listdir(instances / "one") == []
    assert not (instances / "_base" / layout.base_name(image_id)).exists()
    check(manager_for(instances, glance.url).create_disk(image_id, disk, size=SIZE), tmp_path)


@pytest.fixture
def victim(glance: glance_lab.Glance, instances: pathlib.Path) -> str:
    """A private image whose base is in the cache of this host."""
    image_id = glance.upload(DATA)
    manager_for(instances, glance.url).cache_image(image_id)
    return image_id


def test_who_states_the_digest_of_anothers_image_does_not_get_its_content(
    glance: glance_lab.Glance, instances: pathlib.Path, victim: str
) -> None:
    digest = glance.metadata(victim)["os_hash_value"]
    with BadServer() as web:
        web.put("/image", bytes(MIB))
        forged = glance.register(f"{web.url}/image", digest, token=glance_lab.STRANGER)
        assert glance.metadata(forged, token=glance_lab.STRANGER)["os_hash_value"] == digest
        manager = manager_for(instances, glance.url, token=glance_lab.STRANGER)
        with pytest.raises(errors.ImageRejected, match=forged):
            manager.create_disk(forged, target(instances, "one"))
    assert os.listdir(instances / "one") == []


def test_an_image_with_the_content_of_another_is_not_fetched_where_glance_computes_all_digests(
    glance: glance_lab.Glance, instances: pathlib.Path, victim: str
) -> None:
    same = glance.upload(DATA)
    config = ic.CacheConfig(instances_path=str(instances))
    source = ic.GlanceSource(glance.url, token=glance_lab.MEMBER, computes_digests=True)
    ic.ImageCacheManager(config, source, backend="qcow2", observers=()).cache_image(same)
    assert (len(glance.downloads(victim)), len(glance.downloads(same))) == (1, 0)


def test_a_requests_own_token_is_used_and_never_told(
    glance: glance_lab.Glance, instances: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image_id = glance.upload(DATA)
    manager = manager_for(instances, glance.url, token="expired-secret")
    disk = target(instances, "one")
    with pytest.raises(errors.SourceError) as caught:
        manager.create_disk(image_id, disk)
    assert image_id in str(caught.value)
    assert "expired-secret" not in str(caught.value)
    request = ic.Request(source=ic.GlanceSource(glance.url, token=glance_lab.MEMBER))
    check(manager.create_disk(image_id, disk, size=SIZE, request=request), tmp_path)


def test_an_image_without_data_yet_is_asked_for_later(
    glance: glance_lab.Glance, instances: pathlib.Path
) -> None:
    queued = glance.create()
    with pytest.raises(errors.SourceError, match="queued"):
        manager_for(instances, glance.url).create_disk(queued, target(instances, "one"))
    assert os.listdir(instances / "one") == []


def test_a_qcow2_that_was_uploaded_as_raw_is_refused(
    glance: glance_lab.Glance, instances: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image_id = glance.upload(converted(tmp_path, "qcow2"), disk_format="raw")
    with pytest.raises(errors.ImageRejected, match="qcow2"):
        manager_for(instances, glance.url).create_disk(image_id, target(instances, "one"))
    assert os.listdir(instances / "_base" / ".imagecache" / "stage") == []


def test_data_that_glance_lost_or_damaged_never_become_a_base(
    glance: glance_lab.Glance, instances: pathlib.Path
) -> None:
    for damage, kind in (("truncated", errors.ImageCacheError), ("flipped", errors.ImageRejected)):
        image_id = glance.upload(DATA)
        with glance.stored_file(image_id).open("r+b") as stored:
            if damage == "truncated":
                stored.truncate(MIB)
            else:
                stored.seek(MIB)
                stored.write(b"damage")
        with pytest.raises(kind, match=image_id):
            manager_for(instances, glance.url, num_retries=0).create_disk(image_id, target(instances, damage))
        assert not (instances / "_base" / layout.base_name(image_id)).exists()
        assert os.listdir(instances / "_base" / ".imagecache" / "stage") == []


def test_a_broken_transfer_goes_on_and_the_digest_is_carried_on(
    glance: glance_lab.Glance,
    instances: pathlib.Path,
    tmp_path: pathlib.Path,
    relay_to: Callable[[str], relay_lab.Relay],
) -> None:
    image_id = glance.upload(converted(tmp_path, "qcow2"), disk_format="qcow2")
    relay = relay_to(glance.url)
    # One connection for the metadata, which is shorter, and one for the data.
    relay.cut_after(2_000_000, 2_000_000)
    manager = manager_for(instances, relay.url)
    check(manager.create_disk(image_id, target(instances, "one"), size=SIZE), tmp_path)
    ranges = [request.range for request in glance.downloads(image_id)]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert ranges[1] is not None


def test_what_is_cached_serves_when_the_image_is_deleted_and_glance_is_down(
    glance: glance_lab.Glance, instances: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image_id = glance.upload(DATA)
    manager_for(instances, glance.url).cache_image(image_id)
    glance.delete(image_id)
    manager = manager_for(instances, glance.url)
    check(manager.create_disk(image_id, target(instances, "one"), size=SIZE), tmp_path)
    nobody = f"http://127.0.0.1:{free_port()}"
    check(manager_for(instances, nobody).create_disk(image_id, target(instances, "two"), size=SIZE), tmp_path)


@pytest.mark.parametrize("force_raw", [True, False])
def test_a_guest_boots_from_a_disk_and_its_writes_stay_in_it(
    glance: glance_lab.Glance, instances: pathlib.Path, tmp_path: pathlib.Path, force_raw: bool
) -> None:
    raw, image = tmp_path / "boot.raw", tmp_path / "boot.qcow2"
    bootdisk.write_boot_disk(str(raw))
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image], check=True)
    image_id = glance.upload(image, disk_format="qcow2")
    manager = manager_for(instances, glance.url, force_raw_images=force_raw)
    base = instances / "_base" / layout.base_name(image_id)
    for name in ("one", "two"):
        disk = manager.create_disk(image_id, target(instances, name), size=SIZE)
        before = base.read_bytes()
        for boot in range(2):
            assert f"HELLO BOOT {boot}" in guest.boot(bootdisk.boot_command(disk.target, disk.format))
        assert base.read_bytes() == before
