# SPDX-License-Identifier: Apache-2.0
"""``imagecache complete``: completion for bash, zsh and fish: commands, options, what is in the cache."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable
from typing import Any

from imagecache_lib import errors
from imagecache_lib.cli import base

#: Commands whose words are base images in the cache.
_OF_CACHED = (
    "cache scrub",
    "history",
    "image evict",
    "image explain",
    "image pin",
    "image show",
    "image unpin",
)
_OF_HOSTS = ("host forget",)
_OF_JOBS = ("precache cancel", "precache resume", "precache status")

# Words come as they were typed, with backslashes and quotes, and go back so: an id may have spaces in it.
_BASH = """\
_imagecache() {
    local last=${COMP_WORDS[COMP_CWORD]} found
    local -a said=("${COMP_WORDS[@]:1:COMP_CWORD}")
    COMPREPLY=()
    while IFS= read -r found; do
        [[ $last == [\\"\\']* ]] || printf -v found %q "$found"
        COMPREPLY+=("$found")
    done < <(imagecache complete --words -- "${said[@]//[\\\\\\"\\']/}" 2>/dev/null)
    [ ${#COMPREPLY[@]} -gt 0 ] || mapfile -t COMPREPLY < <(compgen -f -- "$last")
}
complete -F _imagecache imagecache
"""

_ZSH = """\
#compdef imagecache
_imagecache() {
    local -a found
    found=("${(@f)$(imagecache complete --words -- "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    [[ -n "$found" ]] && compadd -a found || _files
}
compdef _imagecache imagecache
"""

_FISH = """\
function __imagecache_words
    set -l said (commandline -opc)
    imagecache complete --words -- $said[2..-1] (commandline -ct | string unescape) 2>/dev/null
end
complete -c imagecache -f -n 'count (__imagecache_words) > /dev/null' -a '(__imagecache_words)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


class Complete(base.Base):
    """Print what lets a shell complete this command: commands, options and ids of images in the cache."""

    needs_instances = False
    examples = (
        "complete > /etc/bash_completion.d/imagecache",
        "complete --shell zsh > /usr/local/share/zsh/site-functions/_imagecache",
        "complete --shell fish > /etc/fish/completions/imagecache.fish",
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--shell", choices=sorted(_SCRIPTS), default="bash", help="default: %(default)s")
        parser.add_argument(
            "--words",
            action="store_true",
            help="print what may follow WORDS, of which the last is not complete",
        )
        parser.add_argument("words_so_far", nargs="*", metavar="WORDS", help=argparse.SUPPRESS)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        if not parsed_args.words:
            self.app.stdout.write(_SCRIPTS[parsed_args.shell])
            return
        *before, last = parsed_args.words_so_far or [""]
        for word in sorted(set(self._next(before))):
            if word.startswith(last):
                self.app.stdout.write(f"{word}\n")

    def _next(self, before: list[str]) -> Iterable[str]:
        from imagecache_lib.cli import main

        words = self._without_options(before)
        names = [name for name in main.COMMANDS if name != "complete"]
        command = next((name for name in names if name.split() == words[: len(name.split())]), None)
        if command is None:
            begun = [name.split() for name in names if name.split()[: len(words)] == words]
            yield from (parts[len(words)] for parts in begun)
            if not words:
                yield from _options(self.app.parser)
            return
        kind, name, _rest = self.app.command_manager.find_command(command.split())
        completed: Any = kind(self.app, None, cmd_name=name)
        parser = completed.get_parser(name)
        yield from _options(parser)
        # What cannot be read is not completed; the command itself says why.
        with contextlib.suppress(errors.ImageCacheError):
            yield from self._things(command)
            if command in _OF_JOBS:
                known = completed.reader(parser.parse_args([]))
                yield from (work.id for work in known.summaries())

    def _without_options(self, before: list[str]) -> list[str]:
        """Leave out the program's own options, and read the configuration that they name."""
        with contextlib.suppress(SystemExit):
            said, rest = self.app.parser.parse_known_args(before)
            self.app.options.config_file = said.config_file or self.app.options.config_file
            self.app.options.instances_path = said.instances_path or self.app.options.instances_path
            return [word for word in rest if not word.startswith("-")]
        return before

    def _things(self, command: str) -> Iterable[str]:
        if command in _OF_CACHED:
            for found in self.admin().list_bases():
                yield found.image_id or found.name
        elif command in _OF_HOSTS:
            for host in self.admin().list_hosts():
                yield host.id


def _options(parser: argparse.ArgumentParser) -> Iterable[str]:
    for action in parser._actions:
        if action.help is not argparse.SUPPRESS:
            yield from (option for option in action.option_strings if option.startswith("--"))
