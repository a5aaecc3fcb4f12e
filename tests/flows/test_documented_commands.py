# SPDX-License-Identifier: Apache-2.0
"""What pages tell to type is what the command takes, and works on a host that has what the page is about."""

from __future__ import annotations

import contextlib
import io
import pathlib
from collections.abc import Iterator

import pytest

from imagecache_lib.cli.main import COMMANDS, ImageCacheApp
from tests.support import documented, needs, printed

UBUNTU = "318ac4fb-a140-4405-8167-ad782f983e48"
DISK = "/var/lib/nova/instances/vm1/disk"

#: Pages whose commands run, one after the other: they act on one host.
RUN = (
    "admin/runbooks",
    "admin/eviction",
    "admin/faq",
    "admin/host-setup",
    "admin/shared-storage",
    "admin/security",
    "user/backends",
    "user/driver-authors",
    "user/sources",
    "reference/benchmarks",
)

#: What stands for something that a reader has.
_MEANT = {
    "IMAGE": UBUNTU,
    "DISK": DISK,
    "ID": UBUNTU,
    "COPY": "ubuntu.raw",
    "table=/etc/imagecache/images.json": "table=images.json",
    "/etc/nova/nova.conf": "imagecache.conf",
}


def program_options(words: list[str]) -> list[str]:
    """Return the words behind the program's own options."""
    return ImageCacheApp().parser.parse_known_args(words)[1]


def command_of(words: list[str]) -> str | None:
    """Return the command that words begin with, or None."""
    return next((name for name in COMMANDS if name.split() == words[: len(name.split())]), None)


@pytest.mark.parametrize("page", documented.pages(), ids=lambda page: page.stem)
def test_a_page_names_commands_and_options_that_there_are(page: pathlib.Path) -> None:
    for said in documented.commands_of(page):
        if said == ["--version"]:
            continue
        words = program_options(said)
        command = command_of(words)
        if command is None:  # a group of commands, as a name
            assert any(name.split()[: len(words)] == words for name in COMMANDS), said
            continue
        program = ImageCacheApp()
        kind, name, rest = program.command_manager.find_command(words)
        parser = kind(program, None, cmd_name=name).get_parser(name)
        if not rest:  # a command, as a name
            continue
        rest = [{"bash|zsh|fish": "bash"}.get(word, word) for word in rest]
        with contextlib.redirect_stderr(io.StringIO()) as complaint:
            try:
                parser.parse_args(rest)
            except SystemExit:
                pytest.fail(f"imagecache {' '.join(said)}: {complaint.getvalue()}")


@pytest.fixture(scope="module")
def host() -> Iterator[printed.Host]:
    """A host with an image that is pinned, a disk that needs it, and a web server's table of images."""
    needs.program("qemu-img")
    with printed.host() as machine:
        machine.write("images.json", "{}")
        for words in (
            ["image", "cache", UBUNTU, "--file", "ubuntu.raw"],
            ["disk", "create", UBUNTU, DISK],
            ["image", "pin", UBUNTU],
        ):
            code, said = machine.ask(words)
            assert code == 0, said
        yield machine


#: What ends otherwise on this host, and why: the exit code, and words of the message.
_OTHERWISE = {
    "image cache": (3, "does not list it"),  # the table is empty
    "disk forget": (3, "no pass saw a disk"),
    "host forget": (3, "no host has the id"),
}


@pytest.mark.parametrize("page", RUN)
def test_a_page_tells_to_type_what_works(host: printed.Host, page: str) -> None:
    for said in documented.commands_of(documented.DOC / f"{page}.rst"):
        command = command_of(program_options(said)) or ""
        words = [_MEANT.get(word, word) for word in program_options(said)]
        if command in ("", "agent") or words == ["image", "cache"]:
            continue  # a name, or a service that goes on
        if words[:1] == ["history"]:
            words = ["history", UBUNTU]
        code, lines = host.ask(words)
        ends, with_words = _OTHERWISE.get(command, (0, ""))
        # Ten is an answer, too: what the page's reader looks for.
        assert code == ends or (code == 10 and ends == 0), (said, code, lines)
        assert with_words in "\n".join(lines), (said, lines)
