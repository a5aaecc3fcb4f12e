# SPDX-License-Identifier: Apache-2.0
"""Times as people read them."""

from __future__ import annotations

import datetime as dt
import math


def date(when: float) -> str:
    """Return epoch seconds as a date in UTC. What no calendar has, such as infinity, stays a number."""
    try:
        return dt.datetime.fromtimestamp(when, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"@{when}"


def span(seconds: float) -> str:
    """Return seconds as a duration, rounded up to whole ones."""
    return str(dt.timedelta(seconds=math.ceil(seconds)))
