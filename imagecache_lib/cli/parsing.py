# SPDX-License-Identifier: Apache-2.0
"""How a command line's faults are said, the kernel's errors, and what goes to the journal."""

from __future__ import annotations

import argparse
import logging
import os
import re
from typing import NoReturn, TextIO

from imagecache_lib import errors

#: Python's number of an error of the kernel, before the kernel's own words.
_NUMBER = re.compile(r"\[Errno -?\d+\] ")


class Misused(errors.ConfigError):
    """The command line is wrong: options contradict each other, or one lacks what it belongs to."""


def complain_in_one_line(parser: argparse.ArgumentParser) -> None:
    """Have a parser say what is wrong and where help is, without all of its options before that."""

    def error(message: str) -> NoReturn:
        program = parser.prog.partition(" ")[0]
        parser.exit(2, f"{program}: error: {message}; see: {parser.prog} --help\n")

    parser.error = error  # type: ignore[method-assign]


def plain(text: str) -> str:
    """Return a message in one line, without the numbers that Python gives to errors."""
    return _NUMBER.sub("", " ".join(text.split()))


def without_numbers(record: logging.LogRecord) -> bool:
    """Leave out the numbers of errors from what is logged: a filter of handlers."""
    if record.args and "[Errno" in (said := record.getMessage()):
        record.msg, record.args = _NUMBER.sub("", said), ()
    return True


def is_journal(stream: TextIO, said: str) -> bool:
    """Whether a stream leads to systemd's journal: systemd.exec(5), JOURNAL_STREAM.

    :param said: device and inode of the journal's socket, with a colon between them.
    """
    if not said:
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return said == f"{found.st_dev}:{found.st_ino}"


class JournalFormatter(logging.Formatter):
    """Begins each line with its level, as the journal takes it of what a service writes: sd-daemon(3)."""

    _LEVELS = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (0, "<7>"))

    def format(self, record: logging.LogRecord) -> str:
        mark = next(mark for level, mark in self._LEVELS if record.levelno >= level)
        return "\n".join(f"{mark}{line}" for line in super().format(record).splitlines())
