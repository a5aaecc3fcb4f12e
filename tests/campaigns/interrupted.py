# SPDX-License-Identifier: Apache-2.0
"""An interrupt at each line of the library that a public call runs: SIGINT, ``eventlet.kill``, SystemExit.

Such an exception may come between any two lines, and none of the library's ``except`` clauses expects it. It
is raised by a trace function (:func:`sys.settrace`) in a forked child as it reaches one line. It must leave
the call as it is, no lock may stay held, the same process must go on, and every promise must hold afterwards,
as after a crash.

Python itself loses a descriptor if the exception comes after ``os.open`` returned and before its result is
assigned to anything. That is why a descriptor that stays open is counted, and is no fault unless it is one of
a lock.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors
from tests.campaigns.crashes import C, Scene, World
from tests.campaigns.injected import SCENES, open_below, warm_up, world_of

#: The library's own files.
_LIBRARY = os.path.dirname(ic.__file__) + os.sep

#: What stands in for an image service keeps locks of its own, which nothing of the library waits for.
_FAKES = _LIBRARY + "testing" + os.sep

#: A call that was interrupted ends within so many seconds, however busy the machine is.
_PATIENCE = 300


class Interrupt(BaseException):
    """What stands for all of them."""


@dataclasses.dataclass(frozen=True, order=True)
class Line:
    """A line that was reached, for the so-many-eth time."""

    file: str
    number: int
    turn: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number} (#{self.turn})"


class _Tracer:
    """Calls something as execution reaches a line of the library, in this thread."""

    def __init__(self, reached: Callable[[Line], None]) -> None:
        self._reached = reached
        self._turns: dict[tuple[str, int], int] = collections.Counter()

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _call(self, frame: types.FrameType, _event: str, _argument: object) -> Any:
        path = frame.f_code.co_filename
        if frame.f_code.co_name == "__del__" or not path.startswith(_LIBRARY) or path.startswith(_FAKES):
            return None  # nothing comes out of a finalizer
        return self._line

    def _line(self, frame: types.FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            key = (frame.f_code.co_filename.removeprefix(_LIBRARY), frame.f_lineno)
            self._turns[key] += 1
            self._reached(Line(*key, self._turns[key]))
        return self._line


def chosen(chance: random.Random, *, each: int, most: int | None) -> list[tuple[str, Line]]:
    """Return interrupts: of each line that any scene reaches, in ``each`` scenes at random.

    :param most: how many to choose of these, or None for all.
    """
    reached: dict[tuple[str, int], list[tuple[str, Line]]] = {}
    names = sorted(SCENES)
    for name in names if most is None else chance.sample(names, 6):
        warm_up(name)
        for line in lines(name):
            reached.setdefault((line.file, line.number), []).append((name, line))
    found = [
        one for all_of_it in reached.values() for one in chance.sample(all_of_it, min(each, len(all_of_it)))
    ]
    return sorted(found if most is None else chance.sample(found, min(most, len(found))))


def lines(name: str) -> list[Line]:
    """Return the lines that a scene's call reaches, the first and the last time for each."""
    turns: dict[tuple[str, int], int] = {}

    def reached(line: Line) -> None:
        turns[line.file, line.number] = line.turn

    def count(world: World) -> list[Any]:
        with _Tracer(reached).tracing():
            SCENES[name].run(world)
        return [[file, number, turn] for (file, number), turn in turns.items()]

    with world_of(SCENES[name]) as world:
        found = _in_child(lambda: count(world))
    assert isinstance(found, list), found
    return sorted({Line(file, number, each) for file, number, turn in found for each in (1, turn)})


def interrupt(name: str, line: Line) -> tuple[str | None, bool]:
    """Interrupt a scene's call as it reaches a line.

    Returns what is wrong, or None, and whether a descriptor stayed open.
    """
    scene = SCENES[name]
    with world_of(scene) as world:
        found = _in_child(lambda: _interrupted(scene, world, line))
        if not isinstance(found, Mapping):
            return str(found), False
        wrong = None if found["how"] in ("returned", "interrupted") else str(found["how"])
        try:
            if wrong is None and name != "swap":
                world.check(frozenset())
        except (AssertionError, errors.ImageCacheError, OSError, KeyError):
            wrong = f"afterwards ({found['how']}):\n{traceback.format_exc()}"
        return wrong, bool(found["left"])


def _interrupted(scene: Scene, world: World, line: Line) -> dict[str, object]:
    raised = False

    def reached(at: Line) -> None:
        nonlocal raised
        if at == line:
            raised = True
            raise Interrupt

    how = "returned"
    try:
        with _Tracer(reached).tracing():
            scene.run(world)
        if raised:
            how = "the interrupt was swallowed"
    except Interrupt:
        how = "interrupted"
    except BaseException:
        how = f"not the interrupt came out:\n{traceback.format_exc()}"
    gc.collect()
    left = open_below(world.instances)
    if held := [path for path in left if "/locks/" in path]:
        how = f"locks stay held: {held}"
    elif how in ("returned", "interrupted"):
        # The process goes on: another image, with the same cache.
        world.manager().cache_image(C)
    return {"how": how, "left": left}


def _in_child(function: Callable[[], object]) -> object:
    """Return what a function returns in a forked child, as JSON allows, or what went wrong as text."""
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        with open(write_fd, "w", encoding="utf-8") as answer:
            try:
                signal.alarm(_PATIENCE)  # it hangs then, and dies
                json.dump(function(), answer)
            except BaseException:
                json.dump(traceback.format_exc(), answer)
        os._exit(0)
    os.close(write_fd)
    with open(read_fd, encoding="utf-8") as answer:
        said = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return json.loads(said)
    return "it hangs" if status == -signal.SIGALRM else f"it ended with {status}"


# -- real signals ------------------------------------------------------------------------------------


def signalled(name: str, chance: random.Random, *, seconds: float) -> str | None:
    """Send SIGINT to a process that makes a scene's call, after a time. Returns what is wrong, or None.

    :param seconds: how long the call takes at most before it is interrupted.
    """
    scene = SCENES[name]
    with world_of(scene) as world:
        child = os.fork()
        if child == 0:
            status = 3
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                scene.run(world)
                status = 0
            except KeyboardInterrupt:
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGINT)
        deadline = time.monotonic() + _PATIENCE
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "it hangs"
            time.sleep(0.001)
        status = os.waitstatus_to_exitcode(ended[1])
        # The signal may come before the handler is there, or while the interpreter ends.
        if status not in (0, -signal.SIGINT):
            return f"it ended with {status}"
        try:
            if name != "swap":
                world.check(frozenset())
        except (AssertionError, errors.ImageCacheError, OSError, KeyError):
            return f"afterwards:\n{traceback.format_exc()}"
    return None
