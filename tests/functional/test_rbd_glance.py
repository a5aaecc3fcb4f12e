# SPDX-License-Identifier: Apache-2.0
"""The rbd backend on the cluster that a real Glance keeps its images in, as users with the rights that Ceph
recommends for both; and what is told when the cluster, or a right, is missing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.backends import ceph as ceph_errors
from imagecache_lib.backends.ceph import RbdName
from imagecache_lib.backends.interface import CannotClone
from imagecache_lib.backends.librbd import LibrbdCluster
from imagecache_lib.backends.rbd import RbdBackend, parse_location
from imagecache_lib.ingest.rbd_source import RbdSource
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.testing import bootdisk
from tests.lab import ceph as ceph_lab
from tests.lab import glance as glance_lab
from tests.lab import guest

MIB = 2**20
DATA = hashlib.sha512(b"glance").digest() * (2 * MIB // 64)


@pytest.fixture(scope="module")
def user(ceph: ceph_lab.Ceph) -> str:
    """A user who makes disks, and clones what Glance has without being able to change it."""
    return ceph.user("nova", mon="profile rbd", osd="profile rbd pool=vms, profile rbd-read-only pool=images")


@pytest.fixture(scope="module")
def image(ceph_glance: glance_lab.Glance) -> str:
    return ceph_glance.upload(DATA, store="ceph")


class Host:
    """A compute host, and what it told."""

    def __init__(self, ceph: ceph_lab.Ceph, glance: glance_lab.Glance, home: pathlib.Path, user: str) -> None:
        self.ceph, self.glance, self.home, self.user = ceph, glance, home, user
        self.told: list[events.Event] = []

    def manager(
        self, *, trace: Callable[[str], None] = lambda _point: None, **options: Any
    ) -> ic.ImageCacheManager:
        config = ic.CacheConfig(
            instances_path=str(self.home),
            images_rbd_pool=options.pop("pool", "vms"),
            images_rbd_ceph_conf=str(self.ceph.conf),
            rbd_user=options.pop("user", self.user),
            **options,
        )
        source = ic.GlanceSource(self.glance.url, token=glance_lab.MEMBER)
        return ic.ImageCacheManager(
            config, source, "rbd", host=ic.System(trace=trace), observers=[self.told.append]
        )

    def names(self) -> set[str]:
        return set(self.ceph.rbd("ls", "vms").split())

    @property
    def reasons(self) -> list[str]:
        return [each.reason for each in self.told if isinstance(each, events.NotCloned)]

    @property
    def cached(self) -> list[str]:
        """Base images, and what is on its way to become one."""
        bases = self.home / "_base"
        stage = bases / ".imagecache/stage"
        return [
            path.name
            for where in (bases, stage)
            if where.exists()
            for path in where.iterdir()
            if path.is_file()
        ]


@pytest.fixture
def host(
    ceph: ceph_lab.Ceph, ceph_glance: glance_lab.Glance, tmp_path: pathlib.Path, user: str
) -> Iterator[Host]:
    """Whatever fails is to leave nothing in the pool: what a test made itself it removes."""
    made = Host(ceph, ceph_glance, tmp_path, user)
    before = made.names()
    yield made
    assert made.names() == before


def target() -> str:
    return f"{uuid.uuid4()}_disk"


def boot(host: Host, disk: ic.Disk) -> str:
    url = f"rbd:vms/{disk.target}:conf={host.ceph.conf}:id={host.user}"
    return guest.boot(bootdisk.boot_command(url, "raw"))


def test_guests_boot_from_clones_of_glances_image_which_stays_as_it_was(host: Host) -> None:
    path = host.home / "boot.raw"
    bootdisk.write_boot_disk(str(path), greeting="CLONED")
    image = host.glance.upload(path, store="ceph")
    manager = host.manager()
    first = manager.create_disk(image, target(), size=8 * MIB)
    assert "CLONED BOOT 0" in boot(host, first)
    assert "CLONED BOOT 1" in boot(host, first)
    second = manager.create_disk(image, target())
    assert "CLONED BOOT 0" in boot(host, second)
    assert (host.glance.downloads(image), host.reasons, host.cached) == ([], [], [])
    # Glance keeps an image that has clones, and its guests go on.
    assert host.glance.call("DELETE", f"/images/{image}").status_code == 409
    assert "CLONED BOOT 2" in boot(host, first)
    manager.remove_disk(first)
    manager.flatten_disk(second)
    host.glance.delete(image)
    assert "CLONED BOOT 1" in boot(host, second)
    manager.remove_disk(second)


def test_bytes_come_from_the_cluster_and_are_compared_with_glances_digest(host: Host, image: str) -> None:
    source = ic.GlanceSource(host.glance.url, token=glance_lab.MEMBER)
    config = ic.CacheConfig(instances_path=str(host.home), num_retries=0)
    rbd_source = RbdSource(source, LibrbdCluster(str(host.ceph.conf), host.user))
    manager = ic.ImageCacheManager(config, rbd_source, "qcow2")
    with manager.fetch_or_reuse(image) as base:
        assert pathlib.Path(base.path).read_bytes() == DATA
    assert host.glance.downloads(image) == []
    other = host.glance.upload(DATA[::-1], store="ceph")
    damage(host, other)
    cached = host.cached
    with pytest.raises(errors.ImageRejected, match=f"(?s){other}.*sha512"):
        manager.cache_image(other)
    assert (host.cached, host.glance.downloads(other)) == (cached, [])


def damage(host: Host, image: str) -> None:
    """Have other bytes in the snapshot that Glance names."""
    name = f"images/{image}"
    path = host.home / "damaged"
    path.write_bytes(bytes(len(DATA)))
    host.ceph.rbd("snap", "unprotect", f"{name}@snap")
    host.ceph.rbd("snap", "rm", f"{name}@snap")
    host.ceph.rbd("rm", name)
    host.ceph.rbd("import", str(path), name)
    host.ceph.rbd("snap", "create", f"{name}@snap")
    host.ceph.rbd("snap", "protect", f"{name}@snap")


# -- denied ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rights", "pool"),
    [
        ("profile rbd-read-only pool=vms, profile rbd-read-only pool=images", "vms"),
        ("profile rbd-read-only pool=images", "vms"),
        ("profile rbd pool=vms, profile rbd-read-only pool=images", "no-such-pool"),
    ],
)
def test_a_pool_in_which_no_disk_can_be_made_is_named_and_nothing_is_fetched(
    host: Host, image: str, rights: str, pool: str
) -> None:
    user = host.ceph.user("limited", mon="profile rbd", osd=rights)
    with pytest.raises((ceph_errors.Denied, ceph_errors.Missing)) as caught:
        host.manager(user=user, pool=pool).create_disk(image, target())
    assert f"{pool}/" in str(caught.value)
    if pool == "vms":
        assert "client.limited" in str(caught.value)
    assert (host.cached, host.glance.downloads(image)) == ([], [])


def test_images_that_may_not_be_read_are_fetched_from_glance_unless_that_is_forbidden(host: Host) -> None:
    image = host.glance.upload(DATA, store="ceph")
    user = host.ceph.user("limited", mon="profile rbd", osd="profile rbd pool=vms")
    with pytest.raises(CannotClone, match=f"images/{image}@snap.*client.limited has no permission"):
        host.manager(user=user, never_download_image_if_on_rbd=True).create_disk(image, target())
    assert (host.cached, host.glance.downloads(image)) == ([], [])
    manager = host.manager(user=user)
    disk = manager.create_disk(image, target())
    assert "client.limited has no permission" in host.reasons[0]
    assert len(host.glance.downloads(image)) == 1
    manager.remove_disk(disk)


@pytest.mark.parametrize("user", ["stranger", "forged"])
def test_a_user_whom_the_monitors_do_not_know_is_named(host: Host, image: str, user: str) -> None:
    if user == "forged":
        key = host.ceph.conf.parent / f"client.{user}.keyring"
        key.write_text(f"[client.{user}]\n\tkey = AQAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==\n")
    manager = host.manager(user=user)
    calls: tuple[Callable[[], object], ...] = (
        lambda: manager.create_disk(image, target()),
        lambda: manager.inspect_disk(target()),
    )
    for call in calls:
        with pytest.raises(errors.BackendError, match=f"client.{user}") as caught:
            call()
        assert not isinstance(caught.value, (ceph_errors.Missing, CannotClone))
    assert (host.cached, host.glance.downloads(image)) == ([], [])


# -- gone, busy, down -----------------------------------------------------------------------------------


def test_a_snapshot_that_goes_while_it_is_cloned_is_fetched_from_glance_or_refused(host: Host) -> None:
    image = host.glance.upload(DATA, store="ceph")
    (location,) = (each["url"] for each in host.glance.metadata(image)["locations"])
    found = parse_location(location)
    assert found is not None and found[1] == RbdName("images", image, "snap")
    host.ceph.rbd("snap", "unprotect", str(found[1]))
    with pytest.raises(CannotClone, match=f"images/{image}@snap.*not protected"):
        host.manager(never_download_image_if_on_rbd=True).create_disk(image, target())
    host.ceph.rbd("snap", "rm", str(found[1]))
    with pytest.raises(CannotClone, match=f"images/{image}@snap.*no such pool or image"):
        host.manager(never_download_image_if_on_rbd=True).create_disk(image, target())


def test_a_disk_that_a_guest_has_open_is_not_removed(host: Host, image: str) -> None:
    manager = host.manager()
    disk = manager.create_disk(image, target())
    opened, done = threading.Event(), threading.Event()

    def write() -> Iterator[tuple[int, bytes]]:
        yield 0, b"guest"
        opened.set()
        done.wait(60)

    holder = LibrbdCluster(str(host.ceph.conf), host.user)
    guest_writes = threading.Thread(target=holder.fill, args=(RbdName("vms", disk.target), write()))
    guest_writes.start()
    assert opened.wait(60)
    try:
        with pytest.raises(ceph_errors.Busy, match=f"it is open somewhere.*vms/{disk.target}"):
            manager.remove_disk(disk)
        assert manager.inspect_disk(disk.target).virtual_size == len(DATA)
    finally:
        done.set()
        guest_writes.join()
    manager.remove_disk(disk)


@pytest.mark.parametrize("where", ["ceph", "disk"])
def test_a_cluster_that_stops_under_a_disk_is_told_in_time_and_the_pass_removes_what_it_left(
    host: Host, where: str
) -> None:
    """A clone of an image in the cluster, and the import of one elsewhere."""
    image = host.glance.upload(DATA, store=where)
    stopped: list[contextlib.AbstractContextManager[None]] = []

    def stop(point: str) -> None:
        if point == TracePoint.DISK_MADE and not stopped:
            stopped.append(host.ceph.stopped("osd"))
            stopped[0].__enter__()

    manager = host.manager(trace=stop, rbd_op_timeout=2)
    before, began = host.names(), time.monotonic()
    try:
        with pytest.raises(errors.BackendError, match=rf"{image}: Ceph did not answer in time \(vms/"):
            manager.create_disk(image, target())
        took = time.monotonic() - began
    finally:
        for each in stopped:
            each.__exit__(None, None, None)
    assert took < 60
    (left,) = host.names() - before
    assert left.endswith(".new")
    later = ic.System(clock=lambda: time.time() + 7200)
    assert RbdBackend.from_config(manager.config, later).sweep() == [left]


def test_a_cluster_without_monitors_is_told_in_time(host: Host, image: str) -> None:
    with host.ceph.stopped("mon"):
        began = time.monotonic()
        with pytest.raises(errors.BackendError, match=f"cannot be reached as client.{host.user}"):
            host.manager(rbd_connect_timeout=1).create_disk(image, target())
        assert time.monotonic() - began < 60
    assert (host.cached, host.glance.downloads(image)) == ([], [])


def test_a_client_that_was_fenced_off_connects_again(host: Host, image: str) -> None:
    manager = host.manager()
    disk = manager.create_disk(image, target())
    backend = manager.backend
    assert isinstance(backend, RbdBackend)
    with backend._cluster._cluster().used() as client:  # type: ignore[attr-defined]
        host.ceph.ceph("osd", "blocklist", "add", client.get_addrs())
    threads = len(os.listdir("/proc/self/task"))
    with pytest.raises(errors.BackendError):
        for _ in range(100):
            manager.inspect_disk(disk.target)
    assert manager.inspect_disk(disk.target).virtual_size == len(DATA)
    assert len(os.listdir("/proc/self/task")) <= threads, "the first connection has not ended"
    manager.remove_disk(disk)
