# SPDX-License-Identifier: Apache-2.0
"""The rule that every program which the library runs on a disk is told what to open, kept over all tests.

Python tells of each process that it starts (``sys.addaudithook``), without anything being replaced. What is
started from within the library and runs qemu-img must state, for every file, its driver and what lies under
it. A violation raises where the process would have started, and is noted, so that the test fails that caused
it. The Pythons that tests start keep the rule too: the command, the agent, workers.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

_FOUND = importlib.util.find_spec("imagecache_lib")
assert _FOUND is not None and _FOUND.origin is not None
_LIBRARY = os.path.dirname(os.path.abspath(_FOUND.origin)) + os.sep
#: The variable that says where violations are written, by whichever process they are in.
_NOTES = "IMAGECACHE_TESTS_VIOLATIONS"
_STARTS = frozenset(("subprocess.Popen", "os.exec", "os.posix_spawn"))


class Violation(BaseException):
    """The library was about to let a program open what it was not told. Nothing in the library catches it."""


def install() -> None:
    """Keep the rule in this process, from now on."""
    sys.addaudithook(_audit)


def install_in_children() -> None:
    """Keep the rule in each Python that this process starts, from now on, and in what that one starts."""
    handle, path = tempfile.mkstemp(prefix="imagecache-violations-")
    os.close(handle)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    atexit.register(remove)
    os.environ[_NOTES] = path
    children = os.path.join(os.path.dirname(os.path.abspath(__file__)), "children")
    paths = [
        each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each not in ("", children)
    ]
    os.environ["PYTHONPATH"] = os.pathsep.join([children, *paths])


def take_notes() -> str:
    """Return which violations were noted since the last call, in all processes, a line each."""
    with open(os.environ[_NOTES], "r+", encoding="utf-8") as notes:
        found = notes.read()
        notes.truncate(0)
    return found


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _STARTS or not _from_the_library():
        return
    words = arguments[1]
    if isinstance(words, str | bytes):
        words = [words]
    fault = fault_of([os.fsdecode(word) for word in words])
    if fault is not None:
        if _NOTES in os.environ:
            with contextlib.suppress(OSError), open(os.environ[_NOTES], "a", encoding="utf-8") as notes:
                notes.write(f"{fault}: {words}\n")
        raise Violation(f"{fault}: {words}")


def _from_the_library() -> bool:
    frame = sys._getframe()
    while (outer := frame.f_back) is not None:
        frame = outer
        name = os.path.abspath(frame.f_code.co_filename)
        if name.startswith(_LIBRARY) and not name.startswith(os.path.join(_LIBRARY, "testing")):
            return True
    return False


def fault_of(words: Sequence[str]) -> str | None:
    """Return what is wrong with a command line. None if nothing is."""
    names = [os.path.basename(word) for word in words]
    if "qemu-img" not in names:
        return "a QEMU program" if any(name.startswith("qemu-") for name in names) else None
    arguments = list(words[len(names) - names[::-1].index("qemu-img") :])
    if arguments == ["--version"]:
        return None
    stated = [word for word in arguments if word.startswith("json:")]
    if not stated:
        return "no file is stated"
    for word in arguments:
        if word in ("-f", "-F", "-o", "--image-opts"):
            return f"an option that leaves something to be looked up: {word}"
        if "/" in word and word not in stated:
            return f"a file without its driver: {word}"
    for word in stated:
        fault = _fault_of_node(json.loads(word.removeprefix("json:")))
        if fault is not None:
            return fault
    return None


def _fault_of_node(node: Any) -> str | None:
    if not isinstance(node, dict) or not isinstance(node.get("driver"), str):
        return "no driver is stated"
    if node["driver"] == "null-co":  # no file: what is written to it is gone
        return None if set(node) <= {"driver", "size", "read-zeroes"} else "more is stated of no file"
    file = node.get("file")
    if (
        not isinstance(file, dict)
        or file.get("driver") != "file"
        or not os.path.isabs(file.get("filename", ""))
    ):
        return "no file is stated"
    if "backing" not in node:
        return "what lies under it is not stated"
    return None if node["backing"] is None else _fault_of_node(node["backing"])
