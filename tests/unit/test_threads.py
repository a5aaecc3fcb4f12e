# SPDX-License-Identifier: Apache-2.0
"""Starting threads: one whose starter is interrupted does nothing."""

from __future__ import annotations

import threading
import unittest

from imagecache_lib import errors
from imagecache_lib.system import threads
from tests.support import leftovers
from tests.support.no_threads import no_more_threads


class Interrupted(threading.Thread):
    """A thread whose starter is interrupted while it waits until the thread runs."""

    def start(self) -> None:
        super().start()
        raise KeyboardInterrupt


class TestStart(unittest.TestCase):
    def test_a_thread_does_not_begin_where_its_starter_is_interrupted(self) -> None:
        begun = threading.Event()
        with leftovers.no_thread_left(), self.assertRaises(KeyboardInterrupt):
            threads.start(Interrupted(target=begun.set))
        self.assertFalse(begun.is_set())

    def test_a_thread_begins_where_its_starter_is_not(self) -> None:
        begun = threading.Event()
        with leftovers.no_thread_left():
            threads.start(threading.Thread(target=begun.set))
        self.assertTrue(begun.is_set())

    def test_a_thread_for_which_there_was_no_room_begins_when_there_is(self) -> None:
        begun = threading.Event()
        thread = threading.Thread(target=begun.set)
        with no_more_threads(), self.assertRaises(errors.BackendError):
            threads.start(thread)
        with leftovers.no_thread_left():
            threads.start(thread)
        self.assertTrue(begun.is_set())
