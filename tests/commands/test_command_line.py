# SPDX-License-Identifier: Apache-2.0
"""Every command explains itself: its help has examples, which its parser takes."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

import pytest

from imagecache_lib.cli.main import COMMANDS, ImageCacheApp

OWN = sorted(set(COMMANDS) - {"help"})


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """Return the parser of the command that some words begin with, and the other words."""
    program = ImageCacheApp()
    kind, name, rest = program.command_manager.find_command(words)
    return kind(program, None, cmd_name=name).get_parser(name), rest


@pytest.mark.parametrize("command", OWN)
def test_a_command_says_what_it_does_and_gives_examples(command: str) -> None:
    parser, _rest = parser_of(command.split())
    text = parser.format_help()
    assert parser.description, command
    assert f"  imagecache {command}" in text.partition("examples:")[2], command


@pytest.mark.parametrize("command", OWN)
def test_the_examples_of_a_command_are_command_lines(command: str) -> None:
    program = ImageCacheApp()
    kind: Any = program.command_manager.find_command(command.split())[0]
    for example in kind.examples:
        words = shlex.split(example.split(" | ")[0].split(" > ")[0], comments=False)
        _options, words = program.parser.parse_known_args(words)
        parser, rest = parser_of(words)
        parser.parse_args(rest)
