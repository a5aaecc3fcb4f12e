# SPDX-License-Identifier: Apache-2.0
"""Children that are forked, without executing anything, while their parent is at work."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

import imagecache_lib as ic
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

    def test_in_the_middle_of_making_a_disk_which_the_child_leaves(self) -> None:
        """As a program that a third party's backend forks, and that cannot be executed, may do."""
        manager, parent = self.manager(), os.getpid()

        def fork() -> None:
            if (child := os.fork()) == 0:
                raise SystemExit
            os.waitpid(child, 0)

        self.points.at(TracePoint.DISK_MADE, fork)
        try:
            manager.create_disk(ID, self.target())
        finally:
            if os.getpid() != parent:
                os._exit(0)
        self.assertEqual(raw_image(1), content_of(self.target(), "qcow2"))
