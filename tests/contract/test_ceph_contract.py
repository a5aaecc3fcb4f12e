# SPDX-License-Identifier: Apache-2.0
"""The cluster in memory, and the rbd backend on it, against their contracts."""

from __future__ import annotations

import contextlib
import unittest
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager

from imagecache_lib import CacheConfig, System, model
from imagecache_lib.backends.ceph import RbdName
from imagecache_lib.backends.rbd import RbdBackend
from imagecache_lib.testing.backend_contract import BackendContract
from imagecache_lib.testing.ceph import FakeCluster
from imagecache_lib.testing.ceph_contract import CephContract


class TestFakeCluster(CephContract, unittest.TestCase):
    def make_cluster(self) -> FakeCluster:
        self.fake = FakeCluster()
        return self.fake

    def read(self, name: RbdName, offset: int, length: int) -> bytes:
        return self.fake.read(name, offset, length)

    def opened(self, name: RbdName) -> AbstractContextManager[object]:
        return self.fake.opened(name)

    def create_snapshot(self, name: RbdName, *, protect: bool = True) -> None:
        self.fake.create_snapshot(name, protect=protect)

    def remove_snapshot(self, name: RbdName) -> None:
        self.fake.remove_snapshot(name)


class TestRbdOnFakeCluster(BackendContract, unittest.TestCase):
    def make_backend(self) -> RbdBackend:
        self.cluster = FakeCluster()
        config = CacheConfig(instances_path="/instances", images_rbd_pool="vms")
        return RbdBackend(config, System(name="here"), self.cluster)

    def make_target(self) -> str:
        return f"{uuid.uuid4()}_disk"

    def read_disk(self, disk: model.Disk, offset: int, length: int) -> bytes:
        return self.cluster.read(RbdName("vms", disk.target), offset, length)

    def write_disk(self, disk: model.Disk, offset: int, data: bytes) -> None:
        self.cluster.write(RbdName("vms", disk.target), offset, data)

    def everything(self) -> set[str]:
        return set(self.cluster.names("vms"))

    @contextlib.contextmanager
    def no_space(self) -> Iterator[None]:
        self.cluster.is_full = True
        try:
            yield
        finally:
            self.cluster.is_full = False
