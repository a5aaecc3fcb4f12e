# SPDX-License-Identifier: Apache-2.0
"""Open files that are closed whatever becomes of their owner.

Between ``fd = os.open(path)`` and the ``try`` that will close it an interrupt may come, a signal's or the end
of a green thread, and the number is lost. An object that has the number closes it with its last reference.
"""

from __future__ import annotations

import functools
import os


class Descriptor:
    """A descriptor that goes with the last reference to it: open for the body of ``with``, which yields it.

    :raises OSError: as open(2).
    """

    __slots__ = ("_open",)

    def __init__(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._open: list[int] = []
        # An interrupt comes as soon as a call returns to Python's own code. So no such code lies between the
        # opening and the keeping of the number, nor between the two steps of close().
        opening = functools.partial(os.open, dir_fd=dir_fd)
        self._open.extend(map(opening, (path,), (flags | os.O_CLOEXEC,), (mode,)))

    @property
    def fd(self) -> int:
        """Its number, or -1 once it is closed."""
        return self._open[0] if self._open else -1

    def close(self) -> None:
        """Close it. Does nothing if it is closed.

        :raises OSError: as close(2). It is closed then too.
        """
        while self._open:
            next(map(os.close, map(self._open.pop, (-1,))))

    def __enter__(self) -> int:
        return self._open[0]

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
