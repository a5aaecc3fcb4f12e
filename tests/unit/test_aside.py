# SPDX-License-Identifier: Apache-2.0
"""Handing chunks to something slow: nothing that goes wrong there keeps the transfer waiting."""

from __future__ import annotations

import signal
import threading
import unittest
from collections.abc import Callable

from imagecache_lib import errors
from imagecache_lib.ingest.aside import Aside, Updated
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter
from tests.support import needs

PATIENT = Waiter(System(name="here"))


class Consuming:
    """Hands what it is updated with to a function."""

    def __init__(self, consume: Callable[[bytes], object]) -> None:
        self._consume = consume

    def update(self, data: bytes, /) -> object:
        return self._consume(data)


class TestAside(unittest.TestCase):
    def aside(self, consume: Callable[[bytes], object], waiter: Waiter = PATIENT) -> Aside:
        updated: Updated = Consuming(consume)
        found = Aside(updated, "test", waiter)
        self.addCleanup(found.close)
        return found

    def test_everything_arrives_in_order(self) -> None:
        taken: list[bytes] = []
        aside = self.aside(taken.append)
        chunks = [bytes([n]) for n in range(200)]
        for chunk in chunks:
            aside.feed(chunk)
        aside.finish()
        self.assertEqual(chunks, taken)

    def test_a_consumer_that_fails_is_heard_of_and_holds_up_nothing(self) -> None:
        def consume(_chunk: bytes) -> None:
            raise TypeError("no bytes")

        aside = self.aside(consume)
        with self.assertRaises(errors.BackendError) as caught:
            for _number in range(100):
                aside.feed(b"x")
            aside.finish()
        self.assertIn("no bytes", str(caught.exception))

    def test_a_caller_that_no_longer_waits_gets_away_from_a_consumer_that_hangs(self) -> None:
        hanging = threading.Event()
        self.addCleanup(hanging.set)

        cancel = threading.Event()
        cancel.set()
        waiter = Waiter(System(name="here"), cancel=cancel)
        aside = self.aside(lambda _chunk: hanging.wait(60), waiter)
        with self.assertRaises(errors.CancelledError):
            for _number in range(100):
                aside.feed(b"x")
        hanging.set()

    def test_an_interrupt_at_any_point_wedges_nothing(self) -> None:
        needs.no_tracer()

        def interrupt(_number: int, _frame: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        for round in range(200):
            aside = Aside(Consuming(hash), "interrupted", PATIENT)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + round * 0.00001)
                for number in range(100_000):
                    aside.feed(bytes(number % 100))
                aside.finish()
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                aside.close()
            for thread in threading.enumerate():
                if thread.name == "interrupted":
                    thread.join(60)
                    self.assertFalse(thread.is_alive(), f"round {round}")
