# SPDX-License-Identifier: Apache-2.0
"""What the completion scripts do in the real shells."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.commands.test_cli import IMAGE, Cli
from tests.support import needs

#: zsh's own machinery wants a terminal; the function is called as it would call it.
_ZSH = """
compdef() { :; }
compadd() { print -l -- ${(P)@[-1]}; }
_files() { print files; }
source "$1"
words=("${@[2,-1]}")
CURRENT=$#words
_imagecache
"""

_BASH = """
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_imagecache
printf '%s\\n' "${COMPREPLY[@]}"
"""

_FISH = 'source $argv[1]; complete -C (string join " " -- $argv[2..-1])'


class Shell:
    """A shell that completes the command of this cache."""

    def __init__(self, name: str, cli: Cli, home: pathlib.Path) -> None:
        self.name = name
        self._program = needs.program(name)
        self._script = home / f"completion.{name}"
        self._script.write_text(cli.run("complete", "--shell", name).stdout)
        command = home / "bin/imagecache"
        command.parent.mkdir()
        path = f"--instances-path {cli.instances}"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m imagecache_lib.cli.main {path} "$@"\n')
        command.chmod(0o755)
        self._environment = {**cli.environment, "PATH": f"{command.parent}:{os.environ['PATH']}"}

    def completes(self, *words: str) -> list[str]:
        code = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}[self.name]
        before = {
            "bash": ["--norc", "-c", code, "-"],
            "zsh": ["-f", "-c", code, "-"],
            "fish": ["-N", "-c", code],
        }
        done = subprocess.run(
            [self._program, *before[self.name], self._script, "imagecache", *words],
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=300,
            check=True,
        )
        return [line.split("\t")[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_commands_options_and_ids_are_completed(name: str, tmp_path: pathlib.Path) -> None:
    cli = Cli(tmp_path)
    cli.cache()
    shell = Shell(name, cli, tmp_path)
    assert shell.completes("im") == ["image"]
    assert {"list", "show", "pin"} <= set(shell.completes("image", ""))
    assert shell.completes("image", "list", "--fi") == ["--filter"]
    assert shell.completes("image", "show", "111") == [IMAGE]
    cli.cache("my image (2)")
    # fish and zsh put in what a shell needs by themselves.
    wanted = r"my\ image\ \(2\)" if name == "bash" else "my image (2)"
    for typed in ("my", r"my\ im"):
        assert shell.completes("image", "show", typed) == [wanted], typed
