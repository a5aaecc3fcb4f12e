# SPDX-License-Identifier: Apache-2.0
"""A treemap's boxes have the areas of their amounts, lie inside, and do not overlap."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imagecache_lib.cli.treemap import Box, squarified

WHOLE = Box(10, 20, 300, 100)


@given(st.lists(st.integers(0, 2**40), max_size=30))
@example([83951617, 1])
@example([1, 1, 1, 67174400, 33423106, 1])
def test_the_area_of_each_box_is_its_amount_and_all_lie_inside(amounts: list[int]) -> None:
    boxes = squarified(amounts, WHOLE)
    assert len(boxes) == len(amounts)
    total = sum(amounts)
    for amount, box in zip(amounts, boxes, strict=True):
        share = amount / total if total else 0
        assert box.width * box.height == pytest.approx(share * 300 * 100, abs=0.01)
        if amount:
            assert box.x >= 10 - 1e-6 and box.x + box.width <= 310 + 1e-6
            assert box.y >= 20 - 1e-6 and box.y + box.height <= 120 + 1e-6


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=12))
def test_boxes_do_not_overlap(amounts: list[int]) -> None:
    boxes = squarified(amounts, WHOLE)
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            across = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
            down = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
            assert min(across, down) < 1e-6


def test_equal_amounts_in_a_square_are_squares() -> None:
    for box in squarified([1] * 4, Box(0, 0, 100, 100)):
        assert (box.width, box.height) == (50, 50)
