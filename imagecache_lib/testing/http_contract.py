# SPDX-License-Identifier: Apache-2.0
"""What a source that fetches over HTTP must survive, as tests beside :class:`SourceContract`::

class TestMySource(HttpSourceContract, unittest.TestCase):
    def make_http_source(self, server, images):
        for image_id, data in images.items():
            server.put(self.data_path(image_id), data)
        return MySource(server.url)

    def data_path(self, image_id):
        return f"/images/{image_id}"

The server is a :class:`~imagecache_lib.testing.bad_server.BadServer`. What is expected is what a spawn gets:
the library's own transfer is around the source, so that only what the source itself answers for is tested.
"""

from __future__ import annotations

import contextlib
import hashlib
import urllib.parse
from collections.abc import Mapping

from imagecache_lib import errors, model
from imagecache_lib.sources import transfer
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.system.host import System
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import BadServer, Fault
from imagecache_lib.testing.source_contract import FIRST, SourceContract

#: Where a transfer is broken: behind the first chunks, before the last.
_BREAK = 1_500_000


class HttpSourceContract(SourceContract):
    """Mix it into a :class:`unittest.TestCase` and supply :meth:`make_http_source` and :meth:`data_path`."""

    server: BadServer

    def make_http_source(self, server: BadServer, images: Mapping[str, bytes]) -> ImageSource:
        """Put the images where the source finds them on the server, and return the source.

        It must give up on a silent connection within seconds.
        """
        raise AssertionError("a contract test case supplies make_http_source")

    def data_path(self, image_id: str) -> str:
        """Return the path under which the server has an image's data."""
        raise AssertionError("a contract test case supplies data_path")

    def make_source(self, images: Mapping[str, bytes]) -> ImageSource:
        self.server = self.enterContext(BadServer())
        return self.make_http_source(self.server, images)

    def fetch(self, *, retries: int = 2) -> bytes:
        """Fetch the first image as an ingest does: describe, transfer, compare the digest."""
        host = System(name="contract", sleep=lambda seconds: None)
        source, image = transfer.describe(self.source, FIRST, host=host, retries=retries)
        fetching = transfer.Transfer(source, image, host=host, retries=retries)
        while True:
            try:
                data = b"".join(fetching.chunks())
                _require_digest(image, data)
            except transfer.StartAgain:
                continue
            except errors.ImageRejected:
                if fetching.grant_clean_pass():
                    continue
                raise
            return data

    def _fail(self, *planned: Fault) -> None:
        self.server.fail(self.data_path(FIRST), *planned)

    def test_broken_transfers_are_completed(self) -> None:
        self.source.describe(FIRST)
        for fault in (
            faults.truncated(_BREAK),
            faults.reset(_BREAK),
            faults.stalled(_BREAK),
            faults.cut_without_length(_BREAK),
            faults.both(faults.chunked(), faults.truncated(_BREAK)),
            faults.dropped(),
            faults.busy(503),
            faults.busy(429, retry_after=1),
            faults.status(500),
            faults.status(502),
        ):
            with self.subTest(fault=fault):
                self._fail(fault)
                self.assertEqual(self.data, self.fetch())

    def test_servers_that_cannot_resume_are_read_from_the_start(self) -> None:
        for fault in (
            faults.range_ignored(self.data),
            faults.range_refused(400),
            faults.range_refused(416),
            faults.range_refused(501),
            faults.range_told(f"bytes 0-{len(self.data) - 1}/{len(self.data)}"),
            faults.range_told(None),
        ):
            with self.subTest(fault=fault):
                self._fail(faults.truncated(_BREAK), fault)
                self.assertEqual(self.data, self.fetch())

    def test_a_truncation_that_never_ends_is_the_sources_fault(self) -> None:
        self.server.always_fail(self.data_path(FIRST), faults.truncated(1000), method="GET")
        self.assertRaises(errors.SourceError, self.fetch)

    def test_a_document_is_no_image(self) -> None:
        self.server.always_fail(self.data_path(FIRST), faults.document())
        self.assertRaises(errors.SourceError, self.fetch)

    def test_a_compressed_answer_is_not_taken_for_the_image(self) -> None:
        self.server.always_fail(self.data_path(FIRST), faults.encoded("gzip"))
        self.assertRaises(errors.SourceError, self.fetch)

    def test_a_bomb_is_not_unpacked(self) -> None:
        self.server.always_fail(self.data_path(FIRST), faults.bomb())
        self.assertRaises(errors.ImageCacheError, self.fetch)

    def test_codings_that_change_no_byte_do_not_matter(self) -> None:
        self.server.always_fail(self.data_path(FIRST), faults.encoded("aws-chunked"))
        self.assertEqual(self.data, self.fetch())

    def test_missing_and_forbidden_images_are_not_found(self) -> None:
        for status in (403, 404, 410):
            with self.subTest(status=status):
                self._fail(faults.status(status))
                with self.assertRaises(errors.ImageNotFound), self.source.open(model.Image(FIRST)) as stream:
                    next(stream)

    def test_a_refused_token_is_a_source_error(self) -> None:
        self._fail(*[faults.status(401)] * 4)
        with self.assertRaises(errors.SourceError), self.source.open(model.Image(FIRST)) as stream:
            next(stream)

    def test_no_header_goes_to_another_origin(self) -> None:
        other = self.enterContext(BadServer())
        other.put("/stolen", self.data)
        self.server.always_fail(self.data_path(FIRST), faults.redirected(f"{other.url}/stolen"))
        with contextlib.suppress(errors.SourceError):  # refusing to go there is fine too
            self.fetch()
        for seen in other.requests():
            for name in ("Authorization", "X-Auth-Token", "Cookie"):
                self.assertNotIn(name, seen.headers)

    def test_redirects_that_go_round_end(self) -> None:
        path = urllib.parse.quote(self.data_path(FIRST))
        self.server.always_fail(self.data_path(FIRST), faults.redirected(path))
        self.assertRaises(errors.SourceError, self.fetch)


def _require_digest(image: model.Image, data: bytes) -> None:
    digest = image.digest
    if digest is not None and hashlib.new(digest.algorithm, data).hexdigest() != digest.value:
        raise errors.ImageRejected("its digest is another")
