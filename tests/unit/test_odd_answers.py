# SPDX-License-Identifier: Apache-2.0
"""Answers that contradict themselves, and headers that say a thing twice, or something that is none."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import unittest
from collections.abc import Iterator

import requests

from imagecache_lib import errors
from imagecache_lib.sources import retry_after
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.sources.interface import SourceBusy, SourceRefused
from imagecache_lib.sources.retry import SourceBudget
from imagecache_lib.system.host import System
from imagecache_lib.testing import bad_server
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import Answer, BadServer, Fault, Seen
from tests.unit.test_http_servers import DATA, DIGEST, HALF, ServerCase, fetch

DATE = "Thu, 26 Nov 2026 18:00:00 GMT"
LATER = "Thu, 26 Nov 2026 18:00:30 GMT"
NOW = 1795716000.0  # seconds since the epoch at DATE


def headers(**changed: str | None) -> Fault:
    """Return a fault that changes headers, or takes them away."""

    def spoil(_seen: Seen, answer: Answer) -> Answer:
        told = {**answer.headers, **{name.replace("_", "-"): value for name, value in changed.items()}}
        return dataclasses.replace(
            answer, headers={name: each for name, each in told.items() if each is not None}
        )

    return spoil


def beside(*told: tuple[str, str]) -> Fault:
    return lambda _seen, answer: dataclasses.replace(answer, more_headers=told)


def framed(coding: str) -> Fault:
    """Return a fault that sends chunks with their sizes, whatever the Transfer-Encoding says."""

    def spoil(_seen: Seen, answer: Answer) -> Answer:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(answer.body), answer.body)
        told = (("Transfer-Encoding", coding),)
        return dataclasses.replace(answer, body=body, length=-1, after=bad_server.CLOSE, more_headers=told)

    return spoil


def served(
    *spoilt: Fault, method: str | None = None, session: requests.Session | None = None
) -> Iterator[tuple[BadServer, HttpSource]]:
    """Yield a server that spoils every answer, and a source of what it has; with a digest, and without."""
    for digest in (DIGEST, None):
        with BadServer() as server:
            image = HttpImage(server.put("/x", DATA, etag='"one"'), "raw", digest)
            server.always_fail("/x", faults.both(*spoilt), method=method)
            yield server, HttpSource({"x": image}, session=session, timeout=(1.0, 5.0))


class TestLengths(unittest.TestCase):
    def test_no_length_counts_beside_chunks(self) -> None:
        for length in (5, len(DATA) - 1, len(DATA) + 1, 10 * len(DATA)):
            for method in ("GET", None):
                told = beside(("Content-Length", str(length)))
                for _, source in served(faults.chunked(), told, method=method):
                    with self.subTest(length=length, method=method):
                        self.assertEqual(DATA, fetch(source, retries=0))

    def test_a_length_may_be_said_twice(self) -> None:
        for lengths in ((str(len(DATA)), str(len(DATA))), (f"{len(DATA)}, {len(DATA)}",)):
            told = beside(*(("Content-Length", length) for length in lengths))
            for _, source in served(faults.length_told(None), told):
                self.assertEqual(len(DATA), source.describe("x").size)
                self.assertEqual(DATA, fetch(source))

    def test_data_in_a_coding_that_nothing_undoes_are_not_taken(self) -> None:
        for coding in ("gzip, chunked", "chunked\f"):
            for server, source in served(framed(coding), method="GET"):
                server.always_fail("/x", faults.length_told(None), method="HEAD")
                with self.subTest(coding), self.assertRaisesRegex(SourceRefused, coding.split("\f")[0]):
                    fetch(source)

    def test_blanks_behind_a_coding_are_no_part_of_it(self) -> None:
        for coding in ("chunked ", "Chunked\t "):
            for server, source in served(framed(coding), method="GET"):
                server.always_fail("/x", faults.length_told(None), method="HEAD")
                with self.subTest(coding):
                    self.assertEqual(DATA, fetch(source))

    def test_the_sizes_of_chunks_that_a_callers_session_leaves_are_not_taken_for_data(self) -> None:
        for server, source in served(framed("chunked "), method="GET", session=requests.Session()):
            server.always_fail("/x", faults.length_told(None), method="HEAD")
            self.assertRaisesRegex(SourceRefused, "transfer coding", fetch, source)

    def test_headers_that_are_not_read_as_a_whole_leave_the_length_open(self) -> None:
        length = f"Content-Length: {len(DATA)}"
        for lines in (f"\r\nno header\r\n{length}", f"\r\nContent-Type : x\r\n{length}", f"\n\r{length}"):
            fault = faults.both(faults.cut_without_length(HALF), beside(("X-More", f"y{lines}")))
            for server, source in served(fault, method="GET"):
                server.always_fail("/x", faults.length_told(None), method="HEAD")
                with self.subTest(lines=lines), self.assertRaisesRegex(SourceRefused, "headers"):
                    fetch(source)

    def test_headers_that_are_not_read_as_a_whole_do_not_matter_to_a_digest(self) -> None:
        fault = faults.both(faults.length_told(len(DATA)), beside(("X-More", "y\r\nno header")))
        for _, source in served(fault, method="GET"):
            if source.known_digest("x"):
                self.assertEqual(DATA, fetch(source))
            else:
                self.assertRaises(SourceRefused, fetch, source)

    def test_a_coding_that_was_not_applied_does_not_matter_to_a_digest(self) -> None:
        for _, source in served(beside(("Transfer-Encoding", "gzip")), method="GET"):
            if source.known_digest("x"):
                self.assertEqual(DATA, fetch(source))
            else:
                self.assertRaises(SourceRefused, fetch, source)


class TestRanges(unittest.TestCase):
    """A transfer that breaks, and what the server answers to the request to go on."""

    def resumed(self, fault: Fault, *, other: bytes | None = None) -> None:
        """Check that the image comes out whole where the resumed answer has this fault."""
        resumptions: list[Seen] = []

        def spoil(seen: Seen, answer: Answer) -> Answer:
            if "Range" not in seen.headers:
                whole = bool(resumptions)
                return answer if whole else faults.truncated(HALF)(seen, answer)
            resumptions.append(seen)
            return fault(seen, answer if other is None else dataclasses.replace(answer, body=other))

        for _, source in served(spoil, method="GET"):
            self.assertEqual(DATA, fetch(source, retries=1))
            self.assertEqual(1, len(resumptions))
            resumptions.clear()

    def test_an_answer_without_the_tag_that_was_asked_for_is_of_what_nobody_knows(self) -> None:
        for tag in (None, 'W/"one"', '"one", "one"'):
            with self.subTest(tag):
                self.resumed(headers(ETag=tag), other=bytes(len(DATA) - HALF))
                self.resumed(headers(ETag=tag))

    def test_another_number_of_bytes_than_the_range_has(self) -> None:
        part = headers(Content_Range=f"bytes {HALF}-{HALF + 99}/{len(DATA)}")
        self.resumed(part, other=DATA[: len(DATA) - HALF])
        self.resumed(part, other=DATA[HALF:])
        self.resumed(faults.fine(), other=DATA[HALF:] + b"more")

    def test_ranges_that_are_none(self) -> None:
        end = f"{HALF}-{len(DATA) - 1}/{len(DATA)}"
        for told in (
            *(None, "", f"bytes={end}", f"bytes {end}, bytes {end}"),
            *(f"bytes */{len(DATA)}", f"rows {end}"),
        ):
            with self.subTest(told):
                self.resumed(headers(Content_Range=told))


class TestRedirects(ServerCase):
    def redirect(self, *locations: str, body: bytes = b"", after: str = bad_server.KEEP) -> None:
        told = [("Location", location) for location in locations]
        self.server.script("/there", Answer(status=302, more_headers=told, body=body, after=after))

    def there(self) -> bytes:
        return fetch(self.source(f"{self.server.url}/there"), retries=0)

    def test_letters_of_any_alphabet(self) -> None:
        for sent, quoted in (
            ("/b\u00fcro".encode().decode("latin-1"), "/b%C3%BCro"),
            ("/b\u00fcro", "/b%FCro"),
            ("/a b", "/a%20b"),
        ):
            with self.subTest(sent):
                self.server.put(quoted, DATA)
                self.redirect(sent)
                self.assertEqual(DATA, self.there())

    def test_one_place_said_twice(self) -> None:
        self.redirect("/x", "/x")
        self.assertEqual(DATA, self.there())

    def test_two_places(self) -> None:
        self.redirect("/x", "/y")
        with self.assertRaisesRegex(SourceRefused, "two places"):
            self.there()

    def test_what_is_no_address(self) -> None:
        for location in ("http://[::1", "http://127.0.0.1:99999/", "ftp://127.0.0.1/x", "mailto:me"):
            with self.subTest(location):
                self.redirect(location)
                with self.assertRaisesRegex(SourceRefused, "not a web address"):
                    self.there()

    def test_the_body_of_a_redirect_is_not_read(self) -> None:
        self.redirect("/x", after=bad_server.ENDLESS)
        found: list[bytes] = []
        reading = threading.Thread(target=lambda: found.append(self.there()), daemon=True)
        reading.start()
        reading.join(60)
        self.assertEqual([DATA], found)


class TestRetryAfter(unittest.TestCase):
    def asked(self, value: str, date: str | None = DATE) -> tuple[float | None, float | None]:
        told = {"Retry-After": value} | ({} if date is None else {"Date": date})
        return retry_after.read(told)

    def test_seconds(self) -> None:
        for value, seconds in (
            ("0", 0),
            (" 7 ", 7),
            ("1.5", 1.5),
            ("5, 120", 120),
            ("9" * 12, 1e9),
            ("9" * 999, 1e9),
        ):
            for date in (DATE, None):
                self.assertEqual((seconds, None), self.asked(value, date))

    def test_dates_by_the_servers_clock(self) -> None:
        for value in (
            LATER,
            "Thursday, 26-Nov-26 18:00:30 GMT",
            "Thu Nov 26 18:00:30 2026",
            "Thu, 26 Nov 2026 18:00:30 -0000",
        ):
            with self.subTest(value):
                self.assertEqual((30.0, None), self.asked(value))
        self.assertEqual((0.0, None), self.asked("Thu, 26 Nov 2020 18:00:30 GMT"))

    def test_a_date_of_a_server_that_tells_no_time_is_by_this_hosts_clock(self) -> None:
        self.assertEqual((None, NOW + 30), self.asked(LATER, None))
        for offset, waited in ((0.0, 30.0), (-20.0, 50.0), (90.0, 0.0)):
            slept: list[float] = []
            clock = itertools.repeat(NOW + offset).__next__
            host = System(name="here", clock=clock, sleep=slept.append, random=lambda: 0.0)
            budget = SourceBudget("x", host=host, retries=1, deadline=None, cancel=None)
            budget.spend(SourceBusy("busy", retry_at=NOW + 30))
            self.assertAlmostEqual(waited, sum(slept))

    def test_a_wait_that_is_too_long_is_told_and_not_waited(self) -> None:
        host = System(name="here", clock=lambda: NOW, sleep=lambda seconds: self.fail("it waits"))
        budget = SourceBudget("x", host=host, retries=1, deadline=None, cancel=None)
        with self.assertRaisesRegex(errors.SourceError, "asks to wait 3600 s"):
            budget.spend(SourceBusy("busy", retry_at=NOW + 3600))

    def test_what_makes_no_sense_says_nothing(self) -> None:
        for value in (
            "",
            "-5",
            "+5",
            "soon",
            "1e3",
            "0x10",
            "\u0661\u0662",
            "Thu, 99 Nov 2026 18:00:30 GMT",
            "5;x",
        ):
            with self.subTest(value):
                self.assertEqual((None, None), self.asked(value))
                self.assertEqual((None, None), self.asked(value, None))
        self.assertEqual((None, None), self.asked("Fri, 31 Dec 99999 23:59:59 GMT"))


class TestStatuses(ServerCase):
    def test_what_a_proxy_changed_is_taken_by_its_digest_only(self) -> None:
        self.server.always_fail("/x", lambda _seen, answer: dataclasses.replace(answer, status=203))
        self.assertEqual(DATA, fetch(self.source(digest=DIGEST)))
        with self.assertRaisesRegex(SourceRefused, "a proxy changed"):
            fetch(self.source())

    def test_what_is_the_same_if_one_asks_again_is_asked_once(self) -> None:
        for status in (501, 505, 511):
            self.server.always_fail("/x", faults.status(status), method="GET")
            before = len(self.server.requests("GET"))
            with self.subTest(status=status), self.assertRaises(SourceRefused):
                fetch(self.source())
            self.assertEqual(1, len(self.server.requests("GET")) - before)
            self.server.forget("/x")

    def test_a_length_that_is_none_is_none_for_a_callers_session_too(self) -> None:
        for length in ("-1", "x", "9" * 5000):
            fault = faults.both(faults.cut_without_length(HALF), faults.header("Content-Length", length))
            self.server.always_fail("/x", fault, method="GET")
            source = HttpSource({"x": HttpImage(self.url, "raw")}, session=requests.Session())
            with self.subTest(length=length), self.assertRaisesRegex(errors.SourceError, "headers"):
                fetch(source)
            self.server.forget("/x")


class TestProxies(unittest.TestCase):
    def test_the_proxy_is_named_and_not_the_server(self) -> None:
        session = requests.Session()
        session.trust_env = False
        with BadServer() as proxy:
            proxy.script("http://images.invalid/x", Answer(status=407))
            session.proxies = {"http": proxy.url}
            source = HttpSource({"x": HttpImage("http://images.invalid/x", "raw")}, session=session)
            with self.assertRaisesRegex(SourceRefused, "proxy"):
                source.describe("x")
        with self.assertRaisesRegex(errors.SourceError, "proxy: Connection refused"):
            source.describe("x")
