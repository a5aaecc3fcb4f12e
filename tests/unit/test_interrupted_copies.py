# SPDX-License-Identifier: Apache-2.0
"""A long copy ends within itself once its caller no longer waits, and leaves nothing."""

from __future__ import annotations

import os
import pathlib
import random
import tempfile
import unittest

from imagecache_lib import CacheConfig, System, errors, model
from imagecache_lib.backends.file import FileBackend
from imagecache_lib.backends.qcow2 import Qcow2Backend
from imagecache_lib.backends.raw import RawBackend
from imagecache_lib.backends.rbd import RbdBackend
from imagecache_lib.system import atomic_file
from imagecache_lib.system.waiter import Waiter
from imagecache_lib.testing.ceph import FakeCluster
from tests.support.tokens import Looks

MIB = 2**20
DATA = random.Random(12).randbytes(9 * MIB)


class TestInterruptedCopies(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.host = System(name="here")
        self.config = CacheConfig(instances_path=str(self.directory), images_rbd_pool="vms")
        # Of another filesystem than the target, so that nothing can be shared.
        fd = os.memfd_create("base")
        self.addCleanup(os.close, fd)
        os.pwrite(fd, DATA, 0)
        self.base = model.BaseImage("image", "0" * 40, f"/proc/self/fd/{fd}", "raw", len(DATA), fd=fd)

    def waiter(self, looks: int) -> Waiter:
        return Waiter(self.host, "image", cancel=Looks(looks))

    def test_a_disk_of_a_file_backend_is_not_made(self) -> None:
        kinds: tuple[type[FileBackend], ...] = (RawBackend, Qcow2Backend)
        for kind in kinds:
            with self.subTest(kind=kind.name):
                backend = kind(self.config, self.host).for_caller(self.waiter(3))
                copying = backend.prepare_standalone(self.base, str(self.directory / "disk"), None)
                with self.assertRaises(errors.CancelledError), copying:
                    self.fail("the copy went on to its end")
                self.assertEqual([], list(self.directory.iterdir()))

    def test_an_image_in_ceph_is_not_made(self) -> None:
        cluster = FakeCluster()
        backend = RbdBackend(self.config, self.host, cluster).for_caller(self.waiter(2))
        copying = backend.prepare_standalone(self.base, "disk", None)
        with self.assertRaises(errors.CancelledError), copying:
            self.fail("the copy went on to its end")
        self.assertEqual([], cluster.names("vms"))

    def test_a_copy_for_a_caller_who_waits_is_whole(self) -> None:
        with (self.directory / "copy").open("wb+") as target:
            assert self.base.fd is not None
            atomic_file.copy_content(self.base.fd, target.fileno(), self.waiter(1000))
            self.assertEqual(DATA, target.read())
