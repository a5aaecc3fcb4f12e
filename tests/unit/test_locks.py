# SPDX-License-Identifier: Apache-2.0
"""File locks: threads, processes and Nova exclude each other; what breaks them costs work only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator

from imagecache_lib import errors
from imagecache_lib.system import holders, locks
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter
from tests.support import leftovers

NAME = "a" * 40

#: Another process that takes the lock and says so, until it is told to end.
_OURS = """
import sys
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter
from imagecache_lib.system import holders, locks
with locks.without_waiting(sys.argv[1], host=System(name="there")) as got:
    print("held" if got else "busy", flush=True)
    sys.stdin.read()
"""

#: The same with what Nova uses: oslo.concurrency's external lock, whose prefix makes the name.
_NOVAS = """
import os, sys
from oslo_concurrency import lockutils
directory, name = os.path.split(sys.argv[1])
with lockutils.external_lock(name.removeprefix("nova-"), lock_file_prefix="nova", lock_path=directory):
    print("held", flush=True)
    sys.stdin.read()
"""


class LockCase(unittest.TestCase):
    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory(prefix="imagecache-")
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.path = os.path.join(directory.name, "locks", f"nova-{NAME}")
        self.host = System(name="here")
        # What an earlier test waited for in vain is free by now: files are counted without it.
        with locks.without_waiting(os.path.join(directory.name, "first"), host=self.host):
            pass

    def take(
        self,
        *,
        shared: bool = False,
        stall_timeout: float = 0.0,
        host: System | None = None,
        waiter: Waiter | None = None,
    ) -> contextlib.AbstractContextManager[bool]:
        return locks.waiting(
            self.path,
            shared=shared,
            host=host or self.host,
            stall_timeout=stall_timeout,
            waiter=waiter,
        )

    def is_free(self, *, shared: bool = False) -> bool:
        """Whether another thread can have it."""
        found: list[bool] = []

        def look() -> None:
            with self.take(shared=shared) as got:
                found.append(got)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return found[0]

    @contextlib.contextmanager
    def held_elsewhere(self, program: str) -> Iterator[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", program, self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None and child.stdout is not None
        with child:
            yield child.stdout.readline().strip()
            child.stdin.close()


class TestExclusion(LockCase):
    def test_threads_exclude_each_other(self) -> None:
        with self.take() as got:
            self.assertTrue(got)
            self.assertFalse(self.is_free())
            self.assertFalse(self.is_free(shared=True))
        self.assertTrue(self.is_free())

    def test_sharers_share_and_keep_others_out(self) -> None:
        with self.take(shared=True) as got:
            self.assertTrue(got)
            self.assertTrue(self.is_free(shared=True))
            self.assertFalse(self.is_free())
        self.assertTrue(self.is_free())

    def test_processes_exclude_each_other(self) -> None:
        with self.held_elsewhere(_OURS) as said:
            self.assertEqual("held", said)
            self.assertFalse(self.is_free())
        self.assertTrue(self.is_free())

    def test_nova_and_we_exclude_each_other(self) -> None:
        with self.held_elsewhere(_NOVAS) as said:
            self.assertEqual("held", said)
            self.assertFalse(self.is_free())
            self.assertFalse(self.is_free(shared=True))
        with self.take(shared=True) as got:
            self.assertTrue(got)
            with self.held_elsewhere(_OURS) as said:
                self.assertEqual("busy", said)

    def test_closing_another_descriptor_of_the_file_drops_nothing(self) -> None:
        with self.take():
            with open(self.path, "rb"):
                pass
            self.assertFalse(self.is_free())
            with self.held_elsewhere(_OURS) as said:
                self.assertEqual("busy", said)

    def test_a_lock_that_nothing_refers_to_any_more_is_free(self) -> None:
        # As after an interrupt that came while it was being released.
        lock = locks.FileLock(self.path, shared=False, host=self.host)
        self.assertTrue(lock.acquire(blocking=False))
        self.assertFalse(self.is_free())
        del lock
        self.assertTrue(self.is_free())

    def test_a_forked_child_keeps_nothing(self) -> None:
        reader, writer = os.pipe()
        started, starting = os.pipe()
        lock = self.take()
        self.assertTrue(lock.__enter__())
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.write(starting, b".")
            os.read(reader, 1)  # live until the test is done
            os._exit(0)
        os.close(reader)
        os.read(started, 1)
        os.close(started)
        os.close(starting)
        try:
            self.assertFalse(self.is_free())
            lock.__exit__(None, None, None)
            self.assertTrue(self.is_free())
        finally:
            os.close(writer)
            os.waitpid(child, 0)

    def test_a_child_that_outlives_its_parent_keeps_nothing(self) -> None:
        program = """
