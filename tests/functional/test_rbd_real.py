# SPDX-License-Identifier: Apache-2.0
"""The rbd backend on a real Ceph cluster, against the contracts that the cluster in memory passes too."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import time
import unittest
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from imagecache_lib import CacheConfig, CacheResult, ImageCacheManager, System, errors, events, model
from imagecache_lib.backends.ceph import Busy, RbdName
from imagecache_lib.backends.interface import CannotClone
from imagecache_lib.backends.librbd import LibrbdCluster
from imagecache_lib.backends.rbd import RbdBackend
from imagecache_lib.ingest.rbd_source import RbdSource
from imagecache_lib.testing.backend_contract import BackendContract, commit
from imagecache_lib.testing.ceph_contract import CephContract
from imagecache_lib.testing.sources import FakeSource
from tests.lab import ceph as ceph_lab

MIB = 2**20


@contextlib.contextmanager
def opened(running: ceph_lab.Ceph, name: RbdName, *, read_only: bool = False) -> Iterator[Any]:
    """Open an image with the bindings themselves."""
    import rados
    import rbd

    with (
        rados.Rados(conffile=str(running.conf)) as cluster,
        cluster.open_ioctx(name.pool) as ioctx,
        rbd.Image(ioctx, name.image, snapshot=name.snapshot, read_only=read_only) as image,
    ):
        yield image


def read(running: ceph_lab.Ceph, name: RbdName, offset: int, length: int) -> bytes:
    with opened(running, name, read_only=True) as image:
        data: bytes = image.read(offset, length)
        return data


def snapshot_image(running: ceph_lab.Ceph, data: bytes, *, protect: bool = True) -> RbdName:
    """Put an image into the pool as Glance's rbd store does, and return its snapshot."""
    cluster, name = LibrbdCluster(str(running.conf)), RbdName("images", str(uuid.uuid4()))
    cluster.create(name, len(data))
    cluster.fill(name, [(0, data)])
    with opened(running, name) as image:
        image.create_snap("snap")
        if protect:
            image.protect_snap("snap")
    return RbdName(name.pool, name.image, "snap")


def location(running: ceph_lab.Ceph, snapshot: RbdName) -> str:
    parts = (running.fsid, snapshot.pool, snapshot.image, snapshot.snapshot or "")
    return "rbd://" + "/".join(urllib.parse.quote(part, safe="") for part in parts)


class _WithCeph:
    running: ceph_lab.Ceph

    @pytest.fixture(autouse=True)
    def _take_cluster(self, ceph: ceph_lab.Ceph) -> None:
        self.running = ceph


class TestLibrbd(_WithCeph, CephContract, unittest.TestCase):
    def make_cluster(self) -> LibrbdCluster:
        return LibrbdCluster(str(self.running.conf))

    def read(self, name: RbdName, offset: int, length: int) -> bytes:
        return read(self.running, name, offset, length)

    @contextlib.contextmanager
    def opened(self, name: RbdName) -> Iterator[None]:
        with opened(self.running, name) as image:
            image.write(image.read(0, 512), 0)
            yield

    def create_snapshot(self, name: RbdName, *, protect: bool = True) -> None:
        with opened(self.running, RbdName(name.pool, name.image)) as image:
            image.create_snap(name.snapshot)
            if protect:
                image.protect_snap(name.snapshot)

    def remove_snapshot(self, name: RbdName) -> None:
        import rbd

        with opened(self.running, RbdName(name.pool, name.image)) as image:
            try:
                image.unprotect_snap(name.snapshot)
            except rbd.ImageBusy:
                raise Busy("it has clones", path=str(name)) from None
            image.remove_snap(name.snapshot)


