# SPDX-License-Identifier: Apache-2.0
"""Times as people read them."""

from __future__ import annotations

import datetime
import math


def date(when: float) -> str:
    """Return epoch seconds as a date in UTC."""
    return datetime.datetime.fromtimestamp(when, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def span(seconds: float) -> str:
    """Return seconds as a duration, rounded up to whole ones."""
    return str(datetime.timedelta(seconds=math.ceil(seconds)))
