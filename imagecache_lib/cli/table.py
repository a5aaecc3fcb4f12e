# SPDX-License-Identifier: Apache-2.0
"""Tables that fit the terminal: nothing is torn in the middle, and what is shown can be copied.

Where a table is too wide, in this order: ids are shortened as far as they stay different, columns that the
command can do without are left out, names are cut, and texts are folded between words. If that does not help,
each row becomes a block of lines. Into a pipe everything is written as wide as it is.
"""

from __future__ import annotations

import argparse
import os
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from cliff import columns
from cliff.formatters import base

from imagecache_lib.cli import values

_GAP = "  "

#: Letters of an id that a narrow table shows, if those tell it from the others: one group of a UUID, or two.
_SHORT_IDS = (13, 8)

#: Columns that a name is cut to at most.
_SHORT_NAME = 10

#: Asks for the letter before it as a picture.
_EMOJI = "\N{VARIATION SELECTOR-16}"

#: A column of text is not folded to less than this.
_NARROWEST_TEXT = 16


class Table(base.ListFormatter, base.SingleFormatter):
    """Formats rows under headings, without lines around them."""

    def add_argument_group(self, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("table formatter")
        group.add_argument(
            "--max-width",
            type=int,
            metavar="COLUMNS",
            default=0,
            help="fit the table into so many columns (default: the terminal's)",
        )

    def emit_list(
        self,
        column_names: Sequence[str],
        data: Iterable[Sequence[Any]],
        stdout: TextIO,
        parsed_args: argparse.Namespace,
    ) -> None:
        rows = [list(row) for row in data]
        if not rows:
            return
        droppable = getattr(parsed_args, "droppable", ())
        wide = _Grid([_heading(name) for name in column_names], rows, list(column_names))
        stdout.write(wide.fitted(_width(stdout, parsed_args.max_width), droppable))

    def emit_one(
        self,
        column_names: Sequence[str],
        data: Sequence[Any],
        stdout: TextIO,
        parsed_args: argparse.Namespace,
    ) -> None:
        width = _width(stdout, parsed_args.max_width)
        labels = [name.replace("_", " ") for name in column_names]
        margin = max((columns_of(label) for label in labels), default=0)
        for label, value in zip(labels, data, strict=True):
            for number, line in enumerate(_folded(_text(value), max(_NARROWEST_TEXT, width - margin - 2))):
                head = label if number == 0 else ""
                stdout.write(f"{padded(head, margin)}{_GAP}{line}".rstrip() + "\n")


class _Grid:
    def __init__(self, headings: list[str], rows: list[list[Any]], names: list[str]) -> None:
        self._headings, self._rows, self._names = headings, rows, names
        self._cells = [[_text(value) for value in row] for row in rows]

    def fitted(self, width: int, droppable: Sequence[str]) -> str:
        """Return the table, no wider than that."""
        if self._total() > width:
            self._shorten_ids(width)
        for name in droppable:
            if self._total() > width and name in self._names:
                self._drop(self._names.index(name))
        if self._total() > width:
            self._cut_names(width)
        if self._total() > width and not self._fold(width):
            return self._blocks(width)
        return self._lines()

    def _widths(self) -> list[int]:
        return [
            max(columns_of(heading), *(_widest(row[index]) for row in self._cells))
            for index, heading in enumerate(self._headings)
        ]

    def _total(self) -> int:
        return sum(self._widths()) + len(_GAP) * (len(self._headings) - 1)

    def _of_kind(self, kind: type[Any], exclude: type[Any] | None = None) -> list[int]:
        return [
            index
            for index, value in enumerate(self._rows[0])
            if isinstance(value, kind) and (exclude is None or not isinstance(value, exclude))
        ]

    def _shorten_ids(self, width: int) -> None:
        for index in self._of_kind(values.Id, values.Label):
            ids = {row[index] for row in self._cells}
            longest = max(map(len, ids))
            fits = longest - (self._total() - width)
            room = next((length for length in _SHORT_IDS if length <= fits), _SHORT_IDS[-1])
            while room < longest and len({each[:room] for each in ids}) < len(ids):
                room += 1
            for row in self._cells:
                row[index] = row[index][:room]

    def _cut_names(self, width: int) -> None:
        for index in self._of_kind(values.Label):
            room = max(_SHORT_NAME, self._widths()[index] - (self._total() - width))
            for row in self._cells:
                row[index] = _cut(row[index], room)

    def _drop(self, index: int) -> None:
        for each in (self._headings, self._names, *self._cells, *self._rows):
            del each[index]

    def _fold(self, width: int) -> bool:
        """Fold the columns of texts. Returns whether that was enough."""
        texts = self._of_kind(str) + self._of_kind(values.Lines) + self._of_kind(values.Facts)
        while (over := self._total() - width) > 0:
            widths = self._widths()
            widest = max(texts, key=lambda index: widths[index], default=None)
            if widest is None or widths[widest] <= _NARROWEST_TEXT:
                return False
            room = max(_NARROWEST_TEXT, widths[widest] - over)
            for row in self._cells:
                row[widest] = "\n".join(_folded(row[widest], room))
            if self._widths()[widest] >= widths[widest]:
                return False  # one word is that long
        return True

    def _lines(self) -> str:
        widths = self._widths()
        right = {
            index
            for index, value in enumerate(self._rows[0])
            if isinstance(value, values.Bytes | values.Count)
        }
        lines = []
        for row in (self._headings, *self._cells):
            parts = [cell.split("\n") for cell in row]
            for number in range(max(map(len, parts))):
                found = [part[number] if number < len(part) else "" for part in parts]
                cells = [
                    padded(cell, width, right=index in right)
                    for index, (cell, width) in enumerate(zip(found, widths, strict=True))
                ]
                lines.append(_GAP.join(cells).rstrip())
        return "\n".join(lines) + "\n"

    def _blocks(self, width: int) -> str:
        lines: list[str] = []
        for row in self._rows:
            for heading, value in zip(self._headings, row, strict=True):
                if text := _text(value):
                    head = f"{heading}: "
                    folded = _folded(text, max(_NARROWEST_TEXT, width - len(head)))
                    lines.append(head + folded[0])
                    lines.extend(" " * len(head) + line for line in folded[1:])
            lines.append("")
        return "\n".join(lines[:-1]) + "\n"


def _width(stdout: TextIO, asked: int) -> int:
    if asked:
        return asked
    if (told := os.environ.get("COLUMNS", "")).isdigit() and int(told):
        return int(told)
    try:
        return os.get_terminal_size(stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 2**31  # no terminal: nothing has to fit


def _heading(name: str) -> str:
    return name.replace("_", " ").upper()


def _text(value: Any) -> str:
    if isinstance(value, columns.FormattableColumn):
        value = value.human_readable()
    lines = "" if value is None else str(value)
    return "\n".join(values.printable(line) for line in lines.split("\n"))


def _folded(text: str, width: int) -> list[str]:
    """Fold between words. A word that is too long stays whole: it may have to be copied."""
    lines: list[str] = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
    return lines


def _widest(cell: str) -> int:
    return max(columns_of(line) for line in cell.split("\n"))


def _cut(text: str, width: int) -> str:
    if columns_of(text) <= width:
        return text
    while columns_of(text) > width - 1:
        text = text[:-1]
    return text + "\u2026"


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(map(_columns, text))


def _columns(letter: str) -> int:
    if letter == _EMOJI:
        return 1  # with the narrow letter before it, which it makes a picture
    if unicodedata.category(letter) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def padded(text: str, width: int, *, right: bool = False) -> str:
    """Return text filled up with blanks to so many columns."""
    blanks = " " * (width - columns_of(text))
    return blanks + text if right else text + blanks
