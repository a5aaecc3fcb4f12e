# SPDX-License-Identifier: Apache-2.0
"""What the demonstration shows: headings, tables, a progress bar, and claims that are checked."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

_BOLD, _DIM, _GREEN, _RED, _CYAN = "1", "2", "32", "31", "36"


class ClaimFailed(Exception):
    """Something is not as the demonstration claims."""


def size(count: int) -> str:
    """Return a number of bytes as people read it."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


def span(seconds: float) -> str:
    """Return a time as people read it."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


class Console:
    """Writes to standard output: a live bar and colours on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._colour = self._live and "NO_COLOR" not in os.environ
        self._steps = 0
        self._told = 0

    def _paint(self, text: str, *codes: str) -> str:
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if self._colour else text

    def step(self, title: str) -> None:
        self._steps += 1
        print("\n" + self._paint(f"{self._steps}. {title}", _BOLD), flush=True)

    def say(self, text: str) -> None:
        print(f"   {text}", flush=True)

    def quote(self, lines: Sequence[str]) -> None:
        """Show what somebody else said."""
        for line in lines:
            print("   " + self._paint("│ ", _DIM) + self._paint(line, _CYAN), flush=True)

    def claim(self, text: str, holds: bool) -> None:
        """Say that something is so, if it is.

        :raises ClaimFailed: it is not.
        """
        if not holds:
            print("   " + self._paint(f"✗ not so: {text}", _RED), flush=True)
            raise ClaimFailed(text)
        print("   " + self._paint("✓", _GREEN) + f" {text}", flush=True)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]], *, align: str) -> None:
        """Show rows. ``align`` has a letter for each column: l or r."""
        widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

        def line(cells: Sequence[str]) -> str:
            padded = (
                cell.rjust(width) if side == "r" else cell.ljust(width)
                for cell, width, side in zip(cells, widths, align, strict=True)
            )
            return "   " + "   ".join(padded).rstrip()

        print("\n" + self._paint(line(headers), _DIM))
        print(self._paint("   " + "   ".join("─" * width for width in widths), _DIM))
        print("\n".join(line(row) for row in rows), end="\n\n", flush=True)

    def progress(self, received: int, total: int, seconds: float) -> None:
        """Show how far a download is: on a terminal as a bar, elsewhere a line at each quarter."""
        rate = received / seconds if seconds > 0 else 0.0
        left = f"{(total - received) / rate:.1f} s left" if rate and received < total else "received"
        percent = 100 * received // total
        text = f"{percent:3d} %  {size(received):>7} of {size(total)}  {size(int(rate)):>7}/s  {left:<10}"
        if self._live:
            room = max(0, min(shutil.get_terminal_size().columns, 100) - len(text) - 5)
            full = room * received // total
            bar = self._paint("━" * full, _CYAN) + self._paint("─" * (room - full), _DIM)
            print(f"\r\x1b[K   {bar} {text}", end="\n" if received >= total else "", flush=True)
        elif percent // 25 > self._told or received >= total:
            self._told = 0 if received >= total else percent // 25
            self.say(text.rstrip())

    def verdict(self, text: str, *, good: bool) -> None:
        print("\n" + self._paint(text, _BOLD, _GREEN if good else _RED), flush=True)
