# SPDX-License-Identifier: Apache-2.0
"""A job while it runs: its hosts, written over on a terminal; a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from imagecache_lib import dates
from imagecache_lib.cli import values
from imagecache_lib.precache import job

#: Anything but a terminal gets a summary this often, in seconds.
_LINE_EVERY = 10.0

#: The rate shown is that of the last so many seconds.
_WINDOW = 10.0

_UP, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[{}A", "\x1b[2K", "\x1b[J"


class JobDisplay:
    """Shows one job.

    :param stream: the stream to write to. Whether it is a terminal decides how the job is shown.
    :param clock: returns seconds that only go forward.
    :param size: returns the size of the terminal, in columns and lines.
    """

    def __init__(
        self,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        size: Callable[[], tuple[int, int]] = shutil.get_terminal_size,
    ) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._clock = clock
        self._size = size
        self._lines = 0
        self._told = clock()
        self._done: set[str] = set()
        self._history: list[tuple[float, int]] = []

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the log off the terminal during the body: the display itself says why something fails."""
        if not self._terminal:
            yield
            return
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

    def show(self, work: job.Job) -> None:
        """Show how far a job is now."""
        self._history.append((self._clock(), _received(work)))
        while len(self._history) > 2 and self._history[-1][0] - self._history[1][0] >= _WINDOW:
            del self._history[0]
        if self._terminal:
            self._redraw(work)
        else:
            self._tell(work)

    # -- a terminal ----------------------------------------------------------------------------------

    def _redraw(self, work: job.Job) -> None:
        columns, height = self._size()
        room = max(1, height - 3)
        hosts = sorted(work.hosts, key=lambda name: _interest(work, name))
        lines = [_host_line(work, name) for name in hosts[:room]]
        if len(hosts) > room:
            lines.append(f"... and {len(hosts) - room} more hosts")
        lines.append(self._summary(work))
        text = _UP.format(self._lines) if self._lines else ""
        text += "".join(f"\r{_CLEAR_LINE}{line[: columns - 1]}\n" for line in lines) + _CLEAR_BELOW
        self._stream.write(text)
        self._stream.flush()
        self._lines = len(lines)

    # -- anything else -------------------------------------------------------------------------------

    def _tell(self, work: job.Job) -> None:
        for name in work.hosts:
            if name not in self._done and not work.pending(name):
                self._done.add(name)
                self._line(_host_line(work, name))
        if self._clock() - self._told >= _LINE_EVERY and not work.is_over:
            self._told = self._clock()
            self._line(self._summary(work))

    def _line(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    # -- words ---------------------------------------------------------------------------------------

    def _summary(self, work: job.Job) -> str:
        done = sum(not work.pending(name) for name in work.hosts)
        counted = ", ".join(f"{count} {result.value}" for result, count in work.count().items() if count)
        text = f"{done} of {len(work.hosts)} hosts done"
        if counted:
            text += f"; images: {counted}"
        rate = self._rate()
        if rate <= 0 or work.is_over:
            return text
        left = _left(work)
        return f"{text}; {values.shown(rate)}/s" + (f", {dates.span(left / rate)} left" if left else "")

    def _rate(self) -> float:
        (began, first), (now, last) = self._history[0], self._history[-1]
        return (last - first) / (now - began) if now > began else 0.0


def _received(work: job.Job) -> int:
    return sum(cell.received for cells in work.cells.values() for cell in cells.values())


def _left(work: job.Job) -> int:
    """Return the bytes that are still to come, as far as the sizes of the images are known."""
    sizes = {
        image_id: cell.total
        for cells in work.cells.values()
        for image_id, cell in cells.items()
        if cell.total is not None
    }
    return sum(
        max(0, sizes.get(image_id, 0) - cell.received)
        for cells in work.cells.values()
        for image_id, cell in cells.items()
        if cell.result is None
    )


def _interest(work: job.Job, name: str) -> int:
    """Rank what an operator wants to see first: who works, who is in trouble, who waits, who is done."""
    cells = work.cells[name].values()
    if not work.pending(name):
        return 1 if any(cell.result is not None and cell.result.is_failure for cell in cells) else 3
    return 0 if any(cell.received or cell.reason or cell.result is not None for cell in cells) else 2


def _host_line(work: job.Job, name: str) -> str:
    cells = work.cells[name]
    over = sum(cell.result is not None for cell in cells.values())
    text = f"{name}: {over} of {len(cells)} images"
    for image_id in work.pending(name):
        cell = cells[image_id]
        if cell.received and cell.total:
            text += f", {image_id} {cell.received * 100 // cell.total} % of {values.shown(cell.total)}"
        if cell.reason:
            return f"{text}, {cell.reason}"
    failures = {cell.reason for cell in cells.values() if cell.result is not None and cell.result.is_failure}
    return ": ".join([text, *sorted(failures)[:1]]) if failures else text
