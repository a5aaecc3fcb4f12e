# SPDX-License-Identifier: Apache-2.0
"""Rules of the sources that hold for any input."""

from __future__ import annotations

import random
import unittest

from hypothesis import given, settings
from hypothesis import strategies as st

from imagecache_lib import errors
from imagecache_lib.sources import answers, exchange, transfer
from imagecache_lib.sources.glance_metadata import image_from_metadata
from imagecache_lib.system.host import System
from imagecache_lib.testing.sources import FakeSource

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["size", "virtual_size", "status", "checksum", "os_hash_algo", "os_hash_value", "locations", "stores"]
)


class TestTransferProperties(unittest.TestCase):
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.integers(0, 300_000), max_size=12),
        st.booleans(),
        st.booleans(),
        st.integers(0, 4),
    )
    def test_gives_exactly_the_image_or_a_source_error(
        self, breaks: list[int], digests: bool, refuses: bool, retries: int
    ) -> None:
        data = random.Random(5).randbytes(250_001)
        source = FakeSource({"x": data}, digests=digests, chunk_size=7919)
        source.break_at(*breaks)
        source.refuses_resume = refuses
        host = System(name="here", sleep=lambda seconds: None)
        fetching = transfer.Transfer(source, source.describe("x"), host=host, retries=retries)
        for _ in range(100):
            try:
                self.assertEqual(data, b"".join(fetching.chunks()))
                return
            except transfer.StartAgain:
                continue
            except errors.SourceError:
                self.assertGreater(len(breaks), retries)
                return
        self.fail("the budget never ends")


class TestAnswerProperties(unittest.TestCase):
    @given(st.text())
    def test_a_content_range_makes_sense_or_is_none(self, value: str) -> None:
        part = answers.parse_content_range(value)
        if part is not None:
            first, last, whole = part
            self.assertLessEqual(first, last)
            self.assertTrue(whole is None or last < whole)

    @given(st.integers(0, 2**63), st.integers(1, 2**40), st.integers(0, 2**40))
    def test_a_content_range_is_read_back(self, first: int, length: int, rest: int) -> None:
        last = first + length - 1
        part = (first, last, last + 1 + rest)
        self.assertEqual(part, answers.parse_content_range(f"bytes {first}-{last}/{part[2]}"))
        self.assertEqual((first, last, None), answers.parse_content_range(f"bytes {first}-{last}/*"))

    @given(st.text(alphabet="abc", min_size=5), st.sampled_from(["", "/p", "/p?q", "/p#f"]))
    def test_what_is_shown_of_a_url_has_no_user(self, secret: str, rest: str) -> None:
        self.assertNotIn(f"{secret}@", exchange.shown(f"http://user:{secret}@host{rest}"))
        self.assertNotIn("?", exchange.shown(f"http://user:{secret}@host{rest}"))


class TestMetadataProperties(unittest.TestCase):
    @given(st.dictionaries(KEYS | st.text(max_size=9), JSON, max_size=6))
    def test_any_metadata_make_an_image_or_a_source_error(self, metadata: dict[str, object]) -> None:
        try:
            image = image_from_metadata("x", {**metadata, "id": "x"})
        except errors.SourceError:
            return
        self.assertTrue(image.size is None or image.size >= 0)
        self.assertIsInstance(image.status, str)
        self.assertTrue(all(isinstance(url, str) for url in image.locations))

    @given(JSON)
    def test_other_documents_are_source_errors(self, document: object) -> None:
        with self.assertRaises(errors.SourceError):
            image_from_metadata("the id", document)
