# SPDX-License-Identifier: Apache-2.0
"""Sizes and times as operators type and read them. ``-f json`` gets plain bytes and ISO dates."""

from __future__ import annotations

import argparse
import datetime as dt
import re
import time
from typing import Any

from cliff import columns

from imagecache_lib import dates

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def size(text: str) -> int:
    """Return bytes from ``20G``: binary units K, M, G, T, or none."""
    found = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write bytes, or 20G for 20 GiB")
    return int(found[1]) * _UNITS[found[2]]


def duration(text: str) -> int:
    """Return seconds from ``7d``: units s, m, h, d."""
    found = re.fullmatch(r"(\d+)([smhd])", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: write 90s, 30m, 12h or 7d")
    return int(found[1]) * _SECONDS[found[2]]


def moment(text: str) -> float:
    """Return epoch seconds from ``2026-11-27T18:00``, local unless it says otherwise, or ``7d`` from now."""
    try:
        return dt.datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        pass
    try:
        return time.time() + duration(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time: write 2026-11-27T18:00, or 12h or 7d from now"
        ) from None


def shown(amount: float) -> str:
    """Return an amount of bytes in a binary unit that suits it: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


class Bytes(columns.FormattableColumn[Any]):
    """An amount of bytes, or None where it is unknown."""

    def human_readable(self) -> str:
        return "" if self._value is None else shown(self._value)

    def machine_readable(self) -> Any:
        return self._value


class Date(columns.FormattableColumn[Any]):
    """A time in epoch seconds, or None for never."""

    def human_readable(self) -> str:
        return "" if self._value is None else dates.date(self._value)

    def machine_readable(self) -> Any:
        if self._value is None:
            return None
        return dt.datetime.fromtimestamp(self._value, dt.UTC).isoformat()


class Lines(columns.FormattableColumn[Any]):
    """Texts, a line each."""

    def human_readable(self) -> str:
        return "\n".join(self._value)

    def machine_readable(self) -> Any:
        return list(self._value)
