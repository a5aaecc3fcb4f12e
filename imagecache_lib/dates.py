# SPDX-License-Identifier: Apache-2.0
"""Times as people read them."""

from __future__ import annotations

import datetime as dt
import math


def date(when: float) -> str:
    """Return epoch seconds as a date in UTC."""
    return dt.datetime.fromtimestamp(when, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def span(seconds: float) -> str:
    """Return seconds as a duration, rounded up to whole ones."""
    return str(dt.timedelta(seconds=math.ceil(seconds)))