class TestRbd(_WithCeph, BackendContract, unittest.TestCase):
    def make_backend(self) -> RbdBackend:
        config = CacheConfig(
            instances_path="/instances",
            images_rbd_pool="vms",
            images_rbd_ceph_conf=str(self.running.conf),
        )
        return RbdBackend.from_config(config, System(name="here"))

    def make_target(self) -> str:
        return f"{uuid.uuid4()}_disk"

    def read_disk(self, disk: model.Disk, offset: int, length: int) -> bytes:
        return read(self.running, RbdName("vms", disk.target), offset, length)

    def write_disk(self, disk: model.Disk, offset: int, data: bytes) -> None:
        with opened(self.running, RbdName("vms", disk.target)) as image:
            image.write(data, offset)

    def everything(self) -> set[str]:
        return set(LibrbdCluster(str(self.running.conf)).names("vms"))

    def test_holes_of_the_base_take_no_objects(self) -> None:
        base = self.make_base("sparse", 64 * MIB)
        disk = commit(self.backend.prepare_standalone(base, self.make_target(), None))
        used: list[int] = []
        with opened(self.running, RbdName("vms", disk.target), read_only=True) as image:
            image.diff_iterate(0, image.size(), None, lambda _offset, length, _there: used.append(length))
        self.assertLess(sum(used), 24 * MIB)
        self.assert_content(disk, base)


# -- with the manager ----------------------------------------------------------------------------------


class LocatedSource(FakeSource):
    """Says of its images that they are raw and stored at a location."""

    def __init__(self, data: bytes, *locations: str) -> None:
        super().__init__({"image": data})
        self._locations = locations

    def describe(self, image_id: str) -> model.Image:
        image = super().describe(image_id)
        return model.Image(image.id, "raw", image.size, image.digest, locations=self._locations)


def manager_on(
    running: ceph_lab.Ceph,
    tmp_path: pathlib.Path,
    source: FakeSource,
    observers: Sequence[events.Observer] = (),
    **config: Any,
) -> ImageCacheManager:
    return ImageCacheManager(
        CacheConfig(
            instances_path=str(tmp_path),
            images_rbd_pool="vms",
            images_rbd_ceph_conf=str(running.conf),
            **config,
        ),
        source,
        backend="rbd",
        observers=observers,
    )


DATA = hashlib.sha512(b"rbd").digest() * (2 * MIB // 64)


def new_target() -> str:
    return f"{uuid.uuid4()}_disk"


def test_an_image_in_the_cluster_is_cloned_without_a_byte_fetched(
    ceph: ceph_lab.Ceph, tmp_path: pathlib.Path
) -> None:
    snapshot = snapshot_image(ceph, DATA)
    source = LocatedSource(DATA, location(ceph, snapshot))
    manager = manager_on(ceph, tmp_path, source)
    assert manager.cache_image("image") is CacheResult.NOT_NEEDED
    disk = manager.create_disk("image", new_target(), size=4 * MIB)
    assert source.opens == 0
    name = RbdName("vms", disk.target)
    assert (disk.format, disk.virtual_size, disk.base) == ("raw", 4 * MIB, None)
    assert read(ceph, name, 0, 4 * MIB) == DATA + bytes(2 * MIB)
    cluster = LibrbdCluster(str(ceph.conf))
    assert cluster.stat(name).parent == snapshot
    manager.flatten_disk(disk)
    assert cluster.stat(name).parent is None
    manager.remove_disk(disk)
    assert disk.target not in cluster.names("vms")


def test_qemu_reads_the_disk(ceph: ceph_lab.Ceph, tmp_path: pathlib.Path) -> None:
    source = LocatedSource(DATA, location(ceph, snapshot_image(ceph, DATA)))
    disk = manager_on(ceph, tmp_path, source).create_disk("image", new_target())
    (tmp_path / "data").write_bytes(DATA)
    url = f"rbd:vms/{disk.target}:conf={ceph.conf}"
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / "data"), url], check=True)


def test_an_image_elsewhere_is_fetched_once_and_imported(ceph: ceph_lab.Ceph, tmp_path: pathlib.Path) -> None:
    seen: list[events.Event] = []
    source = LocatedSource(DATA, "rbd://another-cluster/images/x/snap")
    manager = manager_on(ceph, tmp_path, source, observers=[seen.append])
    for _ in range(2):
        disk = manager.create_disk("image", new_target(), size=3 * MIB)
        assert read(ceph, RbdName("vms", disk.target), 0, 3 * MIB) == DATA + bytes(MIB)
    assert source.opens == 1
    (first, _second) = (event for event in seen if isinstance(event, events.NotCloned))
    assert ceph.fsid in first.reason


