# SPDX-License-Identifier: Apache-2.0
"""No content makes the search for what is no disk stumble, and noise is a disk."""

from __future__ import annotations

import random
import unittest

from hypothesis import given
from hypothesis import strategies as st

from imagecache_lib.formats import foreign


class TestForeign(unittest.TestCase):
    @given(st.integers(0, 2**64))
    def test_noise_as_of_an_encrypted_disk_is_a_disk(self, seed: int) -> None:
        self.assertIsNone(foreign.recognise(random.Random(seed).randbytes(foreign.LOOKED_AT), vouched=False))

    @given(st.sampled_from(("ascii", "utf-8-sig", "utf-16", "utf-32")), st.binary(max_size=foreign.LOOKED_AT))
    def test_no_content_makes_it_stumble(self, encoding: str, data: bytes) -> None:
        start = "".encode(encoding) + data
        foreign.recognise(start, vouched=False)
        foreign.document(start)
