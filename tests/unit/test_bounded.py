# SPDX-License-Identifier: Apache-2.0
"""Calls that may never return."""

from __future__ import annotations

import os
import threading
import unittest

from imagecache_lib.system.bounded import Bounded


class TestBounded(unittest.TestCase):
    def setUp(self) -> None:
        self.go_on = threading.Event()
        self.addCleanup(self.go_on.set)

    def test_what_a_call_returns_is_returned(self) -> None:
        self.assertEqual([3], Bounded().call(lambda: 3))

    def test_one_that_does_not_return_is_given_up_and_no_other_is_begun(self) -> None:
        bounded = Bounded(0.05)
        self.assertEqual([], bounded.call(self.go_on.wait))
        self.assertTrue(bounded.is_stuck)
        begun: list[int] = []
        self.assertEqual([], bounded.call(lambda: begun.append(1)))
        self.assertEqual([], begun)

    def test_a_child_that_is_forked_during_a_call_makes_its_own(self) -> None:
        bounded = Bounded(60.0)
        begun = threading.Event()

        def wait() -> None:
            begun.set()
            self.go_on.wait()

        thread = threading.Thread(target=bounded.call, args=(wait,))
        thread.start()
        self.assertTrue(begun.wait(30))
        child = os.fork()
        if child == 0:
            answers: list[int] = []
            caller = threading.Thread(target=lambda: answers.extend(bounded.call(lambda: 7)), daemon=True)
            caller.start()
            caller.join(30)
            os._exit(0 if answers == [7] else 1)
        self.go_on.set()
        thread.join()
        self.assertEqual(0, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