def test_an_unprotected_snapshot_is_a_reason_to_refuse(ceph: ceph_lab.Ceph, tmp_path: pathlib.Path) -> None:
    snapshot = snapshot_image(ceph, DATA, protect=False)
    manager = manager_on(
        ceph,
        tmp_path,
        LocatedSource(DATA, location(ceph, snapshot)),
        never_download_image_if_on_rbd=True,
    )
    before = set(LibrbdCluster(str(ceph.conf)).names("vms"))
    with pytest.raises(errors.BackendError, match="not protected"):
        manager.create_disk("image", new_target())
    assert set(LibrbdCluster(str(ceph.conf)).names("vms")) == before


def test_a_missing_pool_is_a_finding(ceph: ceph_lab.Ceph, tmp_path: pathlib.Path) -> None:
    config = CacheConfig(
        instances_path=str(tmp_path), images_rbd_pool="nowhere", images_rbd_ceph_conf=str(ceph.conf)
    )
    (finding,) = RbdBackend.from_config(config, System()).preflight()
    assert "nowhere" in finding


def _size_through(cluster: LibrbdCluster, name: RbdName, answers: Any) -> None:
    answers.put(cluster.stat(name).size)


def test_a_forked_child_has_a_connection_of_its_own(ceph: ceph_lab.Ceph) -> None:
    cluster, name = LibrbdCluster(str(ceph.conf)), RbdName("vms", new_target())
    cluster.create(name, MIB)
    forking = multiprocessing.get_context("fork")
    answers = forking.Queue()
    child = forking.Process(target=_size_through, args=(cluster, name, answers))
    child.start()
    assert answers.get(timeout=240) == MIB
    child.join()
    assert child.exitcode == 0


_EXITS = """
import itertools, sys, threading
from imagecache_lib.backends.ceph import RbdName
from imagecache_lib.backends.librbd import LibrbdCluster

cluster, name, at_work = LibrbdCluster(sys.argv[1]), RbdName("vms", sys.argv[2]), threading.Event()

def chunks():
    for number in itertools.count():
        yield number % 4 * 2**20, bytes(2**20)
        if number == 8:
            at_work.set()

threading.Thread(target=lambda: cluster.fill(name, chunks()), daemon=True).start()
at_work.wait()
"""


def test_a_process_exits_in_the_middle_of_what_a_daemon_thread_writes(ceph: ceph_lab.Ceph) -> None:
    target = new_target()
    LibrbdCluster(str(ceph.conf)).create(RbdName("vms", target), 4 * MIB)
    subprocess.run(
        [sys.executable, "-c", _EXITS, str(ceph.conf), target],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=240,
        check=True,
    )


def _threads() -> int:
    """Return how many threads this process has, librados's own among them."""
    return len(os.listdir("/proc/self/task"))


def test_a_manager_that_is_dropped_leaves_no_threads(ceph: ceph_lab.Ceph, tmp_path: pathlib.Path) -> None:
    source = LocatedSource(DATA, location(ceph, snapshot_image(ceph, DATA)))
    before = _threads()
    manager = manager_on(ceph, tmp_path, source)
    manager.create_disk("image", new_target())
    assert _threads() > before
    del manager
    gc.collect()
    assert _threads() <= before


def test_a_connection_outlives_its_owner_for_as_long_as_something_is_read_through_it(
    ceph: ceph_lab.Ceph,
) -> None:
    snapshot = snapshot_image(ceph, DATA)
    before = _threads()
    chunks = LibrbdCluster(str(ceph.conf)).chunks(snapshot)
    assert b"".join(chunks) == DATA
    del chunks
    assert _threads() <= before


def test_what_a_crash_left_is_swept_when_nobody_has_it_open(
    ceph: ceph_lab.Ceph, tmp_path: pathlib.Path
) -> None:
    cluster = LibrbdCluster(str(ceph.conf))
    config = CacheConfig(
        instances_path=str(tmp_path), images_rbd_pool="vms", images_rbd_ceph_conf=str(ceph.conf)
    )
    later = cluster.stat(snapshot_image(ceph, DATA)).touched + 2 * config.stage_idle_seconds
    dead, alive = (RbdName("vms", f"{new_target()}.{uuid.uuid4().hex}.new") for _ in range(2))
    finished = RbdName("vms", new_target())
    for name in (dead, alive, finished):
        cluster.create(name, MIB)
    assert RbdBackend.from_config(config, System()).sweep() == []
    with opened(ceph, alive):
        assert RbdBackend.from_config(config, System(clock=lambda: later)).sweep() == [dead.image]
    assert {alive.image, finished.image} <= set(cluster.names("vms"))
    cluster.remove(alive)


