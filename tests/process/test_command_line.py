# SPDX-License-Identifier: Apache-2.0
"""Every command explains itself: its help has examples, which its parser takes, and the manual has it."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import shlex
import subprocess
import sys
from typing import Any

import pytest

from imagecache_lib.cli.main import COMMANDS, ImageCacheApp
from tests.support import needs

ROOT = pathlib.Path(__file__).parents[2]
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


def test_the_manual_page_has_each_command_and_option(tmp_path: pathlib.Path) -> None:
    if importlib.util.find_spec("sphinx") is None:
        needs.lack("sphinx is not installed")
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "man"]
    built = subprocess.run(
        [*sphinx, ROOT / "doc/source", tmp_path, "-d", tmp_path / "trees"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    text = (tmp_path / "imagecache.1").read_text().replace("\\-", "-")
    for command in OWN:
        assert f"imagecache {command}" in text, command
        parser, _rest = parser_of(command.split())
        shared = [group for group in parser._action_groups if "formatter" in (group.title or "").lower()]
        hidden = {
            option for group in shared for each in group._group_actions for option in each.option_strings
        }
        for action in parser._actions:
            own = [option for option in action.option_strings if option.startswith("--")]
            if own and own[0] != "--help" and own[0] not in hidden:
                assert own[0] in text, (command, own)
