# SPDX-License-Identifier: Apache-2.0
"""What Retry-After says (RFC 9110, section 10.2.3): a number of seconds, or a date."""

from __future__ import annotations

import datetime as dt
import email.utils
import re
from collections.abc import Mapping

_SECONDS = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
#: Seconds, beyond which it does not matter how long a server asks to be left alone.
_LONGEST_WAIT = 1e9


def read(headers: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Return what Retry-After says: how many seconds to wait, or else the epoch seconds to wait for.

    A date is relative to the server's clock (Date), if the server tells that. Returns None for both if it
    says nothing that makes sense.
    """
    value = headers.get("Retry-After", "").strip()
    seconds = [each.strip() for each in value.split(",")]  # proxies may have added their own
    if all(_SECONDS.fullmatch(each) for each in seconds):
        return min(max(map(float, seconds)), _LONGEST_WAIT), None
    then = _epoch(value)
    now = _epoch(headers.get("Date", ""))
    if then is None or now is None:
        return None, then
    return max(0.0, then - now), None


def _epoch(date: str) -> float | None:
    """Return the epoch seconds of an HTTP date (RFC 9110, section 5.6.7), or None if it is none."""
    try:
        found = email.utils.parsedate_to_datetime(date)
        # Two of its three forms tell no zone, which is UTC.
        return (found if found.tzinfo is not None else found.replace(tzinfo=dt.UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
