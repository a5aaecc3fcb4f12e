# SPDX-License-Identifier: Apache-2.0
"""Children that are forked, without executing anything, while their parent is at work."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable

import imagecache_lib as ic
from imagecache_lib.precache import job
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.system.trace import TracePoint
from tests.support.cache_case import ID, OTHER_ID, CacheCase, Stop, content_of, raw_image

_LIMIT = 30


class TestForkedChildren(CacheCase):
    def assertWorksInChild(self, call: Callable[[], object]) -> None:
        """Make a call in a forked child, which must return."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(_LIMIT)  # which ends it: a lock that nobody gives back is waited for for ever
                call()
                status = 0
            finally:
                os._exit(status)
        self.assertEqual(0, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    def at_work(self, call: Callable[[], object], stop: Stop) -> None:
        """Let another thread make a call, as far as a place at which it waits until the test ends."""
        thread = threading.Thread(target=call)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(stop.go_on)
        stop.wait()

    def test_while_the_manager_starts(self) -> None:
        stop, parent, looks = Stop(), os.getpid(), []

        def monotonic() -> float:
            looks.append(1)
            if len(looks) == 2 and os.getpid() == parent:
                stop()  # as it looks at the directories that it has made
            return 0.0

        manager = self.manager(host=self.host(monotonic=monotonic))
        self.at_work(lambda: manager.cache_image(OTHER_ID), stop)

        def work() -> None:
            self.assertEqual(["here"], [host.name for host in manager.list_hosts()])
            manager.create_disk(ID, self.target())

        self.assertWorksInChild(work)
        self.assertTrue(os.path.exists(self.target()))

    def test_while_all_slots_for_fetching_are_taken(self) -> None:
        stop = self.points.stop_at(TracePoint.INGEST_RESERVED)
        manager = self.manager(max_concurrent_disk_ops=1)
        self.at_work(lambda: manager.cache_image(OTHER_ID), stop)
        self.assertWorksInChild(lambda: manager.create_disk(ID, self.target()))

    def test_in_the_body_of_a_lease_which_the_child_leaves(self) -> None:
        manager = self.manager(remove_unused_original_minimum_age_seconds=0)
        with contextlib.ExitStack() as held:
            held.enter_context(manager.fetch_or_reuse(ID))
            self.assertWorksInChild(held.close)
            with self.assertRaisesRegex(ic.BaseInUseError, "leased"):
                self.manager().evict_image(ID)
        self.manager().evict_image(ID)
        self.assertFalse(self.base().exists())

    def leave_in_child(self, point: TracePoint, call: Callable[[], object]) -> None:
        """Make a call, in the middle of which a child is forked that leaves it by an exception.

        As a program that a third party's backend or observer forks, and that cannot be executed, may do.
        """
        parent = os.getpid()

        def fork() -> None:
            if (child := os.fork()) == 0:
                signal.alarm(_LIMIT)
                raise SystemExit
            self.assertEqual(0, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

        self.points.at(point, fork)
        try:
            call()
        finally:
            if os.getpid() != parent:
                os._exit(0)
        self.assertIn(point, self.points.seen)

    def test_in_the_middle_of_making_a_disk_which_the_child_leaves(self) -> None:
        manager = self.manager()
        self.leave_in_child(TracePoint.DISK_MADE, lambda: manager.create_disk(ID, self.target()))
        self.assertEqual(raw_image(1), content_of(self.target(), "qcow2"))

    def test_in_the_middle_of_a_fetch_which_the_child_leaves(self) -> None:
        """It removes nothing of what came, nor the pin, and waits for no thread of its parent's."""
        manager = self.manager()
        began = time.monotonic()
        self.leave_in_child(
            TracePoint.TRANSFER_CHUNK, lambda: manager.cache_image(ID, pin_until=time.time() + 1000)
        )
        self.assertLess(time.monotonic() - began, 4)
        self.assertEqual([0], self.source.offsets)
        self.assertEqual(1, len(manager.list_pins()))

    def test_in_the_middle_of_an_eviction_which_the_child_leaves(self) -> None:
        """It puts nothing back."""
        for point in (TracePoint.EVICT_RENAME, TracePoint.EVICT_READ):
            with self.subTest(point):
                manager = self.manager()
                manager.cache_image(ID)
                self.leave_in_child(point, functools.partial(manager.evict_image, ID))
                self.assertFalse(self.base().exists())

    def test_in_the_middle_of_storing_a_job_which_the_child_leaves(self) -> None:
        """It rolls nothing back: so large a transaction has pages in the database's log already."""
        database = JobDatabase(self.target("jobs"), host=self.host())
        names = [f"{number}-{'x' * 5000}" for number in range(600)]
        made: list[job.Job] = []
        self.leave_in_child(
            TracePoint.JOBS_COMMIT,
            lambda: made.append(database.add("racks", names, ["image"], job.Terms(), now=1.0)),
        )
        self.assertEqual(names, list(made[0].hosts))
        self.assertWorksInChild(lambda: database.cancel(made[0].id))
        self.assertTrue(database.get(made[0].id).cancelled)
        database.close()
        with contextlib.closing(sqlite3.connect(self.target("jobs"))) as connection:
            self.assertEqual([("ok",)], connection.execute("PRAGMA integrity_check").fetchall())
