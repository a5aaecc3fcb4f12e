# SPDX-License-Identifier: Apache-2.0
"""What servers say beside the data (by HEAD, in headers, by redirects) does not outrank the data."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import pathlib
import random
import tempfile
import time
import unittest

from imagecache_lib import errors, model
from imagecache_lib.sources import transfer
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.sources.interface import ImageSource, SourceRefused, Unauthorized
from imagecache_lib.system.host import System
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import Answer, BadServer, Seen, data_answer

DATA = random.Random(6).randbytes(300_000)
DIGEST = model.Digest("sha256", hashlib.sha256(DATA).hexdigest())
HALF = len(DATA) // 2
QUIET = System(name="here", sleep=lambda seconds: None)


def fetch(source: ImageSource, *, retries: int = 1, max_size: int | None = None) -> bytes:
    """Fetch the image x as an ingest does: describe, transfer, compare the digest."""
    found, image = transfer.describe(source, "x", host=QUIET, retries=retries)
    fetching = transfer.Transfer(found, image, host=QUIET, retries=retries, max_size=max_size)
    while True:
        try:
            data = b"".join(fetching.chunks())
            digest = image.digest
            if digest is not None and hashlib.new(digest.algorithm, data).hexdigest() != digest.value:
                raise errors.ImageRejected("its digest is another")
        except transfer.StartAgain:
            continue
        except errors.ImageRejected:
            if fetching.grant_clean_pass():
                continue
            raise
        return data


def _validator(seen: list[Seen]) -> str | None:
    """Return the entity tag with which the last request went on, or that of all requests if none did."""
    return seen[-1].headers.get("If-Range", '"one"')


class ServerCase(unittest.TestCase):
    def setUp(self) -> None:
        self.server = self.enterContext(BadServer())
        self.url = self.server.put("/x", DATA, etag='"one"')

    def source(self, url: str | None = None, *, digest: model.Digest | None = None) -> HttpSource:
        return HttpSource({"x": HttpImage(url or self.url, "raw", digest)}, timeout=(60.0, 60.0))

    def with_and_without_digest(self) -> tuple[HttpSource, HttpSource]:
        return self.source(digest=DIGEST), self.source()


class TestHeadIsAHint(ServerCase):
    def test_a_wrong_length_is_replaced_by_the_one_of_the_data(self) -> None:
        for length in (0, 1000, len(DATA) + 1, 10 * len(DATA), None):
            self.server.fail("/x", *[faults.length_told(length)] * 2, method="HEAD")
            for source in self.with_and_without_digest():
                with self.subTest(length=length):
                    self.assertEqual(DATA, fetch(source, retries=0))

    def test_nothing_else_that_it_tells_outranks_the_data(self) -> None:
        elsewhere = self.server.put("/elsewhere", b"other data", etag='"other"')
        for fault in (
            faults.entity_tag('"another"'),
            faults.entity_tag('W/"one"'),
            faults.entity_tag(None),
            faults.document(),
            faults.encoded("gzip"),
            faults.header("Accept-Ranges", "none"),
            faults.header("Content-Range", "bytes 0-9/10"),
            faults.status(206, {"Content-Range": "bytes 0-9/10"}, b"0123456789"),
            faults.redirected(elsewhere),
            faults.chunked(),
            faults.http_1_0(with_length=False),
        ):
            for source in self.with_and_without_digest():
                with self.subTest(fault=fault):
                    self.server.forget("/x")
                    self.server.always_fail("/x", fault, method="HEAD")
                    self.server.fail("/x", faults.truncated(HALF))
                    # That one may be spent on the single byte that makes up for HEAD, or for another length.
                    self.assertEqual(DATA, fetch(source, retries=1))
                    self.assertEqual('"one"', _validator(self.server.requests("GET", "/x")))

    def test_a_refusal_is_not_the_last_word(self) -> None:
        for status in (204, 400, 401, 403, 404, 405, 406, 429, 500, 501, 503):
            self.server.fail("/x", *[faults.status(status)] * 2, method="HEAD")
            for source in self.with_and_without_digest():
                with self.subTest(status=status):
                    self.assertEqual(DATA, fetch(source, retries=0))

    def test_a_connection_closed_on_head_is_not_the_last_word(self) -> None:
        self.server.always_fail("/x", faults.dropped(), method="HEAD")
        self.assertEqual(DATA, fetch(self.source(), retries=0))

    def test_a_refused_get_is_the_last_word(self) -> None:
        self.server.always_fail("/x", faults.status(404))
        self.assertRaises(errors.ImageNotFound, self.source().describe, "x")
        self.assertEqual([None, "bytes=0-0"], [seen.headers.get("Range") for seen in self.server.requests()])

    def test_a_refused_range_is_not_the_last_word(self) -> None:
        self.server.always_fail("/x", faults.status(405), method="HEAD")
        for status in (400, 416, 501):
            self.server.fail("/x", faults.range_refused(status), faults.fine())
            self.assertEqual(len(DATA), self.source().describe("x").size)

    def test_a_length_that_the_operator_states_is_not_replaced(self) -> None:
        source = HttpSource({"x": HttpImage(self.url, "raw", size=1000)})
        with self.assertRaisesRegex(errors.SourceError, "more than the 1000 bytes"):
            fetch(source)


class TestLength(ServerCase):
    def test_data_that_end_early_without_a_length_are_fetched_again(self) -> None:
        self.server.always_fail("/x", faults.length_told(None), method="HEAD")
        self.server.fail("/x", faults.cut_without_length(HALF))
        self.assertEqual(DATA, fetch(self.source(digest=DIGEST)))

    def test_data_that_always_end_early_are_the_sources_fault(self) -> None:
        self.server.always_fail("/x", faults.length_told(None), method="HEAD")
        self.server.always_fail("/x", faults.cut_without_length(HALF), method="GET")
        with self.assertRaisesRegex(errors.SourceError, "cut off.*gave up after 2 attempts"):
            fetch(self.source(digest=DIGEST))

    def test_whole_data_with_a_wrong_digest_are_the_images(self) -> None:
        wrong = model.Digest("sha256", "0" * 64)
        for fault in (faults.fine(), faults.chunked()):
            self.server.always_fail("/x", fault)
            self.assertRaises(errors.ImageRejected, fetch, self.source(digest=wrong))

    def test_a_chunked_body_needs_no_length(self) -> None:
        self.server.always_fail("/x", faults.chunked())
        for source in self.with_and_without_digest():
            self.assertEqual(DATA, fetch(source))


class TestSlowness(ServerCase):
    def test_a_server_that_trickles_is_given_up(self) -> None:
        self.server.always_fail("/x", faults.trickling(0.01), method="GET")
        hurried = dataclasses.replace(QUIET, monotonic=lambda: time.monotonic() * 300)
        source = self.source(digest=DIGEST)
        found, image = transfer.describe(source, "x", host=hurried)
        fetching = transfer.Transfer(found, image, host=hurried, retries=1, min_rate=1024)
        with self.assertRaisesRegex(errors.SourceError, "bytes came in .* gave up after 2 attempts"):
            b"".join(fetching.chunks())


class TestMirrors(ServerCase):
    def setUp(self) -> None:
        super().setUp()
        self.mirrors = [self.enterContext(BadServer()) for _ in range(3)]
        self.turn = 0
        for number, mirror in enumerate(self.mirrors):
            mirror.put("/x", DATA, etag=f'"{number}"')
        self.server.script("/x", self.redirect)

    def redirect(self, _seen: Seen) -> Answer:
        self.turn += 1
        return Answer(302, {"Location": f"{self.mirrors[self.turn % 3].url}/x"})

    def test_differing_entity_tags_do_not_matter(self) -> None:
        for source in self.with_and_without_digest() * 3:
            self.assertEqual(DATA, fetch(source, retries=0))

    def test_a_transfer_that_breaks_starts_anew_at_another_mirror(self) -> None:
        for source in self.with_and_without_digest():
            for mirror in self.mirrors:
                mirror.fail("/x", faults.truncated(HALF))
            self.assertEqual(DATA, fetch(source, retries=5))

    def test_it_goes_on_at_the_mirror_whose_tag_it_has(self) -> None:
        self.server.script("/x", lambda _seen: Answer(302, {"Location": f"{self.mirrors[0].url}/x"}))
        self.server.fail("/x", faults.redirected(f"{self.mirrors[1].url}/x"), method="HEAD")
        self.mirrors[0].fail("/x", faults.truncated(HALF))
        self.assertEqual(DATA, fetch(self.source()))
        resumed = self.mirrors[0].requests("GET")[-1].headers
        self.assertEqual((f"bytes={HALF}-", '"0"'), (resumed["Range"], resumed["If-Range"]))

    def test_bytes_of_two_mirrors_are_never_mixed(self) -> None:
        other = random.Random(7).randbytes(len(DATA))
        self.mirrors[1].put("/x", other, etag='"1"')
        self.mirrors[2].put("/x", DATA, etag='"2"')
        for mirror in self.mirrors:
            mirror.fail("/x", faults.truncated(HALF))
        self.assertIn(fetch(self.source(), retries=5), (DATA, other))


class TestCodings(ServerCase):
    def test_codings_that_change_no_byte_do_not_matter(self) -> None:
        for coding in ("aws-chunked", "AWS-Chunked", "binary", "none", "utf-8", "identity, aws-chunked", ""):
            self.server.script("/x", lambda seen: data_answer(DATA, seen))
            self.server.always_fail("/x", faults.encoded(coding))
            for source in self.with_and_without_digest():
                with self.subTest(coding=coding):
                    self.assertEqual(DATA, fetch(source))

    def test_codings_that_change_bytes_are_refused_without_a_digest(self) -> None:
        for coding in ("gzip", "x-gzip", "GZip", "deflate", "br", "zstd", "compress", "aws-chunked, gzip"):
            with self.subTest(coding=coding):
                server = self.enterContext(BadServer())
                source = self.source(server.put("/x", DATA))
                server.always_fail("/x", faults.header("Content-Encoding", coding))
                self.assertRaises(SourceRefused, fetch, source)

    def test_with_a_digest_the_bytes_decide(self) -> None:
        self.server.always_fail("/x", faults.header("Content-Encoding", "gzip"))
        self.assertEqual(DATA, fetch(self.source(digest=DIGEST)))

    def test_a_wrong_digest_of_an_encoded_answer_is_the_servers_fault(self) -> None:
        self.server.always_fail("/x", faults.encoded("gzip"))
        with self.assertRaisesRegex(SourceRefused, "gzip"):
            fetch(self.source(digest=DIGEST))

    def test_the_coding_that_the_image_is_said_to_have_is_no_coding(self) -> None:
        self.server.always_fail("/x", faults.header("Content-Encoding", "x-gzip"))
        source = HttpSource({"x": HttpImage(self.url, "raw", compression="gzip")})
        self.assertEqual(DATA, fetch(source))


class TestDocuments(ServerCase):
    TYPES = (
        "text/html",
        "TEXT/HTML; charset=utf-8",
        "text/xml",
        "application/xml",
        "application/json",
        "application/problem+json",
        "application/xhtml+xml",
    )

    def test_are_refused_with_what_they_are(self) -> None:
        for kind in self.TYPES:
            self.server.put("/x", DATA, content_type=kind)
            with self.subTest(kind=kind), self.assertRaisesRegex(SourceRefused, "document") as caught:
                fetch(self.source())
            self.assertIn(kind.partition(";")[0], caught.exception.cause)
            self.assertIn("state its digest", str(caught.exception.next_step))

    def test_a_page_behind_a_redirect_is_refused(self) -> None:
        self.server.put("/index.html", b"<html>", content_type="text/html")
        self.server.script("/x", Answer(302, {"Location": "/index.html"}))
        self.assertRaises(SourceRefused, fetch, self.source())

    def test_with_a_digest_the_bytes_decide(self) -> None:
        self.server.put("/x", DATA, content_type="text/html")
        self.assertEqual(DATA, fetch(self.source(digest=DIGEST)))
        self.server.put("/x", DATA[::-1], content_type="text/html")
        with self.assertRaisesRegex(SourceRefused, "document") as caught:
            fetch(self.source(digest=DIGEST))
        self.assertNotIn("digest", str(caught.exception.next_step))

    def test_what_they_say_in_the_data_is_theirs_and_not_the_images(self) -> None:
        for said in (
            b"404 page not found\n",
            b"<!DOCTYPE html><html>gone</html>",
            b'{"error": "gone"}',
            b"\x89PNG\r\n\x1a\n" + bytes(100),
        ):
            for kind in ("text/plain", "application/octet-stream"):
                self.server.put("/x", said, content_type=kind)
                with self.subTest(said[:20], kind=kind), self.assertRaisesRegex(SourceRefused, "no disk"):
                    fetch(self.source(digest=DIGEST))
                text = model.Digest("sha256", hashlib.sha256(said).hexdigest())
                self.assertEqual(said, fetch(self.source(digest=text)))

    def test_types_that_servers_give_to_disks_are_taken(self) -> None:
        for kind in (
            None,
            "",
            "text/plain",
            "application/octet-stream",
            "application/x-qemu-disk",
            "application/x-iso9660-image",
            "application/vnd.something",
        ):
            self.server.put("/x", DATA, content_type=kind)
            self.assertEqual(DATA, fetch(self.source()))


class TestCredentials(ServerCase):
    USER, PASSWORD = "us%40er", "p%3Aa%20ss"  # user "us@er", password "p:a ss"
    WANTED = "Basic " + base64.b64encode(b"us@er:p:a ss").decode()

    def with_credentials(self, url: str) -> str:
        return url.replace("http://", f"http://{self.USER}:{self.PASSWORD}@")

    def setUp(self) -> None:
        super().setUp()
        for path in ("/x", "/real"):
            self.server.put(path, DATA)
            self.server.always_fail(path, faults.unauthorized("Authorization", self.WANTED))

    def test_are_sent_to_their_origin_whatever_the_redirect(self) -> None:
        for location in ("/real", f"{self.server.url}/real", "real"):
            self.server.script("/x", Answer(302, {"Location": location}))
            self.assertEqual(DATA, fetch(self.source(self.with_credentials(self.url))))

    def test_are_sent_to_no_other_origin(self) -> None:
        other = self.enterContext(BadServer())
        other.put("/y", DATA)
        self.server.script("/x", Answer(302, {"Location": f"{other.url}/y"}))
        self.assertEqual(DATA, fetch(self.source(self.with_credentials(self.url))))
        self.assertEqual([], [seen for seen in other.requests() if "Authorization" in seen.headers])

    def test_are_sent_again_to_their_origin_by_way_of_another(self) -> None:
        other = self.enterContext(BadServer())
        self.server.script("/x", Answer(302, {"Location": f"{other.url}/y"}))
        other.script("/y", Answer(307, {"Location": f"{self.server.url}/real"}))
        self.assertEqual(DATA, fetch(self.source(self.with_credentials(self.url))))

    def test_another_port_or_scheme_is_another_origin(self) -> None:
        other = self.enterContext(BadServer())
        other.put("/y", DATA)
        location = other.url.replace("127.0.0.1", "localhost")
        self.server.script("/x", Answer(302, {"Location": f"{location}/y"}))
        self.assertEqual(DATA, fetch(self.source(self.with_credentials(self.url))))
        self.assertEqual([], [seen for seen in other.requests() if "Authorization" in seen.headers])

    def test_a_server_does_not_choose_whom_this_host_tells_its_own(self) -> None:
        netrc = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "netrc")
        netrc.write_text("default login us@er password secret")
        os.environ["NETRC"] = str(netrc)
        self.addCleanup(os.environ.pop, "NETRC")
        other = self.enterContext(BadServer())
        other.put("/y", DATA)
        self.server.script("/from", Answer(302, {"Location": f"{other.url}/y"}))
        self.assertEqual(DATA, fetch(self.source(f"{self.server.url}/from")))
        self.assertEqual([], [seen for seen in other.requests() if "Authorization" in seen.headers])
        self.assertEqual([], [seen for seen in self.server.requests() if "Authorization" not in seen.headers])

    def test_a_redirect_may_bring_those_of_where_it_leads(self) -> None:
        other = self.enterContext(BadServer())
        other.put("/y", DATA)
        other.always_fail("/y", faults.unauthorized("Authorization", self.WANTED))
        self.server.script("/from", Answer(302, {"Location": self.with_credentials(other.url) + "/y"}))
        self.assertEqual(DATA, fetch(self.source(f"{self.server.url}/from")))

    def test_a_backslash_leads_to_no_other_origin(self) -> None:
        other = self.enterContext(BadServer())
        home, where = self.server.url.removeprefix("http://"), other.url
        self.server.script("/x", Answer(302, {"Location": f"{where}\\@{home}/real"}))
        self.assertEqual(DATA, fetch(self.source(self.with_credentials(self.url))))
        self.assertEqual([], other.requests())

    def test_without_them_the_refusal_says_so(self) -> None:
        with self.assertRaisesRegex(Unauthorized, "credentials"):
            fetch(self.source())

    def test_wrong_ones_are_not_shown(self) -> None:
        with self.assertRaises(Unauthorized) as caught:
            fetch(self.source(self.url.replace("http://", "http://user:s3same@")))
        self.assertNotIn("s3same", str(caught.exception))
