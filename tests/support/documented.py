# SPDX-License-Identifier: Apache-2.0
"""The command lines of ``imagecache`` that pages of the documentation have, in blocks and between words."""

from __future__ import annotations

import pathlib
import re
import shlex
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
DOC = ROOT / "doc" / "source"

#: Another test runs it, and compares what it shows.
OUTPUT = DOC / "admin" / "output.rst"

#: What begins a command line: a prompt, the service's user, a path to the program.
_BEGINNING = r"(?:\$ )?(?:runuser -u nova -- )?(?:/\S+/)?imagecache "
_IN_BLOCK = re.compile(rf"^ +{_BEGINNING}(?P<words>(?:.*\\\n)*.*)$", re.MULTILINE)
_IN_TEXT = re.compile(rf"``{_BEGINNING}(?P<words>[^`]+)``")

#: Where the shell's part of a line begins.
_SHELL = ("|", "||", "&&", ">", "&")


def pages() -> list[pathlib.Path]:
    """Return the pages that show command lines for people to type."""
    return [ROOT / "README.rst", *sorted(path for path in DOC.rglob("*.rst") if path != OUTPUT)]


def commands_of(page: pathlib.Path) -> Iterator[list[str]]:
    """Return the words behind ``imagecache`` of each command line of a page, in its order."""
    text = page.read_text()
    found = sorted([*_IN_BLOCK.finditer(text), *_IN_TEXT.finditer(text)], key=lambda match: match.start())
    for match in found:
        words = shlex.split(match["words"].replace("\\\n", " "))
        end = next((number for number, word in enumerate(words) if word in _SHELL), len(words))
        # A synopsis has brackets, and an elision stands for anything.
        if not {"...", "COMMAND"} & set(words):
            yield words[:end]
