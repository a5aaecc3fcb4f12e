# SPDX-License-Identifier: Apache-2.0
"""The directive ``command-help``: a section for each command of ``imagecache``, from what its ``-h`` says.

Nothing is written twice: usage, options and examples are those of the parsers. The options about output,
which commands that show a table share, are left out; the page has them once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from imagecache_lib.cli.main import COMMANDS, ImageCacheApp

#: Groups of options that cliff adds to each command with a result.
_OUTPUT = ("output formatters", "table formatter", "json formatter", "csv formatter", "shell formatter")
_WIDTH = 96


class CommandHelp(Directive):
    """Shows the program's own options, then each command."""

    def run(self) -> Sequence[nodes.Node]:
        program = ImageCacheApp()
        found = [_section("Options of the program", [_options(program.parser._actions)])]
        for words in sorted(set(COMMANDS) - {"help"}):
            kind, name, _rest = program.command_manager.find_command(words.split())
            parser = kind(program, None, cmd_name=name).get_parser(f"imagecache {name}")
            found.append(_section(f"imagecache {words}", _command(parser)))
        return found


def _section(title: str, content: Sequence[nodes.Node]) -> nodes.section:
    section = nodes.section(ids=[nodes.make_id(title)], names=[nodes.fully_normalize_name(title)])
    section += nodes.title(text=title)
    section += content
    return section


def _command(parser: argparse.ArgumentParser) -> list[nodes.Node]:
    found: list[nodes.Node] = [
        nodes.paragraph(text=" ".join(text.split())) for text in (parser.description or "").split("\n\n")
    ]
    own = [group for group in parser._action_groups if (group.title or "").lower() not in _OUTPUT]
    actions = [action for group in own for action in group._group_actions]
    found.append(nodes.literal_block(text=_usage(parser, actions)))
    if actions:
        found.append(_options(actions))
    if parser.epilog and parser.epilog.startswith("examples:"):
        found.append(nodes.paragraph(text="Examples:"))
        found.append(nodes.literal_block(text="\n".join(map(str.strip, parser.epilog.splitlines()[1:]))))
    return found


def _usage(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action]) -> str:
    formatter = argparse.HelpFormatter(parser.prog, width=_WIDTH)
    formatter.add_usage(None, actions, [], prefix="")
    return formatter.format_help().strip()


def _options(actions: Sequence[argparse.Action]) -> nodes.definition_list:
    listed = nodes.definition_list()
    for action in actions:
        if action.help is argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        item = nodes.definition_list_item()
        term = nodes.term()
        for number, text in enumerate(_names(action)):
            if number:
                term += nodes.Text(", ")
            term += nodes.literal(text=text)
        item += [term, nodes.definition("", nodes.paragraph(text=_help(action)))]
        listed += item
    return listed


def _names(action: argparse.Action) -> Iterator[str]:
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if isinstance(value, tuple):
        value = " ".join(value)
    if not action.option_strings:
        yield str(value)
    for option in action.option_strings:
        yield option if action.nargs == 0 else f"{option} {value}"


def _help(action: argparse.Action) -> str:
    known: dict[str, Any] = {**vars(action), "prog": "imagecache"}
    return " ".join(((action.help or "") % known).split())


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
