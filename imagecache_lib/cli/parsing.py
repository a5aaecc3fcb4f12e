# SPDX-License-Identifier: Apache-2.0
"""How a command line's faults are said, and the kernel's errors."""

from __future__ import annotations

import argparse
import logging
import re
from typing import NoReturn

#: Python's number of an error of the kernel, before the kernel's own words.
_NUMBER = re.compile(r"\[Errno -?\d+\] ")


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
