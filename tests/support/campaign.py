# SPDX-License-Identifier: Apache-2.0
"""Tests that search: a sample of what they search runs each time, the whole with ``make campaigns``.

Mark such a test with ``@pytest.mark.campaign``, and let :func:`pick` choose how far it goes.
"""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

#: Whether this is a campaign: hours are fine.
WHOLE = bool(os.environ.get("IMAGECACHE_CAMPAIGN"))


def pick(*, sample: T, whole: T) -> T:
    """Return how far to search: ``sample`` takes seconds, ``whole`` as long as it takes."""
    return whole if WHOLE else sample
