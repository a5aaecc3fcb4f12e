# SPDX-License-Identifier: Apache-2.0
"""A real Chromium without a window, that says what it made of a page and shows its pixels."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import struct
import subprocess
import zlib

from tests.support import needs

Colour = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Browser:
    """Chromium with a profile of its own.

    :param home: for its profile and its pictures.
    """

    home: pathlib.Path

    def document(self, url: str) -> str:
        """Return the document as the browser understood it, after it was loaded, as HTML."""
        return self._run("--dump-dom", url)

    def pixels(self, url: str, *, width: int = 1000, height: int = 1400) -> collections.Counter[Colour]:
        """Return how many pixels of a window of that size have which colour."""
        picture = self.picture(url, width=width, height=height)
        return collections.Counter(_colours(picture.read_bytes()))

    def picture(self, url: str, *, width: int, height: int) -> pathlib.Path:
        """Return the path of a PNG of a window of that size."""
        path = self.home / f"{width}.png"
        self._run(f"--screenshot={path}", f"--window-size={width},{height}", "--hide-scrollbars", url)
        return path

    def _run(self, *words: str) -> str:
        command = [
            needs.program("chromium"),
            "--headless",
            # It may not make a sandbox as root, or in a container.
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={self.home / 'profile'}",
            *words,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout


def _colours(png: bytes) -> list[Colour]:
    """Return the colours of a PNG with 8 bits a channel, which is not interlaced: RFC 2083."""
    width, height, depth, kind, _compression, _filter, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    assert (depth, interlaced) == (8, 0)
    size = {2: 3, 6: 4}[kind]
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    raw = zlib.decompress(data)
    found: list[Colour] = []
    above = bytearray(width * size)
    for row in range(height):
        begin = row * (width * size + 1)
        line = bytearray(raw[begin + 1 : begin + 1 + width * size])
        _unfilter(raw[begin], line, above, size)
        found += [(line[at], line[at + 1], line[at + 2]) for at in range(0, len(line), size)]
        above = line
    return found


def _unfilter(kind: int, line: bytearray, above: bytearray, size: int) -> None:
    for at in range(len(line)):
        left = line[at - size] if at >= size else 0
        corner = above[at - size] if at >= size else 0
        predicted = (0, left, above[at], (left + above[at]) // 2, _paeth(left, above[at], corner))[kind]
        line[at] = (line[at] + predicted) & 255


def _paeth(left: int, above: int, corner: int) -> int:
    return min((left, above, corner), key=lambda each: abs(left + above - corner - each))
