# SPDX-License-Identifier: Apache-2.0
"""Tests that search: a sample of what they search runs each time, the whole with ``make campaigns``.

Mark such a test with ``@pytest.mark.campaign``, and let :func:`pick` choose how far it goes. What is random
comes from :data:`SEED`, which ``IMAGECACHE_SEED`` sets. What goes on for a time does so for :func:`seconds`,
of which ``IMAGECACHE_SECONDS`` sets the whole. Each prints its seed and what it did.
"""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

#: Whether this is a campaign: hours are fine.
WHOLE = bool(os.environ.get("IMAGECACHE_CAMPAIGN"))

#: Where chance begins.
SEED = int(os.environ.get("IMAGECACHE_SEED", "1"))


def pick(*, sample: T, whole: T) -> T:
    """Return how far to search: ``sample`` takes seconds, ``whole`` as long as it takes."""
    return whole if WHOLE else sample


def seconds(*, sample: float) -> float:
    """Return how long to go on: in a campaign ten minutes, unless it is told otherwise."""
    return pick(sample=sample, whole=float(os.environ.get("IMAGECACHE_SECONDS", "600")))
