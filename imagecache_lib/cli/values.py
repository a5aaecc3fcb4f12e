# SPDX-License-Identifier: Apache-2.0
"""Sizes and times as operators type and read them. ``-f json`` gets plain bytes and ISO dates."""

from __future__ import annotations

import argparse
import datetime as dt
import re
import time
from collections.abc import Iterable
from typing import Any

from cliff import columns

from imagecache_lib import dates

#: A hundred years, in seconds.
_LONGEST = 36525 * 86400

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

#: Returns an amount of bytes in a binary unit that suits it: ``1.5 GiB``.
shown = dates.size


def size(text: str) -> int:
    """Return bytes from ``20G``: binary units K, M, G, T, or none."""
    try:
        return dates.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def duration(text: str) -> int:
    """Return seconds from ``7d``: units s, m, h, d. Longer ones than a century mean nothing to a calendar."""
    found = re.fullmatch(r"(\d{1,12})([smhd])", text.strip().lower(), re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: write 90s, 30m, 12h or 7d")
    seconds = int(found[1]) * _SECONDS[found[2]]
    if seconds > _LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is longer than a century: write 36525d at most")
    return seconds


def lifetime(text: str) -> int:
    """Return seconds as :func:`duration` does, of something that is to last."""
    seconds = duration(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is over at once: write 90s, 30m, 12h or 7d")
    return seconds


def textfile(text: str) -> str:
    """Return the path of a file for node_exporter, which reads those alone whose name ends in ``.prom``."""
    if not path(text).endswith(".prom"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .prom: node_exporter reads no other file")
    return text


def path(text: str) -> str:
    """Return a path. One that is empty, such as a variable that was not set, means no directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def image_id(text: str) -> str:
    """Return an image's id, which may be of any form."""
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is no image's id")
    return text


def address(text: str) -> tuple[str, int]:
    """Return host and port from ``127.0.0.1:9471`` or ``[::1]:9471``."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:/\s]+)):(\d{1,5})", text.strip())
    if found is None or int(found[3]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT: write 127.0.0.1:9471")
    return found[1] or found[2], int(found[3])


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


def future(text: str) -> float:
    """Return epoch seconds as :func:`moment` does, of a time that is still to come."""
    when = moment(text)
    if when <= time.time():
        raise argparse.ArgumentTypeError(f"{text!r} is past")
    return when


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
        try:
            return dt.datetime.fromtimestamp(self._value, dt.UTC).isoformat()
        except (ValueError, OverflowError, OSError):
            return self._value  # no calendar has a date for it


class Lines(columns.FormattableColumn[Any]):
    """Texts, a line each."""

    def human_readable(self) -> str:
        return "\n".join(self._value)

    def machine_readable(self) -> Any:
        return list(self._value)


class Ago(Date):
    """A time in epoch seconds that tables show as how long ago it was.

    :param now: epoch seconds.
    """

    def __init__(self, value: float | None, now: float) -> None:
        super().__init__(value)
        self._now = now

    def human_readable(self) -> str:
        return "" if self._value is None else brief_span(self._now - self._value)


class Count(columns.FormattableColumn[Any]):
    """A number, which tables leave out where it is 0."""

    def human_readable(self) -> str:
        return str(self._value) if self._value else ""

    def machine_readable(self) -> Any:
        return self._value


class Id(columns.FormattableColumn[Any]):
    """An id, of which a narrow table shows as many letters as tell it from the others."""

    def human_readable(self) -> str:
        return printable(self._value or "")

    def machine_readable(self) -> Any:
        return self._value


class Label(Id):
    """A name, which a narrow table cuts."""


class Word(columns.FormattableColumn[Any]):
    """One of a few words, which machines get with underscores."""

    def human_readable(self) -> str:
        return str(self._value).replace("_", " ")

    def machine_readable(self) -> Any:
        return self._value


class Facts(columns.FormattableColumn[Any]):
    """Objects or lists of them, each with a text for people.

    :param value: what machines get.
    :param texts: what people read, a line each.
    """

    def __init__(self, value: Any, texts: Iterable[str]) -> None:
        super().__init__(value)
        self._texts = tuple(texts)

    def human_readable(self) -> str:
        return "\n".join(self._texts)

    def machine_readable(self) -> Any:
        return self._value


def counted(number: int, what: str) -> str:
    """Return a number with what it counts: ``1 image``, ``2 images``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def brief_span(seconds: float) -> str:
    """Return seconds in their largest unit, rounded down: ``3 min``, ``12 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


def iso(when: float | None) -> str | None:
    """Return epoch seconds as ISO 8601 in UTC, as machines get it."""
    return None if when is None else Date(when).machine_readable()


def printable(text: str) -> str:
    """Return text without what moves a terminal's cursor."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


class Yes(columns.FormattableColumn[bool]):
    """Whether something is so."""

    def human_readable(self) -> str:
        return "yes" if self._value else "no"

    def machine_readable(self) -> bool:
        return self._value
