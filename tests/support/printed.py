# SPDX-License-Identifier: Apache-2.0
"""The page of the documentation that shows what commands print, run again.

Each line of a ``console`` block that begins with ``$`` is run, in the order of the page, in a directory of
its own; what the page shows below it is what the command said, with the path that an operator's host has.
``python -m tests.support.printed`` writes the page anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator

from tests.support import forked_command

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "doc/source/admin/output.rst"

#: The directory as the page has it. The real one has a path of the same length, so that tables look alike.
_SHOWN = "/var/lib/nova/instances"

#: An agent is told to stop once it has said this.
_STOP = {"agent": "0 evicted, 0 B"}

#: What differs from run to run, and what stands for it when two are compared.
_VARYING = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ"), "DATE"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "ID"),
    (re.compile(r"\b[0-9a-f]{8}(?=  )"), "ID"),
    (re.compile(r"\d+(\.\d+)? ([KMGT]i)?B\b"), "SIZE"),
    (re.compile(r"(\d+ (d|h|min) )?\b\d+(\.\d+)? (s|min|h|d)\b"), "TIME"),
    (re.compile(r"\d+ %"), "PART"),
    (re.compile(r"/usr\S*/python\S*|python3?\.\d+"), "PYTHON"),
    (re.compile(r" +"), " "),
)


@dataclasses.dataclass
class Line:
    """One command of the page.

    :param number: index of its line in the page.
    :param command: as an operator types it.
    :param shown: the lines below it.
    """

    number: int
    command: str
    shown: list[str]


def lines_of(text: str) -> list[Line]:
    """Return the commands of a page's console blocks, each with what is shown of it."""
    found: list[Line] = []
    within = False
    for number, line in enumerate(text.splitlines()):
        if line and not line.startswith(" "):
            within = line == ".. code-block:: console"
        elif within and line.startswith("   $ "):
            found.append(Line(number, line.removeprefix("   $ "), []))
        elif within and line.startswith("   ") and found:
            found[-1].shown.append(line.removeprefix("   "))
    return found


def comparable(lines: list[str]) -> list[str]:
    """Return lines without what differs from run to run."""
    found = []
    for line in lines:
        text = line
        for pattern, word in _VARYING:
            text = pattern.sub(word, text)
        found.append(text.strip())
    return found


@contextlib.contextmanager
def host() -> Iterator[Host]:
    """Yield a host on which nothing has run yet."""
    home = pathlib.Path(tempfile.mkdtemp(prefix="ic-", dir="/tmp"))
    instances = pathlib.Path(f"{home}-".ljust(len(_SHOWN), "i"))
    try:
        instances.mkdir()
        yield Host(home, instances)
    finally:
        shutil.rmtree(home)
        shutil.rmtree(instances, ignore_errors=True)


class Host:
    """Runs the page's commands.

    :param home: an empty directory.
    :param instances: an empty directory whose path is as long as the one that is shown.
    """

    def __init__(self, home: pathlib.Path, instances: pathlib.Path) -> None:
        self._home = home
        self._instances = instances
        for name in ("vm1", "vm2"):
            (instances / name).mkdir()
        for name, fill in (("ubuntu.raw", b"u"), ("debian.raw", b"d")):
            with open(home / name, "wb") as image:
                image.write(fill * (3 << 20))
                image.truncate(64 << 20)
        (home / "instances.json").write_text("[]")
        (home / "table.json").write_text("{}")
        (home / "imagecache.conf").write_text(
            f"[DEFAULT]\nhost = compute-1\ninstances_path = {instances}\ntransport_url = fake://\n"
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OS_", "COLUMNS"))}
        self._environment = {
            **kept,
            "HOME": str(home),
            "IMAGECACHE_JOBS": str(home / "jobs.sqlite"),
        }

    def run(self, command: str) -> list[str]:
        """Return the lines that a command says."""
        words = shlex.split(command.replace(_SHOWN, str(self._instances)))
        if words[0] == "imagecache":
            return self._imagecache(words[1:])[1]
        said = subprocess.run(
            words, cwd=self._home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
        return self._shown(said.stdout)

    def write(self, name: str, text: str) -> None:
        """Write a file into the operator's directory."""
        (self._home / name).write_text(text)

    def ask(self, words: list[str]) -> tuple[int, list[str]]:
        """Return the exit code of ``imagecache`` with these words, and the lines that it says."""
        return self._imagecache([word.replace(_SHOWN, str(self._instances)) for word in words])

    def _imagecache(self, words: list[str]) -> tuple[int, list[str]]:
        alone = words[0] == "precache"
        configuration = [] if alone else ["--config-file", str(self._home / "imagecache.conf")]
        if alone:  # a job of the machine's own needs no message bus
            (self._home / "alone.conf").write_text(
                (self._home / "imagecache.conf").read_text().replace("transport_url = fake://\n", "")
            )
            configuration = ["--config-file", str(self._home / "alone.conf")]
        return self._run([*configuration, *words], _STOP.get(words[0], ""))

    def _run(self, words: list[str], until: str) -> tuple[int, list[str]]:
        """Run a command, which is told to end once it has said something, if that is given."""
        commands = forked_command.commands()
        reading, writing = os.pipe()
        said = b""
        with open(reading, "rb", buffering=0) as stream:
            with open(writing, "wb", buffering=0):
                pid = commands.start(
                    words,
                    environment=self._environment,
                    directory=self._home,
                    stdout=writing,
                    stderr=writing,
                )
            while piece := stream.read(1 << 16):
                said += piece
                if until and until.encode() in said:
                    os.kill(pid, signal.SIGTERM)
                    until = ""
        return commands.wait(), self._shown(said.decode())

    def _shown(self, said: str) -> list[str]:
        text = said.replace(str(self._instances), _SHOWN).replace(str(self._home), "/home/operator")
        return [line.rstrip() for line in text.splitlines()]


def run_again(text: str) -> list[tuple[Line, list[str]]]:
    """Return each command of a page with what it says now."""
    with host() as machine:
        return [(line, machine.run(line.command)) for line in lines_of(text)]


def rewritten(text: str) -> str:
    """Return a page with what its commands say now."""
    lines = text.splitlines()
    for line, said in reversed(run_again(text)):
        begin = line.number + 1
        lines[begin : begin + len(line.shown)] = [f"   {each}".rstrip() for each in said]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
