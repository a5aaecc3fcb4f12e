# SPDX-License-Identifier: Apache-2.0
"""Servers that break HTTP, or stretch it: each is given up in time, with an error that says why, or is served
with the image."""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time
import unittest
import urllib.parse
from collections.abc import Callable

import requests
import urllib3.exceptions

from imagecache_lib import errors, model
from imagecache_lib.sources import connection, transfer
from imagecache_lib.sources.glance import GlanceSource
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.sources.retry import SourceBudget
from imagecache_lib.system.host import System
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import Answer, BadServer, Fault, Seen, SilentServer
from tests.support import servers

DATA = random.Random(12).randbytes(300_000)
DIGEST = model.Digest("sha256", hashlib.sha256(DATA).hexdigest())
QUIET = System(name="here", sleep=lambda seconds: None)
#: Seconds for a read where that limit is what is tested, where it is not, and until a test has failed.
READ, LONG, PATIENCE = 1.0, 60.0, 50.0
#: What is said of a source that came to that limit. On a busy machine it may be that nothing came until then.
SLOW = "takes too long|in time"


class HostileServers:
    """Mix it into a test case, which says what the source is and where its data lies."""

    server: BadServer
    path: str

    def source(self, *, read: float = LONG, digest: model.Digest | None = DIGEST) -> ImageSource:
        raise NotImplementedError

    def fetch(
        self,
        source: ImageSource,
        *,
        retries: int = 0,
        deadline: float | None = None,
        cancel: model.CancelToken | None = None,
        read: float = LONG,
    ) -> bytes:
        """Return the image's data.

        :param read: seconds for a read of the data.
        """
        waits = {"host": QUIET, "retries": retries, "deadline": deadline, "cancel": cancel}
        found, image = transfer.describe(source, "x", **waits)  # type: ignore[arg-type]
        found = found if read == LONG else self.source(read=read)
        fetching = transfer.Transfer(found, image, **waits)  # type: ignore[arg-type]
        while True:
            try:
                return b"".join(fetching.chunks())
            except transfer.StartAgain:
                continue

    def refused(self, fault: Fault, kind: type[Exception], words: str, *, read: float = LONG) -> None:
        """Fail each GET, which is found out in time."""
        self.server.always_fail(self.path, fault, method="GET")
        began = time.monotonic()
        with self.assertRaisesRegex(kind, words):  # type: ignore[attr-defined]
            self.fetch(self.source(), read=read)
        self.assertLess(time.monotonic() - began, PATIENCE)  # type: ignore[attr-defined]

    def given_up(self, fault: Fault, words: str, *, read: float = LONG) -> None:
        self.refused(fault, errors.SourceError, words, read=read)

    # -- what never ends is bounded by the read timeout, and by its size -------------------------------

    def test_a_head_that_comes_byte_by_byte_is_given_up(self) -> None:
        self.given_up(faults.slow_head(0.1), SLOW, read=READ)

    def test_headers_without_end_are_given_up(self) -> None:
        self.given_up(faults.headers_without_end(0.1), SLOW, read=READ)

    def test_a_flood_of_headers_is_given_up(self) -> None:
        self.given_up(faults.headers_without_end(), "headers")

    def test_many_headers_and_long_ones_are_given_up(self) -> None:
        self.given_up(faults.many_headers(1000), "headers")

    def test_one_header_that_is_too_long_is_given_up(self) -> None:
        self.given_up(faults.many_headers(1, 100_000), "headers")

    def test_interim_answers_without_end_are_given_up(self) -> None:
        self.given_up(faults.interim_without_end(100), f"too much|{SLOW}", read=READ)

    def test_hints_without_end_are_given_up(self) -> None:
        self.given_up(faults.interim_without_end(103), f"too much|{SLOW}", read=READ)

    def test_trailers_without_end_are_given_up(self) -> None:
        self.given_up(faults.trailers_without_end(), f"too much|{SLOW}", read=READ)

    def test_trailers_that_come_byte_by_byte_are_given_up(self) -> None:
        self.given_up(faults.trailers_without_end(0.1), SLOW, read=READ)

    def test_redirects_without_end_are_given_up(self) -> None:
        self.given_up(faults.redirected_on(), "redirects")

    # -- the caller's deadline and token end it sooner -------------------------------------------------

    def ended(self, fault: Fault, *, method: str | None = "GET") -> None:
        """The deadline ends it within a second, and the token does."""
        self.server.always_fail(self.path, fault, method=method)
        began = time.monotonic()
        with self.assertRaisesRegex(errors.SourceError, "deadline"):  # type: ignore[attr-defined]
            self.fetch(self.source(), deadline=time.time() + 1)
        self.assertLess(time.monotonic() - began, PATIENCE)  # type: ignore[attr-defined]
        cancel = threading.Event()
        timer = threading.Timer(1, cancel.set)
        timer.start()
        began = time.monotonic()
        with self.assertRaises(errors.CancelledError):  # type: ignore[attr-defined]
            self.fetch(self.source(), cancel=cancel)
        self.assertLess(time.monotonic() - began, PATIENCE)  # type: ignore[attr-defined]
        timer.join()

    def test_a_caller_does_not_wait_for_a_slow_head(self) -> None:
        self.ended(faults.slow_head(0.2), method=None)

    def test_a_caller_does_not_wait_for_silence(self) -> None:
        self.ended(faults.silent())

    def test_a_caller_does_not_wait_for_data_that_stall(self) -> None:
        self.ended(faults.stalled(1000))

    def test_a_caller_does_not_wait_for_slow_trailers(self) -> None:
        self.ended(faults.trailers_without_end(0.2))

    # -- what HTTP allows is served --------------------------------------------------------------------

    def served(self, *planned: Fault, retries: int = 1) -> None:
        for fault in planned:
            for digest in (DIGEST, None):
                with self.subTest(fault=fault, digest=digest):  # type: ignore[attr-defined]
                    self.server.fail(self.path, fault)
                    found = self.fetch(self.source(digest=digest), retries=retries)
                    self.assertEqual(DATA, found)  # type: ignore[attr-defined]

    def test_interim_answers_are_passed_over(self) -> None:
        self.served(faults.interim(100), faults.interim(103), faults.interim(102, 103, 100, 103))

    def test_trailers_are_passed_over(self) -> None:
        self.served(faults.trailers("X-Sum", "Content-Length"))

    def test_answers_of_http_1_0_are_read(self) -> None:
        self.served(faults.http_1_0(), faults.http_1_0(with_length=False))

    # -- what contradicts itself is never taken for the image ------------------------------------------

    def test_chunks_whose_size_is_wrong_are_given_up(self) -> None:
        for size in ("1", "0", "-1", "zz", "", "10 ; x=y", "0x10"):
            with self.subTest(size=size):  # type: ignore[attr-defined]
                self.server.fail(self.path, faults.chunk_size_told(size))
                with self.assertRaises(errors.SourceError):  # type: ignore[attr-defined]
                    self.fetch(self.source())

    def test_a_size_of_which_only_the_first_digit_came_is_not_the_last_chunk(self) -> None:
        cut = b"%x\r\n%s\r\n0" % (len(DATA) // 2, DATA[: len(DATA) // 2])
        answer = Answer(headers={"Transfer-Encoding": "chunked"}, body=cut, length=-1)
        self.server.fail(self.path, lambda _seen, _answer: answer)
        with self.assertRaisesRegex(errors.SourceError, "broke off"):  # type: ignore[attr-defined]
            self.fetch(self.source(digest=None))

    def test_a_chunk_that_is_said_to_be_longer_is_not_taken_for_data(self) -> None:
        self.server.fail(self.path, faults.chunk_size_told("ffffffffffff"))
        with contextlib.suppress(errors.ImageCacheError):  # or the next answer, which is right, was taken
            self.assertEqual(DATA, self.fetch(self.source()))  # type: ignore[attr-defined]

    def test_chunks_of_a_byte_each_are_given_up(self) -> None:
        def spoil(seen: Seen, answer: Answer) -> Answer:
            framed = b"".join(b"1\r\n%c\r\n" % byte for byte in DATA[:20_000])
            rest = b"%x\r\n%s\r\n0\r\n\r\n" % (len(DATA) - 20_000, DATA[20_000:])
            return Answer(headers={"Transfer-Encoding": "chunked"}, body=framed + rest, length=-1)

        self.given_up(spoil, "too much")

    def test_a_length_that_is_none_is_given_up(self) -> None:
        for length in ("abc", "-5", "1, 2"):
            with self.subTest(length=length):  # type: ignore[attr-defined]
                wrong = faults.both(faults.length_told(None), faults.header("Content-Length", length))
                self.server.fail(self.path, wrong)
                with self.assertRaisesRegex(errors.SourceError, "headers"):  # type: ignore[attr-defined]
                    self.fetch(self.source())

    def test_half_of_the_data_that_was_not_asked_for_is_refused(self) -> None:
        self.refused(faults.partial_unasked(), errors.SourceError, "HTTP 206")

    def test_no_content_is_no_image(self) -> None:
        self.refused(faults.status(204), errors.ImageRejected, "no data")

    def test_ranges_that_are_none_are_read_from_the_start(self) -> None:
        last = len(DATA) - 1
        for wrong in (
            faults.multipart_range(),
            faults.range_told(None),
            faults.range_told("bytes 0-10/20"),
            faults.range_told(f"bytes 1001-{last}/{len(DATA)}"),
            faults.range_told(f"bytes 1000-{last}/{len(DATA) + 1}"),
            faults.range_told(f"bytes 1000-999/{len(DATA)}"),
            faults.range_told("bytes */300000"),
            faults.range_told("bananas 1000-2000/300000"),
            faults.range_refused(204),
        ):
            with self.subTest(fault=wrong):  # type: ignore[attr-defined]
                self.server.fail(self.path, faults.truncated(1000), wrong)
                found = self.fetch(self.source(), retries=1)
                self.assertEqual(DATA, found)  # type: ignore[attr-defined]


class TestHttpSource(HostileServers, unittest.TestCase):
    path = "/x"

    def setUp(self) -> None:
        self.server = self.enterContext(BadServer())
        self.server.put("/x", DATA, etag='"one"')

    def source(self, *, read: float = LONG, digest: model.Digest | None = DIGEST) -> ImageSource:
        image = HttpImage(f"{self.server.url}/x", "raw", digest)
        return HttpSource({"x": image}, timeout=(LONG, read))

    def test_a_session_of_the_callers_heeds_the_deadline(self) -> None:
        self.server.always_fail("/x", faults.stalled(1000), method="GET")
        image = HttpImage(f"{self.server.url}/x", "raw", DIGEST)
        with requests.Session() as session:
            source = HttpSource({"x": image}, session=session, timeout=(LONG, LONG))
            began = time.monotonic()
            with self.assertRaisesRegex(errors.SourceError, "deadline"):
                self.fetch(source, deadline=time.time() + 1)
        self.assertLess(time.monotonic() - began, PATIENCE)

    def test_more_than_the_byte_that_was_asked_for_is_not_read(self) -> None:
        self.server.always_fail("/x", faults.status(405), method="HEAD")
        self.server.always_fail("/x", faults.both(faults.range_told("bytes 0-0/300000"), faults.endless()))
        began = time.monotonic()
        self.assertEqual(300_000, self.source().describe("x").size)
        self.assertLess(time.monotonic() - began, PATIENCE)


class TestGlanceSource(HostileServers, unittest.TestCase):
    path = "/v2/images/x/file"

    def setUp(self) -> None:
        self.server = server = self.enterContext(servers.GlanceServer(token="good"))
        server.add("x", DATA)

    def source(self, *, read: float = LONG, digest: model.Digest | None = DIGEST) -> ImageSource:
        return GlanceSource(self.server.url, token="good", timeout=(LONG, read))

    def test_metadata_are_bounded_as_data_are(self) -> None:
        self.path = "/v2/images/x"
        for fault, words in (
            (faults.slow_head(0.1), SLOW),
            (faults.many_headers(1000), "headers"),
            (faults.interim_without_end(103), f"too much|{SLOW}"),
        ):
            self.server.fail(self.path, fault)
            with self.assertRaisesRegex(errors.SourceError, words):
                self.fetch(self.source(read=LONG if words == "headers" else READ))


class TestManyAddresses(unittest.TestCase):
    """A name may stand for thousands of addresses, none of which answers."""

    def setUp(self) -> None:
        self.server = self.enterContext(BadServer())

    def connect(self, nobodys: int) -> None:
        """Connect to the server by a name whose first addresses, so many, nothing listens on."""

        class Named(connection.HttpConnection):
            def addresses(self) -> list[str]:
                return [*(f"127.0.1.{number}" for number in range(nobodys)), *super().addresses()]

        address = urllib.parse.urlsplit(self.server.url)
        named = Named("127.0.0.1", address.port, timeout=PATIENCE)
        self.addCleanup(named.close)
        named.connect()
        self.assertEqual(("127.0.0.1", PATIENCE), (named.host, named.timeout))

    def test_a_few_are_tried(self) -> None:
        self.connect(connection.MOST_ADDRESSES - 1)
        with self.assertRaises(urllib3.exceptions.NewConnectionError):
            self.connect(connection.MOST_ADDRESSES)

    def test_none_is_for_a_caller_who_has_gone(self) -> None:
        gone = threading.Event()
        gone.set()
        caller = SourceBudget("x", host=QUIET, retries=0, deadline=None, cancel=gone)
        with connection.waiting(caller), self.assertRaises(errors.CancelledError):
            self.connect(0)


class TestSilenceBeforeTls(unittest.TestCase):
    def sources(self, url: str) -> list[Callable[[], model.Image]]:
        http = HttpSource({"x": HttpImage(f"{url}/x", "raw")}, timeout=(1.0, 60.0))
        glance = GlanceSource(url, token="good", timeout=(1.0, 60.0))
        return [lambda: http.describe("x"), lambda: glance.describe("x")]

    def test_a_handshake_that_stalls_is_given_up(self) -> None:
        silent = self.enterContext(SilentServer())
        for describe in self.sources(silent.url):
            began = time.monotonic()
            self.assertRaises(errors.SourceError, describe)
            self.assertLess(time.monotonic() - began, PATIENCE)
