# SPDX-License-Identifier: Apache-2.0
"""How far a transfer is: one line that is written over on a terminal, a line now and then elsewhere.

That it is complete is the log's to say, which the command shows too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TextIO

from imagecache_lib import dates, events
from imagecache_lib.cli import values

#: A log gets a line this often, in seconds; a terminal is refreshed that often.
_LINE_EVERY = 10.0
_REFRESH_EVERY = 0.2

#: Where a terminal does not say how wide it is.
_USUAL_COLUMNS = 80

#: An id is not cut to fewer letters than this.
_FEWEST_LETTERS = 8


class ProgressObserver:
    """Shows transfers, one at a time.

    :param stream: where to. Whether it is a terminal decides how.
    :param clock: seconds that only go forward.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._clock = clock
        self._image: str | None = None
        self._started = 0.0
        self._first = 0
        self._told = 0.0
        self._width = 0

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.Progress(image_id=image, received=received, total=total):
                self._progress(image or event.name, received, total)
            case events.Waiting(image_id=image):
                self._waiting(image or event.name, event)
            case _:
                self._end()  # the log has a line for it

    def _progress(self, image: str, received: int, total: int | None) -> None:
        now = self._clock()
        if image != self._image:
            self._end()
            self._image, self._started, self._first, self._told = image, now, received, now
            if not self._terminal:
                return
        elif now - self._told < (_REFRESH_EVERY if self._terminal else _LINE_EVERY):
            return
        self._told = now
        rate = self._rate(received, total, now - self._started)
        self._show(image, f"{self._amount(received, total)}{rate}")

    def _waiting(self, image: str, event: events.Waiting) -> None:
        """Say at once, and then now and then, who does what this command waits for."""
        now = self._clock()
        if image != self._image:
            self._end()
            self._image, self._started, self._first = image, now, event.received
        elif now - self._told < (_REFRESH_EVERY if self._terminal else _LINE_EVERY):
            return
        self._told = now
        who = f"waiting: {values.printable(event.host)}, pid {event.pid} fetches it"
        known = event.received or event.total
        self._show(image, f"{who}, {self._amount(event.received, event.total).strip()}" if known else who)

    def _show(self, image: str, text: str) -> None:
        if not self._terminal:
            self._line(f"{image}: {text}")
            return
        # A line that is wrapped cannot be written over.
        room = self._columns() - 1
        text = f"{_cut(image, room - len(text) - 2)}: {text}"[:room]
        self._stream.write(f"\r{text.ljust(self._width)}")
        self._width = len(text)
        self._stream.flush()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _USUAL_COLUMNS
        except (OSError, ValueError):
            return _USUAL_COLUMNS

    def _amount(self, received: int, total: int | None) -> str:
        if not total:
            return values.shown(received)
        return f"{received * 100 // total:3d} %  {values.shown(received)} of {values.shown(total)}"

    def _rate(self, received: int, total: int | None, seconds: float) -> str:
        """The first chunk is not counted: when the transfer began is not known."""
        rate = (received - self._first) / seconds if seconds > 0 else 0
        if rate <= 0:
            return ""
        left = f", {dates.span((total - received) / rate)} left" if total else ""
        return f"  {values.shown(rate)}/s{left}"

    def _end(self) -> None:
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
        self._image, self._width = None, 0

    def _line(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()


def _cut(image: str, room: int) -> str:
    """Shorten an image's id where the line has less room for it."""
    room = max(room, _FEWEST_LETTERS)
    return image if len(image) <= room else f"{image[: room - 1]}\N{HORIZONTAL ELLIPSIS}"