def test_a_rename_that_a_crash_cut_short_is_mended_and_swept(
    ceph: ceph_lab.Ceph, tmp_path: pathlib.Path
) -> None:
    import rados
    import rbd

    cluster, name = LibrbdCluster(str(ceph.conf)), RbdName("vms", f"{new_target()}.{uuid.uuid4().hex}.new")
    somebodys = RbdName("vms", new_target())
    config = CacheConfig(
        instances_path=str(tmp_path), images_rbd_pool="vms", images_rbd_ceph_conf=str(ceph.conf)
    )
    for each in (name, somebodys):
        cluster.create(each, MIB)
        later = cluster.stat(each).touched + 2 * config.stage_idle_seconds
        with rados.Rados(conffile=str(ceph.conf)) as connected, connected.open_ioctx("vms") as ioctx:
            rbd.RBD().trash_move(ioctx, each.image, 0)
    assert RbdBackend.from_config(config, System()).sweep() == []
    assert RbdBackend.from_config(config, System(clock=lambda: later)).sweep() == [name.image]
    with rados.Rados(conffile=str(ceph.conf)) as connected, connected.open_ioctx("vms") as ioctx:
        assert [entry["name"] for entry in rbd.RBD().trash_list(ioctx)] == [somebodys.image]


def test_cannot_clone_says_what_is_wrong(ceph: ceph_lab.Ceph, tmp_path: pathlib.Path) -> None:
    config = CacheConfig(
        instances_path=str(tmp_path), images_rbd_pool="vms", images_rbd_ceph_conf=str(ceph.conf)
    )
    backend = RbdBackend.from_config(config, System())
    gone = location(ceph, RbdName("images", "gone", "snap"))
    with pytest.raises(CannotClone, match="images/gone@snap"):
        backend.clone(model.Image("image", "raw", locations=(gone,)), new_target(), None)


def test_an_images_bytes_are_read_from_the_cluster_and_not_from_the_service(
    ceph: ceph_lab.Ceph, tmp_path: pathlib.Path
) -> None:
    """Nova's ``enable_rbd_download``, for disks that are files."""
    data = os.urandom(5 * MIB)
    snapshot = snapshot_image(ceph, data)
    source = Located({"image": data}, location(ceph, snapshot))
    cluster = LibrbdCluster(str(ceph.conf))
    manager = ImageCacheManager(
        CacheConfig(instances_path=str(tmp_path)), RbdSource(source, cluster), "qcow2"
    )
    with manager.fetch_or_reuse("image") as base:
        assert pathlib.Path(base.path).read_bytes() == data
    assert source.opens == 0
    # What the service says that it is counts, whatever lies in the cluster.
    other = Located({"other": data[::-1]}, location(ceph, snapshot))
    with pytest.raises(errors.ImageRejected):
        ImageCacheManager(manager.config, RbdSource(other, cluster), "qcow2").cache_image("other")
    gone = Located({"gone": data[:MIB]}, location(ceph, snapshot) + "-gone")
    ImageCacheManager(manager.config, RbdSource(gone, cluster), "qcow2").cache_image("gone")
    assert gone.opens == 1
    assert list((tmp_path / "_base/.imagecache/stage").iterdir()) == []


def test_a_cluster_whose_monitors_do_not_answer_is_given_up_in_time(
    ceph: ceph_lab.Ceph, tmp_path: pathlib.Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        conf = tmp_path / "ceph.conf"
        port = silent.getsockname()[1]
        conf.write_text(f"[global]\nmon host = v2:127.0.0.1:{port}\nauth client required = none\n")
        begun, threads = time.monotonic(), _threads()
        with pytest.raises(errors.BackendError, match="Ceph cannot be reached"):
            LibrbdCluster(str(conf), connect_timeout=2).fsid()
        assert _threads() <= threads
    assert time.monotonic() - begun < 100  # librados itself waits for 300 seconds


class Located(FakeSource):
    """A source that says where it keeps its images."""

    def __init__(self, images: dict[str, bytes], where: str) -> None:
        super().__init__(images)
        self._where = where

    def describe(self, image_id: str) -> model.Image:
        return dataclasses.replace(super().describe(image_id), locations=(self._where,))
