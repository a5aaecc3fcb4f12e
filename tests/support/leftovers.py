# SPDX-License-Identifier: Apache-2.0
"""What code leaves behind in the process that runs it: threads, and open files.

They are told apart from those of earlier tests, which may end at any moment.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator


def open_below(directory: str | os.PathLike[str]) -> list[str]:
    """Return the paths of this process's open files below a directory, each as often as it is open."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return sorted(path for path in found if path.startswith(f"{os.path.realpath(directory)}/"))


@contextlib.contextmanager
def no_thread_left() -> Iterator[None]:
    """Check that each thread that is begun in the body ends."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive(), f"{thread.name} goes on"
