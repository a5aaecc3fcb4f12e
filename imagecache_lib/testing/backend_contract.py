# SPDX-License-Identifier: Apache-2.0
"""What every storage backend must do, as tests that any backend can run::

class TestMyBackend(BackendContract, unittest.TestCase):
    def make_backend(self): ...
    def make_target(self): ...
    def read_disk(self, disk, offset, length): ...
    def write_disk(self, disk, offset, data): ...
    def everything(self): ...
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import unittest
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from imagecache_lib import errors, model
from imagecache_lib.backends.interface import CannotClone, Feature, PendingDisk, StorageBackend
from imagecache_lib.store import layout

# For the type checker this is a test case; at run time it is a mixin, so that nothing runs it by itself.
if TYPE_CHECKING:
    _Case = unittest.TestCase
else:
    _Case = object

MIB = 2**20
_BLOCK = 4096


class _Interrupted(Exception):
    """An exception that no backend knows, and that each must let pass."""


def commit(prepared: AbstractContextManager[PendingDisk]) -> model.Disk:
    """Give a prepared disk its name and return the disk: ``commit(backend.prepare(base, target, None))``."""
    with prepared as pending:
        return pending.commit()


def _pattern(length: int, seed: str) -> bytes:
    """Return bytes in which every block can be told from every other."""
    return b"".join(
        hashlib.sha512(f"{seed}{block}".encode()).digest() * (_BLOCK // 64)
        for block in range(length // _BLOCK)
    )


class BackendContract(_Case):
    """Mix it into a :class:`unittest.TestCase` and supply the methods that raise AssertionError here."""

    #: Virtual size in bytes of the base images that the tests make.
    size = 4 * MIB

    def make_backend(self) -> StorageBackend:
        """Return the backend to test."""
        raise AssertionError("a contract test case supplies make_backend")

    def make_target(self) -> str:
        """Return a target that no disk has, another one each time."""
        raise AssertionError("a contract test case supplies make_target")

    def read_disk(self, disk: model.Disk, offset: int, length: int) -> bytes:
        """Return the bytes that a guest would read. Offset and length are multiples of 512."""
        raise AssertionError("a contract test case supplies read_disk")

    def write_disk(self, disk: model.Disk, offset: int, data: bytes) -> None:
        """Write as a guest would. Offset and length are multiples of 512."""
        raise AssertionError("a contract test case supplies write_disk")

    def everything(self) -> set[str]:
        """Return the names of all entries beside the targets, hidden and half-made ones included."""
        raise AssertionError("a contract test case supplies everything")

    def check_disk(self, disk: model.Disk) -> None:
        """Let a tool of the storage say whether the disk is sound. By default there is no such tool."""

    @contextlib.contextmanager
    def no_space(self) -> Iterator[None]:
        """Leave no room for another disk's data during the body. By default that cannot be tested."""
        self.skipTest("this test case cannot fill its storage")
        yield

    def base_directory(self) -> str:
        """Return the directory that base images shall lie in."""
        return self.enterContext(tempfile.TemporaryDirectory())

    # -- the base image ------------------------------------------------------------------------------

    def setUp(self) -> None:
        super().setUp()
        self._bases = self.base_directory()
        self.backend = self.make_backend()
        self.base = self.make_base("base", self.size)

    def make_base(self, name: str, size: int) -> model.BaseImage:
        """Make a raw base image: data at both ends and a hole between them."""
        path = os.path.join(self._bases, layout.base_name(name))
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.addCleanup(os.close, fd)
        os.pwrite(fd, _pattern(size // 4, name), 0)
        os.ftruncate(fd, size)
        os.pwrite(fd, _pattern(_BLOCK, f"{name} end"), size - _BLOCK)
        os.fsync(fd)
        return model.BaseImage(name, os.path.basename(path), path, "raw", size, fd=fd)

    def content(self, base: model.BaseImage) -> bytes:
        with open(base.path, "rb") as file:
            return file.read()

    def create(self, target: str | None = None, size: int | None = None) -> model.Disk:
        return commit(self.backend.prepare(self.base, target or self.make_target(), size))

    def assert_content(self, disk: model.Disk, base: model.BaseImage) -> None:
        """The disk holds the base's content, and zeros after it."""
        expected = self.content(base)
        self.assertEqual(expected, self.read_disk(disk, 0, len(expected)))
        more = disk.virtual_size - len(expected)
        if more:
            self.assertEqual(bytes(more), self.read_disk(disk, len(expected), more))

    def both(self) -> Iterator[tuple[str, Callable[..., AbstractContextManager[PendingDisk]]]]:
        """Yield both ways to prepare a disk from a base image, by name, each in its subtest."""
        for name in ("prepare", "prepare_standalone"):
            with self.subTest(name):
                yield name, getattr(self.backend, name)

    # -- making --------------------------------------------------------------------------------------

    def test_a_disk_has_the_content_of_its_base(self) -> None:
        before = self.content(self.base)
        for name, prepare in self.both():
            target = self.make_target()
            self.assertFalse(self.backend.exists(target))
            disk = commit(prepare(self.base, target, None))
            self.assertTrue(self.backend.exists(target))
            self.assertEqual((target, self.size), (disk.target, disk.virtual_size))
            self.assert_content(disk, self.base)
            self.assertEqual(disk, self.backend.inspect(target))
            self.check_disk(disk)
            if name == "prepare_standalone":
                self.assertIsNone(disk.base)
        self.assertEqual(before, self.content(self.base))

    def test_every_disk_has_the_format_that_its_backend_is_named_after(self) -> None:
        """A driver may state the format once for all disks of a backend, as Nova does for qcow2."""
        found = set()
        for _name, prepare in self.both():
            for size in (None, self.size + MIB):
                found.add(commit(prepare(self.base, self.make_target(), size)).format)
        self.assertEqual(1, len(found))
        if self.backend.name in ("raw", "qcow2"):
            self.assertEqual({self.backend.name}, found)

    def test_a_disk_is_grown_to_the_size_asked_for(self) -> None:
        for _name, prepare in self.both():
            disk = commit(prepare(self.base, self.make_target(), self.size + 3 * MIB))
            self.assertEqual(self.size + 3 * MIB, disk.virtual_size)
            self.assertEqual(disk, self.backend.inspect(disk.target))
            self.assert_content(disk, self.base)
            self.check_disk(disk)

    def test_a_guest_writes_to_its_own_disk_only(self) -> None:
        before = self.content(self.base)
        for _name, prepare in self.both():
            written, other = (commit(prepare(self.base, self.make_target(), None)) for _ in range(2))
            self.write_disk(written, _BLOCK, b"guest" * 512)
            self.assertEqual(b"guest" * 512, self.read_disk(written, _BLOCK, 2560))
            self.assert_content(other, self.base)
        self.assertEqual(before, self.content(self.base))

    def test_a_disk_has_no_name_until_it_is_committed(self) -> None:
        for _name, prepare in self.both():
            target = self.make_target()
            with prepare(self.base, target, self.size + MIB) as pending:
                self.assertFalse(self.backend.exists(target))
                disk = pending.commit()
                self.assertEqual(disk, self.backend.inspect(target))
            self.assertEqual(disk, self.backend.inspect(target))
            self.assert_content(disk, self.base)

    def test_nothing_is_left_of_a_disk_that_is_not_committed(self) -> None:
        for _name, prepare in self.both():
            target, before = self.make_target(), self.everything()
            with prepare(self.base, target, self.size + MIB):
                pass
            self.assertFalse(self.backend.exists(target))
            self.assertEqual(before, self.everything())
            self.assert_content(commit(prepare(self.base, target, None)), self.base)

    def test_an_exception_before_the_commit_passes_and_leaves_nothing(self) -> None:
        for _name, prepare in self.both():
            target, before = self.make_target(), self.everything()
            for error in (_Interrupted, KeyboardInterrupt):
                with self.assertRaises(error), prepare(self.base, target, self.size + MIB):
                    raise error
                self.assertFalse(self.backend.exists(target))
                self.assertEqual(before, self.everything())
            self.assert_content(commit(prepare(self.base, target, None)), self.base)

    def test_an_exception_after_the_commit_passes_and_leaves_the_disk(self) -> None:
        for _name, prepare in self.both():
            target = self.make_target()
            with self.assertRaises(_Interrupted), prepare(self.base, target, None) as pending:
                disk = pending.commit()
                raise _Interrupted
            self.assertEqual(disk, self.backend.inspect(target))
            self.assert_content(disk, self.base)

    def test_a_disk_that_was_just_made_is_durable(self) -> None:
        for _name, prepare in self.both():
            disk = commit(prepare(self.base, self.make_target(), None))
            self.assertTrue(self.backend.ensure_durable(disk.target))
            self.assertEqual(disk, self.backend.inspect(disk.target))
            self.assert_content(disk, self.base)

    def test_an_existing_disk_is_never_overwritten(self) -> None:
        mine = self.create()
        self.write_disk(mine, 0, b"mine" * 128)
        before = self.everything()
        other = self.make_base("other", self.size)
        for _name, prepare in self.both():
            with self.assertRaises(errors.DiskExistsError) as caught:
                commit(prepare(other, mine.target, self.size + MIB))
            self.assertIn(mine.target, str(caught.exception))
            self.assertEqual(before, self.everything())
            self.assertEqual(mine, self.backend.inspect(mine.target))
            self.assertEqual(b"mine" * 128, self.read_disk(mine, 0, 512))

    def test_a_disk_that_appears_meanwhile_is_never_overwritten(self) -> None:
        other = self.make_base("other", self.size)
        for _name, prepare in self.both():
            target = self.make_target()
            with self.assertRaises(errors.DiskExistsError), prepare(other, target, None) as pending:
                made = self.create(target)
                pending.commit()
            self.assertEqual(made, self.backend.inspect(target))
            self.assert_content(made, self.base)

    def test_of_many_that_want_one_target_one_gets_it(self) -> None:
        target = self.make_target()
        outcomes = self._at_once([target] * 6)
        self.assertEqual(1, sum(isinstance(outcome, model.Disk) for outcome in outcomes), outcomes)
        others = [outcome for outcome in outcomes if not isinstance(outcome, model.Disk)]
        self.assertEqual([errors.DiskExistsError] * 5, [type(outcome) for outcome in others])
        self.assert_content(self.backend.inspect(target), self.base)

    def test_many_disks_are_made_at_once_from_one_base(self) -> None:
        targets = [self.make_target() for _ in range(12)]
        for outcome in self._at_once(targets):
            if not isinstance(outcome, model.Disk):
                raise outcome
            self.assertEqual(outcome, self.backend.inspect(outcome.target))
            self.assert_content(outcome, self.base)
            self.check_disk(outcome)

    def _at_once(self, targets: list[str]) -> list[model.Disk | BaseException]:
        outcomes: list[model.Disk | BaseException] = []
        start = threading.Barrier(len(targets))

        def make(target: str) -> None:
            start.wait()
            try:
                outcomes.append(self.create(target))
            except BaseException as error:
                outcomes.append(error)

        threads = [threading.Thread(target=make, args=(target,)) for target in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    def test_a_full_storage_leaves_nothing_behind(self) -> None:
        target, before = self.make_target(), self.everything()
        base = self.base
        with self.no_space(), self.assertRaises(errors.NoSpaceError):
            commit(self.backend.prepare_standalone(base, target, None))
        self.assertFalse(self.backend.exists(target))
        self.assertEqual(before, self.everything())
        self.assert_content(commit(self.backend.prepare_standalone(base, target, None)), base)

    def test_a_target_that_cannot_be_is_refused(self) -> None:
        self.backend.check_target(self.make_target())
        for target in ("", "a\0b"):
            with self.subTest(target), self.assertRaises(errors.BackendError):
                self.backend.check_target(target)

    def test_what_is_not_there_cannot_be_inspected(self) -> None:
        target = self.make_target()
        with self.assertRaises(errors.BackendError) as caught:
            self.backend.inspect(target)
        self.assertIn(target, str(caught.exception))

    # -- afterwards ----------------------------------------------------------------------------------

    def test_resize_grows_and_keeps_what_the_guest_wrote(self) -> None:
        disk = self.create()
        self.write_disk(disk, 512, b"kept" * 128)
        for size in (self.size, self.size + 2 * MIB, self.size + 2 * MIB):
            disk = self.backend.resize(disk, size)
            self.assertEqual(size, disk.virtual_size)
            self.assertEqual(disk, self.backend.inspect(disk.target))
        self.assertEqual(b"kept" * 128, self.read_disk(disk, 512, 512))
        self.assertEqual(bytes(2 * MIB), self.read_disk(disk, self.size, 2 * MIB))
        self.check_disk(disk)

    def test_a_size_between_sectors_gives_no_less(self) -> None:
        disk = self.create(size=self.size + 513)
        self.assertIn(disk.virtual_size, range(self.size + 513, self.size + MIB))
        grown = self.backend.resize(disk, self.size + MIB + 1)
        self.assertIn(grown.virtual_size, range(self.size + MIB + 1, self.size + 2 * MIB))
        self.assertEqual(grown, self.backend.inspect(disk.target))
        self.check_disk(grown)

    def test_resize_never_shrinks(self) -> None:
        disk = self.create(size=self.size + MIB)
        with self.assertRaises(errors.DiskTooSmallError):
            self.backend.resize(disk, self.size)
        # Not even when the caller's idea of the disk is out of date.
        self.backend.resize(disk, self.size + 2 * MIB)
        with self.assertRaises(errors.DiskTooSmallError):
            self.backend.resize(disk, self.size + MIB)
        self.assertEqual(self.size + 2 * MIB, self.backend.inspect(disk.target).virtual_size)
        self.assertEqual(self.content(self.base), self.read_disk(disk, 0, self.size))

    def test_flatten_makes_a_disk_stand_alone(self) -> None:
        disk = self.create(size=self.size + MIB)
        self.write_disk(disk, 512, b"kept" * 128)
        expected = self.read_disk(disk, 0, disk.virtual_size)
        flat = self.backend.flatten(disk)
        self.assertIsNone(flat.base)
        self.assertEqual(flat, self.backend.inspect(disk.target))
        self.assertEqual(flat, self.backend.flatten(flat))
        self.assertEqual(flat, self.backend.flatten(disk))
        os.rename(self.base.path, f"{self.base.path}.away")
        self.assertEqual(expected, self.read_disk(flat, 0, flat.virtual_size))
        self.check_disk(flat)

    def test_remove_leaves_nothing_and_may_be_repeated(self) -> None:
        before = self.everything()
        for _name, prepare in self.both():
            target = self.make_target()
            disk = commit(prepare(self.base, target, None))
            for _time in range(2):
                self.backend.remove(disk)
                self.assertFalse(self.backend.exists(target))
            self.assertEqual(before, self.everything())
            commit(prepare(self.base, target, None))
            self.backend.remove(disk)

    # -- what it says of itself ----------------------------------------------------------------------

    def test_features_are_declared_as_they_are(self) -> None:
        features = self.backend.features
        self.assertTrue(self.backend.name)
        disk = self.create()
        self.assertEqual(Feature.OVERLAY in features, disk.base is not None)
        if disk.base is not None:
            self.assertEqual(self.base.name, disk.base)
            self.assertIn(Feature.FLATTEN, features)
        if Feature.CLONE not in features:
            with self.assertRaises(CannotClone):
                self.backend.clone(model.Image("id", "raw"), self.make_target(), None)

    def test_a_good_set_up_has_no_findings(self) -> None:
        self.assertEqual([], self.backend.preflight())
