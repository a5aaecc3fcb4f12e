# SPDX-License-Identifier: Apache-2.0
"""Retrying, resuming, falling back, and bounding the length, around a source that fails on demand."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
import threading
import unittest
from collections.abc import Callable, Iterator
from typing import NoReturn

from imagecache_lib import errors, model
from imagecache_lib.sources import transfer
from imagecache_lib.sources.interface import ImageSource, NotPermitted, SourceBusy, SourceRefused
from imagecache_lib.sources.retry import DeadlinePassed
from imagecache_lib.system.host import System
from imagecache_lib.testing.sources import FakeSource

DATA = random.Random(1).randbytes(1_000_000)
ID = "an-image"


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept = 0.0
        self.on_sleep: Callable[[], None] = lambda: None
        self.host = System(name="here", clock=lambda: self.now, sleep=self.sleep, random=lambda: 1.0)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.on_sleep()


def fetch(transfer_: transfer.Transfer) -> bytes:
    """Do what the ingest does, without a digest."""
    while True:
        try:
            return b"".join(transfer_.chunks())
        except transfer.StartAgain:
            continue


class TransferCase(unittest.TestCase):
    def setUp(self) -> None:
        self.time = Time()
        self.source = FakeSource({ID: DATA})

    def transfer(self, source: ImageSource | None = None, **options: object) -> transfer.Transfer:
        source = source or self.source
        arguments = {"host": self.time.host, **options}
        return transfer.Transfer(source, source.describe(ID), **arguments)  # type: ignore[arg-type]


class TestSmallChunks(TransferCase):
    """What becomes of a chunk costs the same whatever is in it, so that one of each byte would cost hours."""

    def setUp(self) -> None:
        super().setUp()
        self.source = FakeSource({ID: DATA[:20_000]}, chunk_size=1)

    def test_are_joined(self) -> None:
        chunks = list(self.transfer().chunks())
        self.assertEqual(DATA[:20_000], b"".join(chunks))
        self.assertLess(len(chunks), 10)

    def test_none_that_came_is_lost_where_the_source_breaks(self) -> None:
        self.source.break_at(5_000, 10_001)
        self.assertEqual(DATA[:20_000], b"".join(self.transfer().chunks()))
        self.assertEqual([0, 5_000, 10_001], self.source.offsets)

    def test_a_caller_who_gives_up_does_not_wait_for_more_of_them(self) -> None:
        gone = threading.Event()

        class Slow(FakeSource):
            @contextlib.contextmanager
            def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
                yield self.chunks()

            def chunks(self) -> Iterator[bytes]:
                yield b"a"
                gone.set()
                yield b"b"
                raise AssertionError("nobody waits for this")

        with self.assertRaises(errors.CancelledError):
            fetch(self.transfer(Slow({ID: DATA}), cancel=gone))


class TestResume(TransferCase):
    def test_goes_on_where_it_broke(self) -> None:
        self.source.break_at(300_000, 700_000)
        fetching = self.transfer()
        self.assertEqual(DATA, b"".join(fetching.chunks()))
        self.assertEqual([0, 300_000, 700_000], self.source.offsets)
        self.assertEqual(len(DATA), self.source.bytes_sent)
        self.assertTrue(fetching.resumed)

    def test_an_unbroken_transfer_is_not_called_resumed(self) -> None:
        fetching = self.transfer()
        fetch(fetching)
        self.assertFalse(fetching.resumed)
        self.assertFalse(fetching.grant_clean_pass())

    def test_without_a_digest_it_starts_again(self) -> None:
        self.source = FakeSource({ID: DATA}, digests=False)
        self.source.break_at(300_000)
        fetching = self.transfer()
        with self.assertRaises(transfer.StartAgain):
            list(fetching.chunks())
        self.assertEqual(DATA, b"".join(fetching.chunks()))
        self.assertEqual([0, 0], self.source.offsets)
        self.assertFalse(fetching.resumed)

    def test_starts_again_when_the_source_cannot_resume(self) -> None:
        self.source.break_at(300_000)
        self.source.refuses_resume = True
        self.assertEqual(DATA, fetch(self.transfer()))
        self.assertEqual([0, 300_000, 0], self.source.offsets)

    def test_asks_only_once_whether_it_may_resume(self) -> None:
        self.source.break_at(300_000, 600_000)
        self.source.refuses_resume = True
        self.assertEqual(DATA, fetch(self.transfer()))
        self.assertEqual([0, 300_000, 0, 0], self.source.offsets)

    def test_a_break_before_the_first_byte_is_not_a_resume(self) -> None:
        self.source.break_at(0)
        fetching = self.transfer()
        self.assertEqual(DATA, b"".join(fetching.chunks()))
        self.assertFalse(fetching.resumed)


class TestCleanPass(TransferCase):
    def setUp(self) -> None:
        super().setUp()
        self.source.break_at(500_000)
        self.fetching = self.transfer()

    def splice(self) -> bytes:
        chunks = self.fetching.chunks()
        with contextlib.closing(chunks):
            head = b"".join(next(chunks) for _ in range(2))
            self.source.change_data(ID, bytes(len(DATA)))
            return head + b"".join(chunks)

    def test_a_splice_is_granted_one_clean_pass(self) -> None:
        self.assertNotEqual(DATA, self.splice())
        self.assertTrue(self.fetching.grant_clean_pass())
        self.assertFalse(self.fetching.grant_clean_pass())
        self.source.change_data(ID, DATA)
        self.assertEqual(DATA, fetch(self.fetching))
        self.assertFalse(self.fetching.resumed)
        self.assertFalse(self.fetching.grant_clean_pass())

    def test_the_clean_pass_is_not_resumed(self) -> None:
        self.splice()
        self.fetching.grant_clean_pass()
        self.source.change_data(ID, DATA)
        self.source.break_at(500_000)
        self.assertEqual(DATA, fetch(self.fetching))
        self.assertEqual([0, 500_000, 0, 0], self.source.offsets)

    def test_a_splice_that_got_too_long_is_granted_it_too(self) -> None:
        chunks = self.fetching.chunks()
        next(chunks)
        self.source.change_data(ID, DATA + b"more")
        with self.assertRaises(transfer.StartAgain):
            list(chunks)
        with self.assertRaises(errors.ImageRejected):
            fetch(self.fetching)


class TestBudget(TransferCase):
    def test_gives_up_after_the_retries(self) -> None:
        self.source.fail_open(*[errors.SourceError("down") for _ in range(9)])
        with self.assertRaisesRegex(errors.SourceError, "image an-image: down; gave up after 3 attempts"):
            fetch(self.transfer(retries=2))
        self.assertEqual(3, self.source.opens)

    def test_without_retries_the_first_failure_counts(self) -> None:
        self.source.break_at(500_000)
        with self.assertRaises(errors.SourceError) as caught:
            fetch(self.transfer(retries=0))
        self.assertNotIsInstance(caught.exception, transfer.StartAgain)

    def test_starting_again_draws_on_the_same_budget(self) -> None:
        self.source = FakeSource({ID: DATA}, digests=False)
        self.source.break_at(*[500_000] * 50)
        with self.assertRaisesRegex(errors.SourceError, "gave up"):
            fetch(self.transfer(retries=3))
        # One that made progress, which is forgiven, and the three retries after it.
        self.assertLessEqual(self.source.opens, 5)

    def test_progress_renews_the_budget(self) -> None:
        self.source.break_at(*range(100_000, 1_000_000, 100_000))
        self.assertEqual(DATA, b"".join(self.transfer(retries=1).chunks()))

    def test_trickling_progress_does_not(self) -> None:
        self.source.break_at(*range(1, 1000))
        with self.assertRaisesRegex(errors.SourceError, "gave up"):
            fetch(self.transfer(retries=3))
        self.assertLess(self.source.opens, 10)

    def trickle(self, amount: int, seconds: float, *, min_rate: int) -> bytes:
        """Fetch from a source that takes so long for each chunk of so many bytes."""

        class Slow(FakeSource):
            def _chunks(self, *arguments: object) -> Iterator[bytes]:
                for chunk in super()._chunks(*arguments):  # type: ignore[arg-type]
                    time.now += seconds
                    yield chunk

        time = self.time
        host = dataclasses.replace(time.host, monotonic=lambda: time.now)
        self.source = Slow({ID: DATA}, chunk_size=amount)
        return fetch(self.transfer(host=host, min_rate=min_rate))

    def test_a_source_that_brings_next_to_nothing_is_given_up(self) -> None:
        with self.assertRaisesRegex(errors.SourceError, "only 6000 bytes came in 60 s; gave up"):
            self.trickle(100, 1.0, min_rate=1024)
        self.assertEqual(4, self.source.opens)

    def test_a_slow_source_that_brings_enough_is_borne(self) -> None:
        self.assertEqual(DATA, self.trickle(2**15, 30.0, min_rate=1024))
        self.assertEqual(DATA, self.trickle(1000, 60.0, min_rate=0))

    def test_time_in_which_nothing_is_waited_for_does_not_count(self) -> None:
        host = dataclasses.replace(self.time.host, monotonic=lambda: self.time.now)
        self.source = FakeSource({ID: DATA}, chunk_size=1000)
        self.assertEqual(DATA, fetch(self.transfer(host=host, rate=10, min_rate=1024)))

    def test_backs_off_exponentially_with_full_jitter(self) -> None:
        self.source.fail_open(*[errors.SourceError("down") for _ in range(9)])
        draws = iter([1.0, 0.5, 0.0, 1.0])
        with self.assertRaises(errors.SourceError):
            host = dataclasses.replace(self.time.host, random=lambda: next(draws))
            fetch(self.transfer(retries=4, host=host))
        self.assertAlmostEqual(0.5 + 0.5 + 0.0 + 4.0, self.time.slept)

    def test_waits_as_long_as_the_server_asks(self) -> None:
        self.source.fail_open(SourceBusy("HTTP 503", retry_after=7.0))
        self.assertEqual(
            DATA, fetch(self.transfer(host=dataclasses.replace(self.time.host, random=lambda: 0.0)))
        )
        self.assertAlmostEqual(7.0, self.time.slept)

    def test_does_not_wait_an_hour(self) -> None:
        self.source.fail_open(SourceBusy("HTTP 503", retry_after=3600.0))
        with self.assertRaisesRegex(errors.SourceError, "asks to wait 3600 s"):
            fetch(self.transfer())
        self.assertEqual(0.0, self.time.slept)

    def test_what_cannot_pass_is_not_retried(self) -> None:
        for failure in (
            SourceRefused("token"),
            errors.ImageNotFound("gone"),
            NotPermitted("no"),
            errors.ImageRejected("bad"),
        ):
            with self.subTest(failure=failure):
                self.source.fail_open(failure)
                opens = self.source.opens
                with self.assertRaises(type(failure)) as caught:
                    fetch(self.transfer())
                self.assertEqual(ID, caught.exception.image)
                self.assertEqual(opens + 1, self.source.opens)

    def test_a_foreign_error_is_not_retried_and_does_not_escape(self) -> None:
        class Careless(ImageSource):
            opens = 0

            def describe(self, image_id: str) -> model.Image:
                return model.Image(image_id)

            def open(self, image: model.Image, offset: int = 0) -> NoReturn:
                self.opens += 1
                raise RuntimeError("token: sesame")

        source = Careless()
        with self.assertRaisesRegex(SourceRefused, "RuntimeError") as caught:
            fetch(self.transfer(source, retries=3))
        self.assertNotIn("sesame", str(caught.exception))
        self.assertEqual(1, source.opens)


class TestLength(TransferCase):
    def test_more_bytes_than_the_image_has_are_refused_unread(self) -> None:
        self.source.change_data(ID, DATA * 3)
        with self.assertRaises(errors.ImageRejected):
            fetch(self.transfer())
        self.assertLessEqual(self.source.bytes_sent, len(DATA) + 2**16)

    def test_a_clean_but_early_end_is_a_broken_transfer(self) -> None:
        self.source.change_data(ID, DATA[:-1])
        with self.assertRaisesRegex(errors.SourceError, "ended after 999999 of 1000000 bytes"):
            fetch(self.transfer(retries=1))

    def test_an_unknown_size_is_bounded_by_the_caller(self) -> None:
        self.source = FakeSource({ID: DATA}, sizes=False)
        self.assertEqual(DATA, fetch(self.transfer(max_size=len(DATA))))
        with self.assertRaises(errors.ImageRejected):
            fetch(self.transfer(max_size=len(DATA) - 1))


class TestDeadlineAndCancel(TransferCase):
    def test_the_deadline_is_looked_at_before_every_chunk(self) -> None:
        chunks = self.transfer(deadline=1001.0).chunks()
        next(chunks)
        self.time.now = 1001.0
        with self.assertRaises(DeadlinePassed):
            next(chunks)

    def test_does_not_wait_past_the_deadline(self) -> None:
        self.source.fail_open(SourceBusy("HTTP 503", retry_after=60.0))
        with self.assertRaisesRegex(DeadlinePassed, "HTTP 503"):
            fetch(self.transfer(deadline=1030.0))
        self.assertEqual(0.0, self.time.slept)

    def test_cancelling_ends_it_at_the_next_chunk(self) -> None:
        cancel = threading.Event()
        chunks = self.transfer(cancel=cancel).chunks()
        next(chunks)
        cancel.set()
        with self.assertRaises(errors.CancelledError):
            next(chunks)

    def test_cancelling_ends_a_wait(self) -> None:
        cancel = threading.Event()
        self.time.on_sleep = cancel.set
        self.source.fail_open(SourceBusy("HTTP 503", retry_after=60.0))
        with self.assertRaises(errors.CancelledError):
            fetch(self.transfer(cancel=cancel))
        self.assertLessEqual(self.time.slept, 1.0)


class TestDescribe(TransferCase):
    def describe(self, *fallbacks: ImageSource, **options: object) -> tuple[ImageSource, model.Image]:
        arguments = {"host": self.time.host, "fallbacks": fallbacks, **options}
        return transfer.describe(self.source, ID, **arguments)  # type: ignore[arg-type]

    def test_retries_what_may_pass(self) -> None:
        self.source.fail_describe(errors.SourceError("down"), SourceBusy("busy", retry_after=2.0))
        source, image = self.describe()
        self.assertIs(self.source, source)
        self.assertEqual(hashlib.sha512(DATA).hexdigest(), image.digest.value if image.digest else None)
        self.assertEqual(3, self.source.describes)

    def test_a_fallback_stands_in_when_the_image_is_gone(self) -> None:
        self.source.remove(ID)
        empty, peer = FakeSource({}), FakeSource({ID: DATA})
        source, _ = self.describe(empty, peer)
        self.assertIs(peer, source)

    def test_no_fallback_gets_around_a_refusal(self) -> None:
        self.source.fail_describe(NotPermitted("no"))
        peer = FakeSource({ID: DATA})
        with self.assertRaises(NotPermitted):
            self.describe(peer)
        self.assertEqual(0, peer.describes)

    def test_no_fallback_hides_an_outage(self) -> None:
        self.source.fail_describe(*[errors.SourceError("down") for _ in range(9)])
        with self.assertRaisesRegex(errors.SourceError, "down"):
            self.describe(FakeSource({ID: DATA}), retries=1)

    def test_a_broken_fallback_leaves_the_first_answer(self) -> None:
        self.source.remove(ID)
        broken = FakeSource({})
        broken.fail_describe(*[errors.SourceError("down") for _ in range(9)])
        with self.assertRaises(errors.ImageNotFound):
            self.describe(broken, retries=1)

    def test_each_status_has_its_error(self) -> None:
        expected: dict[str, type[errors.ImageCacheError]] = {
            "queued": errors.SourceError,
            "saving": errors.SourceError,
            "importing": errors.SourceError,
            "deleted": errors.ImageNotFound,
            "pending_delete": errors.ImageNotFound,
            "killed": errors.ImageRejected,
            "deactivated": errors.ImageRejected,
            "no such status": errors.ImageRejected,
        }
        for status, kind in expected.items():
            with self.subTest(status=status):
                self.source.change_status(ID, status)
                with self.assertRaisesRegex(kind, status):
                    self.describe()
        self.assertEqual(0.0, self.time.slept)

    def test_the_deadline_and_cancelling_hold_here_too(self) -> None:
        with self.assertRaises(DeadlinePassed):
            self.describe(deadline=999.0)
        cancel = threading.Event()
        cancel.set()
        with self.assertRaises(errors.CancelledError):
            self.describe(cancel=cancel)


class TestRate(TransferCase):
    def test_no_faster_than_the_rate_on_average_and_in_each_part(self) -> None:
        took = []
        for chunk in self.transfer(rate=100_000).chunks():
            took.append((self.time.slept, len(chunk)))
        self.assertAlmostEqual(self.time.slept, len(DATA) / 100_000)
        given = 0
        for seconds, amount in took:
            self.assertLessEqual(given, 100_000 * seconds + 1)
            given += amount

    def test_the_time_that_the_network_takes_counts(self) -> None:
        for _chunk in self.transfer(rate=100_000).chunks():
            self.time.now += 0.5  # of the 0.66 s that each chunk of 64 KiB costs
        self.assertLess(self.time.slept, 0.2 * len(DATA) / 2**16 + 1)

    def test_a_clock_that_is_set_back_makes_nobody_wait_longer(self) -> None:
        for _chunk in self.transfer(rate=100_000).chunks():
            self.time.now -= 3600
        self.assertAlmostEqual(self.time.slept, len(DATA) / 100_000)

    def test_a_rest_ends_when_the_request_is_cancelled(self) -> None:
        cancelled = threading.Event()
        self.time.on_sleep = cancelled.set
        with self.assertRaises(errors.CancelledError):
            fetch(self.transfer(rate=10, cancel=cancelled))
        self.assertLess(self.time.slept, 1)

    def test_a_rest_ends_at_the_deadline(self) -> None:
        with self.assertRaises(errors.SourceError):
            fetch(self.transfer(rate=10, deadline=self.time.now + 3))
        self.assertLessEqual(self.time.slept, 3.5)
