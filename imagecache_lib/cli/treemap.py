# SPDX-License-Identifier: Apache-2.0
"""Where the rectangles of a treemap lie: as near to squares as they can be.

The rule is that of Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000): rows are filled along the
shorter side as long as that makes the worst rectangle of the row less oblong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float

    def inset(self, *, by: float, top: float = 0.0) -> Box:
        """Return the rectangle less a margin, and less a heading. Its sides are never less than 0."""
        return Box(
            self.x + by,
            self.y + by + top,
            max(0.0, self.width - 2 * by),
            max(0.0, self.height - 2 * by - top),
        )


def squarified(amounts: Sequence[float], box: Box) -> list[Box]:
    """Divide a box in proportion to amounts. Returns a box for each, in their order.

    :param amounts: 0 or more each. Large ones are best given first.
    """
    total = sum(amounts)
    if total <= 0:
        return [Box(box.x, box.y, 0.0, 0.0) for _amount in amounts]
    scale = box.width * box.height / total
    areas = [amount * scale for amount in amounts]
    boxes: list[Box] = []
    while len(boxes) < len(areas):
        row, side = 1, min(box.width, box.height)
        left = areas[len(boxes) :]
        while row < len(left) and _worst(left[: row + 1], side) <= _worst(left[:row], side):
            row += 1
        placed, box = _row(left[:row], box)
        boxes += placed
    return boxes


def _worst(areas: Sequence[float], side: float) -> float:
    """Return how oblong the worst rectangle of a row is: 1 for a square."""
    total, smallest = sum(areas), min(areas)
    if total <= 0 or smallest <= 0 or side <= 0:
        return float("inf")
    return max(side**2 * max(areas) / total**2, total**2 / (side**2 * smallest))


def _row(areas: Sequence[float], box: Box) -> tuple[list[Box], Box]:
    """Place a row along the shorter side. Returns its boxes, and what is left."""
    total, side = sum(areas), min(box.width, box.height)
    # What earlier rows left is a difference, so a thin rest is not exact: no row is deeper than the box.
    depth = min(total / side, max(box.width, box.height)) if side > 0 else 0.0
    boxes, along = [], 0.0
    for area in areas:
        length = side * (area / total) if total > 0 else 0.0
        if box.width >= box.height:
            boxes.append(Box(box.x, box.y + along, depth, length))
        else:
            boxes.append(Box(box.x + along, box.y, length, depth))
        along += length
    if box.width >= box.height:
        return boxes, Box(box.x + depth, box.y, max(0.0, box.width - depth), box.height)
    return boxes, Box(box.x, box.y + depth, box.width, max(0.0, box.height - depth))
