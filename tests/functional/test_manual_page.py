# SPDX-License-Identifier: Apache-2.0
"""The manual page has every command with its options."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

from tests.commands.test_command_line import OWN, parser_of
from tests.support import needs

ROOT = pathlib.Path(__file__).parents[2]


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
