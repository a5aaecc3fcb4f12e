# SPDX-License-Identifier: Apache-2.0
"""Times as people read them."""

from __future__ import annotations

import datetime as dt
import itertools
import math

_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def date(when: float) -> str:
    """Return epoch seconds as a date in UTC, such as ``2026-11-26 07:00:00Z``.

    A number that no calendar has a date for, such as infinity, is returned as ``@<number>``.
    """
    try:
        return dt.datetime.fromtimestamp(when, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"@{when}"


def span(seconds: float) -> str:
    """Return seconds as a duration in its two largest units, rounded up: ``1 d 3 h``, ``2 min``, ``7 s``."""
    for unit, smaller in itertools.pairwise(_UNITS):
        if seconds > unit[1] - smaller[1]:
            whole, rest = divmod(math.ceil(seconds / smaller[1]), unit[1] // smaller[1])
            return f"{whole} {unit[0]}" + (f" {rest} {smaller[0]}" if rest else "")
    return f"{math.ceil(seconds)} s"
