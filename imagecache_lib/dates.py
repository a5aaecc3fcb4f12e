# SPDX-License-Identifier: Apache-2.0
"""Times, amounts of bytes and foreign words as people read and write them."""

from __future__ import annotations

import datetime as dt
import itertools
import math
import re

_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

#: What the letters after a size stand for.
_MULTIPLES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


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


def size(amount: float) -> str:
    """Return an amount of bytes in the binary unit that suits it: ``1.5 GiB``, ``918 KiB``, ``12 B``."""
    for unit in _SIZES:
        if abs(amount) < 1023.95 or unit == _SIZES[-1]:
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def sizes(*amounts: int) -> tuple[str, ...]:
    """Return amounts of bytes as :func:`size` does, or in bytes if two different ones would look the same."""
    found = tuple(map(size, amounts))
    return found if len(set(found)) == len(set(amounts)) else tuple(f"{amount} B" for amount in amounts)


def parse_size(text: str) -> int:
    """Return the bytes that a text such as ``20G``, ``1.5GiB`` or ``512`` stands for.

    :raises ValueError: it is no size. Decimal units such as ``MB`` are refused: people mean both by them.
    """
    found = re.fullmatch(r"(\d{1,18})(\.\d{1,9})?\s*(?:([KMGTP])(?:IB)?|B?)", text.strip().upper(), re.ASCII)
    if found is None or (found[2] and not found[3]):
        raise ValueError(f"{text!r} is not a size: write bytes, or 20G for 20 GiB")
    number = found[1] + (found[2] or "")
    return (
        int(float(number) * _MULTIPLES[found[3]]) if found[2] else int(found[1]) * _MULTIPLES[found[3] or ""]
    )


def plain(text: str) -> str:
    """Return text that fits into one line of any log and terminal, with what is not printable as an escape.

    A file's name may hold line feeds, what moves a cursor, and bytes that are no text.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
