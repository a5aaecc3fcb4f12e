# SPDX-License-Identifier: Apache-2.0
"""What is said of a wrong command line."""

from __future__ import annotations

import argparse
from typing import NoReturn


def complain_in_one_line(parser: argparse.ArgumentParser) -> None:
    """Have a parser say what is wrong and where help is, without all of its options before that."""

    def error(message: str) -> NoReturn:
        program = parser.prog.partition(" ")[0]
        parser.exit(2, f"{program}: error: {message}; see: {parser.prog} --help\n")

    parser.error = error  # type: ignore[method-assign]
