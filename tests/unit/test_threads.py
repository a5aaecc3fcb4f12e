# SPDX-License-Identifier: Apache-2.0
"""Starting threads: one whose starter is interrupted does nothing."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
import unittest
from collections.abc import Iterator
from typing import Any

from imagecache_lib import errors
from imagecache_lib.system import threads
from tests.support import leftovers
from tests.support.no_threads import no_more_threads


@contextlib.contextmanager
def interrupted_starts() -> Iterator[None]:
    """Interrupt whoever starts a thread in the body, once the thread runs."""

    def in_start(_frame: types.FrameType, event: str, _argument: Any) -> Any:
        if event == "return":
            raise KeyboardInterrupt
        return in_start

    def trace(frame: types.FrameType, _event: str, _argument: Any) -> Any:
        return in_start if frame.f_code is threading.Thread.start.__code__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class TestStart(unittest.TestCase):
    def test_a_thread_does_not_begin_where_its_starter_is_interrupted(self) -> None:
        begun = threading.Event()
        with leftovers.no_thread_left(), self.assertRaises(KeyboardInterrupt), interrupted_starts():
            threads.start(begun.set, name="begun")
        self.assertFalse(begun.is_set())

    def test_a_thread_begins_where_its_starter_is_not(self) -> None:
        begun = threading.Event()
        with leftovers.no_thread_left():
            threads.start(begun.set, name="begun")
        self.assertTrue(begun.is_set())

    def test_a_thread_may_close_what_it_works_for(self) -> None:
        joined = threading.Event()

        def close() -> None:
            threads.join(threading.current_thread())
            joined.set()

        with leftovers.no_thread_left():
            threads.start(close, name="closes")
        self.assertTrue(joined.is_set())

    def test_a_thread_for_which_there_is_no_room_is_told_so(self) -> None:
        with no_more_threads(), self.assertRaises(errors.BackendError) as caught:
            threads.start(print, name="none")
        self.assertIn("limit of tasks", str(caught.exception.next_step))
