# SPDX-License-Identifier: Apache-2.0
"""What every image source must do, as tests that any source can run::

class TestMySource(SourceContract, unittest.TestCase):
    def make_source(self, images):
        ...put the images where the source finds them...
        return MySource(...)
"""

from __future__ import annotations

import hashlib
import threading
import unittest
from collections.abc import Mapping
from typing import TYPE_CHECKING

from imagecache_lib import errors, model
from imagecache_lib.sources.interface import CannotResume, ImageSource

# For the type checker this is a test case; at run time it is a mixin, so that nothing runs it by itself.
if TYPE_CHECKING:
    _Case = unittest.TestCase
else:
    _Case = object

FIRST = "11111111-aaaa-4bbb-8ccc-0123456789ab"
SECOND = "22222222-aaaa-4bbb-8ccc-0123456789ab"
EMPTY = "33333333-aaaa-4bbb-8ccc-0123456789ab"

#: Ids that no source has. Each could make a server, a shell or a filesystem do something else.
STRANGE_IDS = (
    "44444444-aaaa-4bbb-8ccc-0123456789ab",
    "",
    " ",
    ".",
    "..",
    "../" + FIRST,
    f"x/../{FIRST}",
    "..%2f" + FIRST,
    "%2e%2e",
    "a/b?c",
    f"{FIRST}?x=1",
    f"{FIRST}#x",
    f"{FIRST}/",
    f"{FIRST}/file",
    f"{FIRST}\n",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://localhost/",
    "--help",
    "K\u00f6ln \U0001f4be",
    "\ud800",
    "x" * 1024,
)


def _pattern(length: int, seed: bytes) -> bytes:
    """Return bytes in which every offset can be told from every other."""
    blocks = (hashlib.sha512(seed + str(n).encode()).digest() for n in range(length // 64 + 1))
    return b"".join(blocks)[:length]


class SourceContract(_Case):
    """Mix it into a :class:`unittest.TestCase` and supply :meth:`make_source`."""

    #: Longer than any chunk or buffer on the way.
    data = _pattern(3 * 2**20 + 17, b"first")

    def make_source(self, images: Mapping[str, bytes]) -> ImageSource:
        """Return a source that has exactly these images."""
        raise AssertionError("a contract test case supplies make_source")

    def setUp(self) -> None:
        super().setUp()
        self.images = {FIRST: self.data, SECOND: _pattern(4097, b"second")}
        self.source = self.make_source(self.images)

    def read(self, image: model.Image, offset: int = 0) -> bytes:
        with self.source.open(image, offset) as stream:
            return b"".join(stream)

    def _fail_midway(self, image: model.Image) -> None:
        with self.source.open(image) as stream:
            next(stream)
            raise KeyError("the reader failed")

    def test_describes_what_it_has(self) -> None:
        for image_id, data in self.images.items():
            image = self.source.describe(image_id)
            self.assertEqual(image_id, image.id)
            self.assertEqual("active", image.status)
            self.assertIn(image.size, (None, len(data)))
            if image.digest is not None:
                digest = hashlib.new(image.digest.algorithm, data).hexdigest()
                self.assertEqual(digest, image.digest.value)

    def test_gives_each_image_its_own_bytes(self) -> None:
        for image_id, data in self.images.items():
            self.assertEqual(data, self.read(self.source.describe(image_id)))

    def test_chunks_are_bytes_and_never_empty(self) -> None:
        with self.source.open(self.source.describe(FIRST)) as stream:
            for chunk in stream:
                self.assertIsInstance(chunk, bytes)
                self.assertGreater(len(chunk), 0)

    def test_an_image_without_a_byte_has_no_chunks(self) -> None:
        self.source = self.make_source({EMPTY: b""})
        self.assertEqual(b"", self.read(self.source.describe(EMPTY)))

    def test_goes_on_from_an_offset_or_says_that_it_cannot(self) -> None:
        image = self.source.describe(FIRST)
        for offset in (1, 511, 2**16, 2**20 + 1, len(self.data) - 1):
            with self.subTest(offset=offset):
                try:
                    rest = self.read(image, offset)
                except CannotResume:
                    continue
                self.assertEqual(self.data[offset:], rest)

    def test_unknown_and_strange_ids_are_not_found(self) -> None:
        for image_id in STRANGE_IDS:
            with self.subTest(image_id=image_id):
                with self.assertRaises(errors.ImageNotFound) as caught:
                    self.source.describe(image_id)
                self.assertIsNotNone(caught.exception.image)
                self.assertIsNotNone(caught.exception.next_step)

    def test_opening_what_is_gone_is_not_found(self) -> None:
        for image_id in STRANGE_IDS:
            with self.subTest(image_id=image_id), self.assertRaises(errors.ImageNotFound):
                self.read(model.Image(id=image_id, size=10))

    def test_leaving_early_does_no_harm(self) -> None:
        image = self.source.describe(FIRST)
        with self.source.open(image) as stream:
            next(stream)
        self.assertRaises(KeyError, self._fail_midway, image)
        self.assertEqual(self.data, self.read(image))

    def test_two_transfers_do_not_mix(self) -> None:
        first, second = self.source.describe(FIRST), self.source.describe(SECOND)
        with self.source.open(first) as left, self.source.open(second) as right:
            start = next(left)
            other = b"".join(right)
            self.assertEqual(self.data, start + b"".join(left))
        self.assertEqual(self.images[SECOND], other)

    def test_threads_may_share_it(self) -> None:
        wrong: list[object] = []

        def fetch(image_id: str) -> None:
            try:
                if self.read(self.source.describe(image_id)) != self.images[image_id]:
                    wrong.append(image_id)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=fetch, args=(one,)) for one in (FIRST, SECOND) * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], wrong)
