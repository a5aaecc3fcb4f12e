# SPDX-License-Identifier: Apache-2.0
"""Durations as people read them."""

from __future__ import annotations

import unittest

from imagecache_lib import dates


class TestSpan(unittest.TestCase):
    def test_two_units_at_most_and_never_less_than_it_is(self) -> None:
        for seconds, text in (
            (0, "0 s"),
            (0.2, "1 s"),
            (59, "59 s"),
            (59.5, "1 min"),
            (60, "1 min"),
            (61, "1 min 1 s"),
            (3599.5, "1 h"),
            (3600, "1 h"),
            (3601, "1 h 1 min"),
            (86399, "1 d"),
            (86400, "1 d"),
            (86401, "1 d 1 h"),
            (40 * 86400, "40 d"),
        ):
            with self.subTest(seconds):
                self.assertEqual(text, dates.span(seconds))
