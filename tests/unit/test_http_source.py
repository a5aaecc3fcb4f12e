# SPDX-License-Identifier: Apache-2.0
"""The HTTP source against servers that behave badly."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import pathlib
import random
import socket
import ssl
import tempfile
import threading
import unittest
from typing import Any, ClassVar

import requests

from imagecache_lib import errors, model
from imagecache_lib.sources import transfer
from imagecache_lib.sources.file import FileImage, FileSource
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.sources.interface import (
    CannotResume,
    NotPermitted,
    SourceBusy,
    SourceMisconfigured,
    SourceRefused,
)
from imagecache_lib.system.host import System
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import Answer, BadServer, Script, Seen, data_answer
from tests.support.servers import Certificate

DATA = random.Random(2).randbytes(500_000)
DIGEST = model.Digest("sha256", hashlib.sha256(DATA).hexdigest())
SECRET = "s3same"
HALF = len(DATA) // 2
QUIET = System(name="here", sleep=lambda seconds: None)


class HttpCase(unittest.TestCase):
    def setUp(self) -> None:
        self.server = self.enterContext(BadServer())

    def source(self, *answers: Script, digest: model.Digest | None = DIGEST, **options: object) -> HttpSource:
        """Return a source whose one image, x, is at a path that answers so."""
        self.server.script("/x", *answers)
        table = {"x": HttpImage(f"{self.server.url}/x", "raw", digest)}
        return HttpSource(table, **{"timeout": (60.0, 60.0), **options})  # type: ignore[arg-type]

    def fetch(self, source: HttpSource, retries: int = 1) -> bytes:
        found, image = transfer.describe(source, "x", host=QUIET, retries=retries)
        fetching = transfer.Transfer(found, image, host=QUIET, retries=retries, max_size=2**22)
        while True:
            try:
                return b"".join(fetching.chunks())
            except transfer.StartAgain:
                continue

    def offsets(self) -> list[str | None]:
        return [seen.headers.get("Range") for seen in self.server.requests("GET")]


def serve(seen: Seen) -> Answer:
    return data_answer(DATA, seen)


def tagged(tag: str, data: bytes = DATA) -> Script:
    return lambda seen: data_answer(data, seen, etag=tag)


class TestBrokenTransfers(HttpCase):
    def test_a_truncated_transfer_goes_on_where_it_broke(self) -> None:
        cut = Answer(body=DATA[:HALF], length=len(DATA), after="close")
        self.assertEqual(DATA, self.fetch(self.source(serve, cut, serve)))
        self.assertEqual([None, f"bytes={HALF}-"], self.offsets())

    def test_a_reset_transfer_is_completed(self) -> None:
        cut = Answer(body=DATA[:HALF], length=len(DATA), after="reset")
        self.assertEqual(DATA, self.fetch(self.source(serve, cut, serve)))

    def test_a_stalled_transfer_is_completed(self) -> None:
        stall = Answer(body=DATA[:HALF], length=len(DATA), after="stall")
        source = self.source(serve, stall, serve, timeout=(60.0, 4.0))  # enough for the good answers
        self.assertEqual(DATA, self.fetch(source))
        self.assertEqual([None, f"bytes={HALF}-"], self.offsets())

    def test_an_early_end_without_a_length_is_noticed(self) -> None:
        cut = Answer(body=DATA[:HALF], length=-1, after="close")
        self.assertEqual(DATA, self.fetch(self.source(serve, cut, serve)))

    def test_truncated_for_ever_is_a_source_error(self) -> None:
        cut = Answer(body=DATA[:10], length=len(DATA), after="close")
        with self.assertRaisesRegex(errors.SourceError, "the data broke off; gave up after 2 attempts"):
            self.fetch(self.source(serve, cut))

    def test_an_endless_body_is_refused(self) -> None:
        endless = Answer(body=DATA, length=-1, after="endless")
        with self.assertRaises(errors.ImageRejected):
            self.fetch(self.source(serve, endless))

    def test_a_server_that_ignores_ranges_is_read_from_the_start(self) -> None:
        cut = Answer(body=DATA[:HALF], length=len(DATA), after="close")
        self.assertEqual(DATA, self.fetch(self.source(serve, cut, Answer(body=DATA))))
        self.assertEqual([None, f"bytes={HALF}-", None], self.offsets())

    def test_a_range_that_is_not_the_one_asked_for_is_not_spliced_in(self) -> None:
        cut = Answer(body=DATA[:HALF], length=len(DATA), after="close")
        rest = DATA[HALF:]
        for value in (
            f"bytes {HALF + 1}-{len(DATA) - 1}/{len(DATA)}",
            f"bytes {HALF}-{len(DATA)}/{len(DATA) + 1}",
            f"bytes {len(DATA) - 1}-{HALF}/{len(DATA)}",
            "bytes */500000",
            "pages 1-2/3",
            None,
        ):
            with self.subTest(value=value):
                wrong = Answer(206, {} if value is None else {"Content-Range": value}, rest)
                self.server.seen.clear()
                self.assertEqual(DATA, self.fetch(self.source(serve, cut, wrong, serve)))
                self.assertIsNone(self.offsets()[-1])

    def test_refused_ranges_and_preconditions_start_again(self) -> None:
        cut = Answer(body=DATA[:HALF], length=len(DATA), after="close")
        for status in (412, 416):
            with self.subTest(status=status):
                self.assertEqual(DATA, self.fetch(self.source(serve, cut, Answer(status), serve)))

    def test_a_short_range_is_completed(self) -> None:
        part = Answer(206, {"Content-Range": f"bytes 10-19/{len(DATA)}"}, DATA[10:20])
        cut = Answer(body=DATA[:10], length=len(DATA), after="close")
        self.assertEqual(DATA, self.fetch(self.source(serve, cut, part, serve), retries=2))


class TestEntityTags(HttpCase):
    cut: ClassVar[Answer] = Answer(
        headers={"ETag": '"one"'}, body=DATA[:HALF], length=len(DATA), after="close"
    )

    def test_a_strong_tag_allows_to_resume_without_a_digest(self) -> None:
        source = self.source(tagged('"one"'), self.cut, tagged('"one"'), digest=None)
        self.assertEqual(DATA, self.fetch(source))
        resumed = self.server.requests("GET")[-1]
        self.assertEqual((f"bytes={HALF}-", '"one"'), (resumed.headers["Range"], resumed.headers["If-Range"]))

    def test_a_weak_tag_does_not(self) -> None:
        source = self.source(tagged('W/"one"'), digest=None)
        image = source.describe("x")
        self.assertFalse(source.can_resume(image))

    def test_an_empty_one_does_not(self) -> None:
        # Some servers send it with everything they have.
        cut = dataclasses.replace(self.cut, headers={"ETag": '""'})
        source = self.source(tagged('""'), cut, tagged('""'), digest=None)
        self.assertEqual(DATA, self.fetch(source))
        self.assertEqual([None, None], self.offsets())

    def test_changed_content_is_never_spliced(self) -> None:
        # The same length, so that only the tag tells.
        new = random.Random(3).randbytes(len(DATA))
        source = self.source(tagged('"one"'), self.cut, tagged('"two"', new), digest=None)
        self.assertEqual(new, self.fetch(source))

    def test_a_part_with_another_tag_is_refused(self) -> None:
        lying = Answer(206, {"ETag": '"two"', "Content-Range": "bytes 10-19/20"}, DATA[:10])
        source = self.source(tagged('"one"', DATA[:20]), lying)
        image = source.describe("x")
        with self.assertRaises(CannotResume), source.open(image, 10):
            pass

    def test_with_a_digest_mirrors_may_differ_in_their_tags(self) -> None:
        self.assertEqual(DATA, self.fetch(self.source(tagged('"one"'), tagged('"two"'))))


class TestConnections(HttpCase):
    def test_a_dead_kept_alive_connection_is_invisible(self) -> None:
        source = self.source(serve, Answer(after="drop"), serve)
        image = source.describe("x")
        with source.open(image) as stream:
            self.assertEqual(DATA, b"".join(stream))
        first, second, third = self.server.requests()
        self.assertEqual(first.connection, second.connection)
        self.assertNotEqual(second.connection, third.connection)

    def test_a_server_that_drops_every_request_is_a_source_error(self) -> None:
        with self.assertRaises(errors.SourceError):
            self.source(Answer(after="drop")).describe("x")
        self.assertEqual(["HEAD"] * 4 + ["GET"] * 4, [seen.method for seen in self.server.requests()])

    def test_a_silent_server_is_asked_once_per_attempt(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            source = HttpSource({"x": HttpImage(url)}, timeout=(1.0, 0.05))
            with self.assertRaisesRegex(errors.SourceError, "nothing came in time"):
                transfer.describe(source, "x", host=QUIET, retries=2)
            # Of the first attempt, HEAD may be all that it is silent to.
            self.assertEqual(["HEAD", "GET", "GET", "GET"], _methods_of(silent))
        with self.assertRaisesRegex(errors.SourceError, "refused"):
            source.describe("x")

    def test_a_server_that_is_silent_to_head_is_asked_so_once(self) -> None:
        source = self.source(serve, timeout=(60.0, 0.2))
        self.server.always_fail("/x", faults.slow_head(60.0), method="HEAD")
        for _ in range(3):
            self.assertEqual(DATA, self.fetch(source, retries=0))
        self.assertEqual(1, len(self.server.requests("HEAD")))

    def test_server_errors_pass(self) -> None:
        source = self.source(Answer(503), serve, Answer(502), serve)
        self.assertEqual(DATA, self.fetch(source))

    def test_retry_after_is_passed_on(self) -> None:
        for headers, seconds in (({"Retry-After": "7"}, 7.0), ({"Retry-After": "soon"}, None), ({}, None)):
            with self.subTest(headers=headers):
                with self.assertRaises(SourceBusy) as caught:
                    self.source(Answer(429, headers)).describe("x")
                self.assertEqual(seconds, caught.exception.retry_after)

    def test_identity_is_asked_for_and_insisted_on(self) -> None:
        packed = Answer(headers={"Content-Encoding": "gzip"}, body=gzip.compress(DATA))
        source = self.source(packed, digest=None)
        image = source.describe("x")
        self.assertIsNone(image.size)
        with self.assertRaisesRegex(errors.SourceError, "gzip"):
            self.fetch(source)
        self.assertEqual({"identity"}, {seen.headers["Accept-Encoding"] for seen in self.server.requests()})


def _methods_of(listener: socket.socket) -> list[str]:
    """Return the methods of the requests on all connections that a listener did not take yet."""
    listener.setblocking(False)
    methods = []
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = listener.accept()
            with connection:
                methods.append(connection.recv(2**16).split(b" ")[0].decode())
    return methods


class TestDescribe(HttpCase):
    def test_falls_back_to_a_range_where_head_is_not_allowed(self) -> None:
        for status in (405, 501):
            image = self.source(Answer(status), tagged('"one"')).describe("x")
            self.assertEqual((len(DATA), "one"), (image.size, image.properties["etag"].strip('"')))
        self.assertEqual(["bytes=0-0", "bytes=0-0"], self.offsets())

    def test_a_server_without_ranges_still_tells_the_size(self) -> None:
        self.assertEqual(len(DATA), self.source(Answer(405), Answer(body=DATA)).describe("x").size)

    def test_a_configured_size_outranks_the_servers(self) -> None:
        self.server.script("/x", serve)
        source = HttpSource({"x": HttpImage(f"{self.server.url}/x", size=7)})
        self.assertEqual(7, source.describe("x").size)

    def test_each_status_has_its_error(self) -> None:
        expected: dict[int, tuple[type[errors.ImageCacheError], str]] = {
            401: (SourceRefused, "token or credentials"),
            403: (NotPermitted, "no permission"),
            404: (errors.ImageNotFound, "no such image"),
            410: (errors.ImageNotFound, "no such image"),
            418: (SourceRefused, "418"),
            429: (SourceBusy, "429"),
            500: (SourceBusy, "500"),
            204: (errors.ImageRejected, "no data"),
        }
        for status, (kind, text) in expected.items():
            with self.subTest(status=status), self.assertRaisesRegex(kind, text) as caught:
                self.source(Answer(status)).describe("x")
            self.assertEqual("x", caught.exception.image)
            self.assertIsNotNone(caught.exception.next_step)

    def test_urls_are_checked_when_the_source_is_made(self) -> None:
        for url in (
            "ftp://host/x",
            "/etc/passwd",
            "http://",
            "http://host:99999/",
            "http://[",
            "",
            "http://ho\0st/",
            "http://ho\x1bst/",
            "http://ho\ud800st/",
            "http://host/\ud800",
        ):
            with self.subTest(url=url), self.assertRaises(errors.ConfigError):
                HttpSource({"x": HttpImage(url)})

    def test_a_table_that_is_none_is_refused(self) -> None:
        url = f"http://user:{SECRET}@host/"
        tables: tuple[Any, ...] = (
            None,
            [url],
            url,
            {"x": url},
            {"x": {"url": url}},
            HttpImage(url),
            FileImage(url),
        )
        for table in tables:
            for source in (HttpSource, FileSource):
                with self.subTest(table=table), self.assertRaises(errors.ConfigError) as caught:
                    source(table)
                self.assertNotIn(SECRET, str(caught.exception))

    def test_secrets_in_a_url_are_not_shown(self) -> None:
        url = self.server.url.replace("//", f"//user:{SECRET}@") + f"/x?signature={SECRET}#{SECRET}"
        source = HttpSource({"x": HttpImage(url)})
        for answer in (Answer(404), Answer(500), Answer(after="drop"), Answer(302, {"Location": "ftp://x"})):
            self.server.script(f"/x?signature={SECRET}", answer)
            with self.assertRaises(errors.ImageCacheError) as caught:
                source.describe("x")
            self.assertNotIn(SECRET, str(caught.exception))
        self.assertNotIn(SECRET, repr(source) + repr(HttpImage(url)))
        self.assertIn("Authorization", self.server.requests()[0].headers)


class TestRedirects(HttpCase):
    def to(self, url: str) -> Answer:
        return Answer(302, {"Location": url})

    def authorized(self) -> requests.Session:
        session = requests.Session()
        session.headers["Authorization"] = SECRET
        session.headers["X-Key"] = SECRET
        session.cookies.set("key", SECRET)
        self.addCleanup(session.close)
        return session

    def test_follows_within_the_origin_with_credentials(self) -> None:
        self.server.script("/y", serve)
        self.assertEqual(DATA, self.fetch(self.source(self.to("/y"), session=self.authorized())))
        self.assertEqual({SECRET}, {seen.headers["Authorization"] for seen in self.server.requests()})

    def test_another_origin_gets_no_credentials(self) -> None:
        other = self.enterContext(BadServer())
        other.script("/y", serve)
        source = self.source(self.to(f"{other.url}/y"), session=self.authorized())
        self.assertEqual(DATA, self.fetch(source))
        self.assertIn(SECRET, str(self.server.requests()[0].headers))
        self.assertNotIn(SECRET, str([seen.headers for seen in other.requests()]))

    def test_a_stranger_that_redirects_back_does_not_regain_them(self) -> None:
        other = self.enterContext(BadServer())
        other.script("/y", self.to(f"{self.server.url}/z"))
        self.server.script("/z", serve)
        self.fetch(self.source(self.to(f"{other.url}/y"), session=self.authorized()))
        back = [seen for seen in self.server.requests() if seen.path == "/z"]
        self.assertNotIn(SECRET, str([seen.headers for seen in back]))

    def test_loops_end(self) -> None:
        with self.assertRaisesRegex(SourceRefused, "redirects"):
            self.source(self.to("/x")).describe("x")
        self.assertEqual(6, len(self.server.requests("GET")))

    def test_goes_nowhere_but_to_the_web(self) -> None:
        for url in ("file:///etc/passwd", "ftp://host/", "http://[", "http://host:x/"):
            with self.subTest(url=url), self.assertRaises(SourceRefused):
                self.source(self.to(url)).describe("x")


class TestTls(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.certificate = Certificate.make(directory)
        self.server = self.enterContext(BadServer(tls=str(self.certificate.path)))
        self.server.script("/x", serve)
        self.table = {"x": HttpImage(f"{self.server.url}/x")}

    def test_an_unknown_certificate_is_refused_at_once(self) -> None:
        with self.assertRaisesRegex(SourceRefused, "certificate.*does not verify"):
            HttpSource(self.table).describe("x")
        self.assertEqual([], self.server.requests())

    def test_a_given_certificate_is_trusted(self) -> None:
        source = HttpSource(self.table, verify=str(self.certificate.path))
        self.assertEqual(len(DATA), source.describe("x").size)

    def test_what_to_do_depends_on_why_a_certificate_does_not_verify(self) -> None:
        for number, (days, address, what) in enumerate(
            (
                ((-9, -1), "127.0.0.1", "renewed.*clock"),
                ((1, 9), "127.0.0.1", "renewed.*clock"),
                ((-1, 9), "127.0.0.2", "a name that is in its certificate"),
            )
        ):
            directory = self.directory / str(number)
            directory.mkdir()
            certificate = str(Certificate.make(directory, days=days, address=address).path)
            with BadServer(tls=certificate) as server, self.assertRaisesRegex(SourceMisconfigured, what):
                HttpSource({"x": HttpImage(f"{server.url}/x")}, verify=certificate).describe("x")

    def test_a_file_of_certificates_that_is_none_is_a_fault_of_the_set_up(self) -> None:
        none = self.directory / "none.pem"
        none.write_text("no certificate\n")
        torn = self.directory / "torn.pem"
        torn.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        for path in (none, torn, self.directory / "missing.pem"):
            with self.subTest(path.name), self.assertRaisesRegex(SourceMisconfigured, "file.*certificate"):
                HttpSource(self.table, verify=str(path)).describe("x")
        self.assertEqual([], self.server.requests())

    def test_the_sessions_own_trust_holds(self) -> None:
        with requests.Session() as session:
            session.verify = str(self.certificate.path)
            self.assertEqual(len(DATA), HttpSource(self.table, session=session).describe("x").size)

    def test_never_from_https_to_http(self) -> None:
        plain = self.enterContext(BadServer())
        plain.script("/x", serve)
        self.server.script("/x", Answer(302, {"Location": f"{plain.url}/x"}))
        with self.assertRaisesRegex(SourceRefused, "from https to http"):
            HttpSource(self.table, verify=str(self.certificate.path)).describe("x")
        self.assertEqual([], plain.requests())


class TestEndOfTls(unittest.TestCase):
    """Data that end with the connection, of which nothing tells the length: RFC 9112, section 9.8."""

    def setUp(self) -> None:
        directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.certificate = str(Certificate.make(directory).path)
        self.listener = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        self.url = f"https://127.0.0.1:{self.listener.getsockname()[1]}/x"

    def serve(self, *, alert: bool, length: int | None = None) -> None:
        """Answer requests until the listener is closed.

        :param alert: end TLS before the connection ends.
        :param length: what HEAD tells, or None for nothing.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)

        def one(plain: socket.socket) -> None:
            with context.wrap_socket(plain, server_side=True) as tls:
                is_head = tls.recv(2**16).startswith(b"HEAD")
                told = f"Content-Length: {length}\r\n" if is_head and length is not None else ""
                tls.sendall(f"HTTP/1.1 200 OK\r\nConnection: close\r\n{told}\r\n".encode())
                tls.sendall(b"" if is_head else DATA)
                if alert:
                    tls.setblocking(False)  # the client's own is not waited for
                    with contextlib.suppress(ssl.SSLWantReadError):
                        tls.unwrap()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    one(self.listener.accept()[0])

        thread = threading.Thread(target=serve)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self.listener.shutdown, socket.SHUT_RDWR)

    def read(self, digest: model.Digest | None = None, size: int | None = None) -> bytes:
        image = HttpImage(self.url, "raw", digest, size=size)
        source = HttpSource({"x": image}, verify=self.certificate, timeout=(60.0, 60.0))
        found, described = transfer.describe(source, "x", host=QUIET)
        return b"".join(transfer.Transfer(found, described, host=QUIET, retries=0).chunks())

    def test_without_an_alert_nothing_shows_that_they_are_all(self) -> None:
        self.serve(alert=False)
        with self.assertRaisesRegex(errors.SourceError, "may have been cut off.*size or digest"):
            self.read()

    def test_what_else_is_known_of_them_shows_it(self) -> None:
        self.serve(alert=False)
        self.assertEqual(DATA, self.read(DIGEST))
        self.assertEqual(DATA, self.read(size=len(DATA)))

    def test_a_length_that_head_tells_shows_it(self) -> None:
        self.serve(alert=False, length=len(DATA))
        self.assertEqual(DATA, self.read())

    def test_the_alert_shows_it(self) -> None:
        self.serve(alert=True)
        self.assertEqual(DATA, self.read())