import os, sys, time
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter
from imagecache_lib.system import holders, locks
lock = locks.waiting(sys.argv[1], shared=False, host=System(), stall_timeout=0)
assert lock.__enter__()
parent = os.getpid()
if os.fork():
    os._exit(0)
# A process that ends hands its children over after all its files are released. A pipe's end may come
# before: the kernel releases the files in no order that one could rely on.
while os.getppid() == parent:
    time.sleep(0.001)
print("alive", flush=True)
sys.stdin.read()
"""
        with self.held_elsewhere(program) as said:
            self.assertEqual("alive", said)
            self.assertTrue(self.is_free())


class TestNovaInThisProcess(LockCase):
    """Nova's POSIX locks belong to the process, and ours to the open file: on one file they meet."""

    @contextlib.contextmanager
    def novas(self) -> Iterator[None]:
        with open(self.path, "a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def assert_novas_lock_is_there(self) -> None:
        with self.held_elsewhere(_OURS) as said:
            self.assertEqual("busy", said)

    def setUp(self) -> None:
        super().setUp()
        os.makedirs(os.path.dirname(self.path))

    def test_a_try_of_ours_drops_no_lock_of_novas(self) -> None:
        with self.novas():
            for _ in range(3):
                with locks.without_waiting(self.path, host=self.host) as got:
                    self.assertFalse(got)
            self.assert_novas_lock_is_there()
        self.assertTrue(self.is_free())

    def test_a_wait_of_ours_that_ends_in_vain_drops_no_lock_of_novas(self) -> None:
        with self.novas():
            with self.take(stall_timeout=0.1) as got:
                self.assertFalse(got)
            with self.take(shared=True, stall_timeout=0.1) as got:
                self.assertFalse(got)
            self.assert_novas_lock_is_there()

    def test_a_look_of_ours_drops_no_lock_of_novas(self) -> None:
        with self.novas():
            self.assertTrue(locks.is_taken(self.path, host=self.host))
            self.assertTrue(locks.is_taken(self.path, host=self.host))
            self.assert_novas_lock_is_there()
        self.assertFalse(locks.is_taken(self.path, host=self.host))

    def test_nova_gets_its_lock_only_once_ours_cannot_drop_it_any_more(self) -> None:
        """Nova tries all the time, as its own waiting does, and ours comes and goes."""
        ended = threading.Event()
        lost: list[str] = []

        def nova() -> None:
            while not ended.is_set():
                with contextlib.suppress(BlockingIOError), self.novas(), open(self.path, "rb") as looker:
                    # Looked at from another open file, as another process would.
                    if not locks.is_locked(looker.fileno()):
                        lost.append("lost")

        thread = threading.Thread(target=nova)
        thread.start()
        try:
            for _ in range(2000):
                with self.take(stall_timeout=5):
                    pass
                with locks.without_waiting(self.path, host=self.host):
                    pass
                locks.is_taken(self.path, host=self.host)
        finally:
            ended.set()
            thread.join()
        self.assertEqual([], lost)

    def test_no_descriptors_are_left_when_nova_is_done(self) -> None:
        with self.novas():
            for _ in range(5):
                locks.is_taken(self.path, host=self.host)
                with locks.without_waiting(self.path, host=self.host):
                    pass
        self.assertTrue(self.is_free())
        self.assertEqual([], leftovers.open_below(self.directory))

    def test_a_lock_that_is_asked_for_closes_the_files_of_others_that_are_free(self) -> None:
        with self.novas():
            locks.is_taken(self.path, host=self.host)
            self.assertEqual([self.path] * 2, leftovers.open_below(self.directory))
        with locks.without_waiting(f"{self.path}-another", host=self.host):
            pass
        self.assertEqual([], leftovers.open_below(self.directory))

    def test_a_parked_descriptor_of_a_file_that_nova_unlinked_is_not_used(self) -> None:
        with self.novas():
            locks.is_taken(self.path, host=self.host)
            os.unlink(self.path)
        with locks.without_waiting(self.path, host=self.host) as got:
            self.assertTrue(got)
            with self.held_elsewhere(_OURS) as said:
                self.assertEqual("busy", said)


class TestLeases(LockCase):
    """A lease is a lock on a byte of the base image, beside QEMU's."""

    def setUp(self) -> None:
        super().setUp()
        self.file = os.path.join(os.path.dirname(os.path.dirname(self.path)), "base")
        pathlib.Path(self.file).write_bytes(bytes(2**20))

    def opened(self) -> int:
        fd = os.open(self.file, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        return fd

    def test_leases_share_and_each_is_seen_until_its_end(self) -> None:
        first, second, looker = self.opened(), self.opened(), self.opened()
        self.assertFalse(holders.is_leased(looker))
        end_first = holders.lease(first, self.host)
        end_second = holders.lease(second, self.host)
        end_first()
        self.assertTrue(holders.is_leased(looker))
        self.assertFalse(holders.is_open_in_qemu(looker))
        end_second()
        self.assertFalse(holders.is_leased(looker))

    def test_qemu_may_open_what_is_leased_and_both_are_seen(self) -> None:
        leased, looker = self.opened(), self.opened()
        end = holders.lease(leased, self.host)
        with subprocess.Popen(
            ["qemu-io", "-f", "raw", self.file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as qemu:
            assert qemu.stdin is not None and qemu.stdout is not None
            qemu.stdin.write(b"length\n")
            qemu.stdin.flush()
            self.assertIn(b"1", qemu.stdout.readline())  # it has opened the image, for writing
            self.assertTrue(holders.is_open_in_qemu(looker))
            end()
            self.assertFalse(holders.is_leased(looker))
            qemu.stdin.close()

    def test_an_earlier_release_takes_a_lease_for_qemus_and_keeps_the_base(self) -> None:
        leased, looker = self.opened(), self.opened()
        holders.lease(leased, self.host)
        self.assertTrue(locks.is_locked(looker, 100, 200))  # the bytes that it asks about


class TestUnlinkedFiles(LockCase):
    """Nova unlinks its lock files; whoever then holds the old one would be alone with it."""

    def test_a_waiter_takes_the_file_that_is_there_now(self) -> None:
        with self.take():
            os.unlink(self.path)
            pathlib.Path(self.path).touch()
            with self.take() as got:
                self.assertTrue(got)
                self.assertFalse(self.is_free())

    def test_a_file_that_was_swapped_between_open_and_lock_is_not_the_one(self) -> None:
        lock = locks.FileLock(self.path, shared=False, host=self.host)
        self.addCleanup(lock.let_go)
        lock._do_open()
        os.unlink(self.path)
        self.assertTrue(lock.acquire(timeout=5))
        self.assertFalse(self.is_free())
        with self.held_elsewhere(_OURS) as said:
            self.assertEqual("busy", said)

    def test_we_never_unlink_one(self) -> None:
        with self.take():
            pass
        self.assertEqual([f"nova-{NAME}"], os.listdir(os.path.dirname(self.path)))


class Work:
    """What the holder of a lock works on."""

    def __init__(self, progress: Callable[[], object] = lambda: None, *, done: bool = False) -> None:
        self._progress = progress
        self._done = done

    def progress(self) -> object:
        return self._progress()

    def is_done(self) -> bool:
        return self._done


class TestWaiting(LockCase):
    def test_after_the_stall_timeout_a_waiter_goes_on_without(self) -> None:
        logged = self.assertLogs("imagecache_lib.system.locks", "WARNING")
        with self.take(), logged, self.take(stall_timeout=0.1) as got:
            self.assertFalse(got)

    def test_progress_renews_the_stall_timeout(self) -> None:
        begun = time.monotonic()
        changes = [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
        with self.take():
            waiting = locks.waiting(
                self.path,
                shared=False,
                host=self.host,
                stall_timeout=0.3,
                watched=Work(progress=lambda: changes.pop(0) if len(changes) > 1 else 3),
            )
            with waiting as got:
                self.assertFalse(got)
        self.assertGreater(time.monotonic() - begun, 0.9)

    def test_a_clock_that_is_set_back_makes_nobody_wait(self) -> None:
        days = iter(range(10**6, 0, -1))
        host = System(clock=lambda: 86400.0 * next(days))
        begun = time.monotonic()
        with self.take(), self.take(stall_timeout=0.1, host=host) as got:
            self.assertFalse(got)
        self.assertLess(time.monotonic() - begun, 60)

    def test_nobody_waits_for_a_lock_of_its_own_caller(self) -> None:
        def outer() -> contextlib.AbstractContextManager[bool]:
            return locks.waiting(self.path, shared=False, host=self.host, stall_timeout=60, calls_back=True)

        logged = self.assertLogs("imagecache_lib.system.locks", "WARNING")
        with outer() as first, logged, outer() as second, outer() as third:
            self.assertEqual((True, False, False), (first, second, third))
            self.assertFalse(self.is_free())
        with outer() as again:
            self.assertTrue(again)

    def test_a_wait_whose_reason_is_gone_ends(self) -> None:
        with self.take():
            waiting = locks.waiting(
                self.path, shared=False, host=self.host, stall_timeout=60, watched=Work(done=True)
            )
            with waiting as got:
                self.assertFalse(got)

    def test_waits_that_raise_leave_no_descriptors_behind(self) -> None:
        cancelled = threading.Event()
        cancelled.set()
        waiter = Waiter(self.host, cancel=cancelled)
        with self.take():
            for _ in range(5):
                with self.assertRaises(errors.CancelledError), self.take(stall_timeout=60, waiter=waiter):
                    self.fail("it was not free")
            # One stays as long as the lock is held, for whoever wants the lock next.
            self.assertEqual([self.path] * 2, leftovers.open_below(self.directory))
        self.assertTrue(self.is_free())
        self.assertEqual([], leftovers.open_below(self.directory))

    def test_a_lock_is_let_go_when_the_body_raises(self) -> None:
        with self.assertRaises(KeyError), self.take():
            raise KeyError
        self.assertTrue(self.is_free())

    def test_locks_may_all_be_no_ops(self) -> None:
        broken = System(name="here", locking=False)
        with self.take(host=broken) as first, self.take(host=broken) as second:
            self.assertEqual((True, True), (first, second))
            self.assertTrue(self.is_free())

    def test_without_waiting_is_without_waiting(self) -> None:
        with self.take(shared=True), locks.without_waiting(self.path, host=self.host) as got:
            self.assertFalse(got)
        with locks.without_waiting(self.path, host=self.host) as got:
            self.assertTrue(got)
            self.assertFalse(self.is_free())


class TestOwners(LockCase):
    def setUp(self) -> None:
        super().setUp()
        self.file = os.path.join(os.path.dirname(os.path.dirname(self.path)), "stage")

    def owned(self) -> holders.OwnerLock:
        return holders.OwnerLock(self.held(), self.host)

    def held(self) -> locks.HeldDescriptor:
        return locks.HeldDescriptor(self.file, os.O_RDWR | os.O_CREAT)

    def test_an_owner_is_seen_by_others_for_as_long_as_it_lives(self) -> None:
        owner = self.owned()
        looker = os.open(self.file, os.O_RDWR)
        self.addCleanup(os.close, looker)
        self.assertTrue(holders.has_owner(looker))
        self.assertFalse(holders.try_own(looker))
        owner.close()
        self.assertFalse(holders.has_owner(looker))
        self.assertTrue(holders.try_own(looker))

    def test_a_child_that_was_forked_as_the_file_was_opened_keeps_no_lock_on_it(self) -> None:
        held = self.held()
        shared = os.dup(held.fd)  # which is not known as one that a child closes
        ready, end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(end)
            os.read(ready, 1)
            os._exit(0)
        os.close(ready)
        os.close(shared)
        try:
            holders.OwnerLock(held, self.host).close()
            other = os.open(self.file, os.O_RDWR)
            try:
                self.assertIs(False, holders.has_owner(other))
            finally:
                os.close(other)
        finally:
            os.close(end)
            os.waitpid(child, 0)

    def test_a_child_that_closes_an_owners_file_leaves_the_lock(self) -> None:
        owner = self.owned()
        child = os.fork()
        if child == 0:
            owner.close()
            os._exit(0)
        os.waitpid(child, 0)
        other = os.open(self.file, os.O_RDWR)
        try:
            self.assertTrue(holders.has_owner(other))
        finally:
            os.close(other)
            owner.close()

    def test_qemu_img_may_write_into_an_owned_file(self) -> None:
        owner = self.owned()
        self.addCleanup(owner.close)
        os.ftruncate(owner.fd, 2**20)
        command = ["qemu-io", "-f", "raw", "-c", "write -P 7 0 512", self.file]
        subprocess.run(command, check=True, capture_output=True)
        self.assertEqual(bytes([7]) * 512, os.pread(owner.fd, 512, 0))

    def test_whoever_has_the_bytes_of_qemu_is_seen(self) -> None:
        pathlib.Path(self.file).write_bytes(bytes(2**20))
        with open(self.file, "rb") as looker:
            self.assertFalse(locks.is_locked(looker.fileno(), 100, 200))
            with subprocess.Popen(
                ["qemu-io", "-f", "raw", self.file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            ) as qemu:
                assert qemu.stdin is not None and qemu.stdout is not None
                qemu.stdin.write(b"length\n")
                qemu.stdin.flush()
                qemu.stdout.readline()  # it has opened the image
                self.assertTrue(locks.is_locked(looker.fileno(), 100, 200))
                qemu.stdin.close()
