# SPDX-License-Identifier: Apache-2.0
"""Few descriptors: each public call with so many left, from none to more than it needs.

The limit is the kernel's (RLIMIT_NOFILE, setrlimit(2)), in a forked child. Only the library's errors may
leave the public API, no descriptor may stay open, and every promise must hold afterwards, as after a crash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import tempfile
import traceback
from collections.abc import Iterator

from imagecache_lib import errors
from tests.campaigns import injected
from tests.campaigns.crashes import World
from tests.campaigns.injected import SCENES, world_of

#: As many as any call needs, and some more.
MOST = 14


def starve(name: str, spare: int) -> str | None:
    """Make a scene's call with so many descriptors left. Returns what is wrong, or None."""
    scene = SCENES[name]

    def run(world: World) -> None:
        with _left(spare):
            scene.run(world)

    with world_of(scene) as world, tempfile.NamedTemporaryFile("r", encoding="utf-8") as said:
        child = os.fork()
        if child == 0:
            injected.run(dataclasses.replace(scene, run=run), world, said.name)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (injected.FINE, injected.REFUSED):
            return said.read() or f"it ended with {status}"
        try:
            if name != "swap":
                world.check(frozenset())
        except (AssertionError, errors.ImageCacheError, OSError, KeyError):
            outcome = "it went well" if status == injected.FINE else "it was refused"
            return f"afterwards ({outcome}):\n{traceback.format_exc()}"
    return None


@contextlib.contextmanager
def _left(spare: int) -> Iterator[None]:
    """Let this process open so many files more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The listing's own descriptor is among them.
    top = max(int(entry) for entry in os.listdir("/proc/self/fd"))
    taken = []
    while (fd := os.open(os.devnull, os.O_RDONLY)) < top:
        taken.append(fd)
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in taken:
            os.close(fd)
