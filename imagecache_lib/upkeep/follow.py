# SPDX-License-Identifier: Apache-2.0
"""Looking at files outside of the disk roots, to which the headers of disks lead, without waiting for ever.

A guest may have written the header, and with it the path: of a mount that does not answer, of a device, of
whatever it likes. So each look is made in a thread that is given up after a while, nothing but a regular file
is opened, and while one look has not come back no other is begun.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable

from imagecache_lib.system import bounded
from imagecache_lib.system.bounded import Bounded
from imagecache_lib.upkeep import headers

#: How long a look at a disk root may take, in seconds: a file server that is busy is not one that is gone.
_ROOTS_LIMIT = 30.0

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True)
class Looked:
    """A regular file.

    :param target: its ``(st_dev, st_ino)``.
    :param references: the texts in its header that may name another file.
    """

    target: tuple[int, int]
    references: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class Nothing:
    """There is something of that name, and it is no regular file."""


@dataclasses.dataclass(frozen=True)
class CannotTell:
    """It is not there, cannot be read, or does not answer.

    :param cause: a clause.
    """

    cause: str


Answer = Looked | Nothing | CannotTell


class Follower:
    """Looks at files. Safe to share between threads.

    :ivar inside: makes looks at what lies in instance directories and may not answer: block devices, mounts,
        what links lead to. Apart from the others, since what a guest wrote must not hold these up.
    :ivar roots: makes looks at disk roots, likewise.
    :param limit: seconds that a look may take.
    :param looks: looks at one file, however long that takes, or None to look with stat(2) and open(2).
    """

    def __init__(self, limit: float = bounded.LIMIT, *, looks: Callable[[str], Answer] | None = None) -> None:
        self._bounded = Bounded(limit)
        self.inside = Bounded(limit)
        self.roots = Bounded(_ROOTS_LIMIT)
        self._looks = looks or _look

    def look(self, path: str) -> Answer:
        """Look at a file. Returns what it is, or why that cannot be told within the limit."""
        if self._bounded.is_stuck:
            return CannotTell("a file that was looked at before it does not answer")
        answers = self._bounded.call(lambda: self._looks(path))
        return answers[0] if answers else CannotTell("it does not answer")


def _look(path: str) -> Answer:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return Nothing()
        fd = os.open(path, _OPEN)
        try:
            found = os.fstat(fd)
            head = headers.read_head(fd)
            references = headers.references(fd, head) if head else ()
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        return CannotTell(getattr(error, "strerror", None) or str(error))
    return Looked((found.st_dev, found.st_ino), references)
