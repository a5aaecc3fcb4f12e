# SPDX-License-Identifier: Apache-2.0
"""Open files that are closed whatever becomes of their owner.

Between ``fd = os.open(path)`` and the ``try`` that will close it an interrupt may come, a signal's or the end
of a green thread, and the number is lost. An object that has the number closes it with its last reference.
"""

from __future__ import annotations

import os


class Descriptor:
    """A descriptor that goes with the last reference to it: open for the body of ``with``, which yields it.

    :raises OSError: as open(2).
    """

    __slots__ = ("_open",)

    def __init__(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._open: list[int] = []
        # No line lies between the two, nor between the two of close(): an interrupt comes at a line's begin.
        self._open.append(os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd))

    @property
    def fd(self) -> int:
        """Its number, or -1 once it is closed."""
        return self._open[0] if self._open else -1

    def close(self) -> None:
        """Close it. Does nothing if it is closed.

        :raises OSError: as close(2). It is closed then too.
        """
        while self._open:
            os.close(self._open.pop())

    def __enter__(self) -> int:
        return self._open[0]

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
