# SPDX-License-Identifier: Apache-2.0
"""Looking at files outside of the disk roots, to which the headers of disks lead, without waiting for ever.

A guest may have written the header, and with it the path: of a mount that does not answer, of a device, of
whatever it likes. So each look is made in a thread that is given up after a while, nothing but a regular file
or a block device is opened, and while one look has not come back no other is begun at the same filesystem or
device. Others are: what is written into one disk must not hide what another disk needs.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Sequence
from typing import TypeVar

from imagecache_lib.system import block_devices, bounded, mounts
from imagecache_lib.system.bounded import Bounded
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.upkeep import headers

_T = TypeVar("_T")

#: How long a look at a disk root may take, in seconds: a file server that is busy is not one that is gone.
_ROOTS_LIMIT = 30.0

#: Why nothing is known of what was given up.
NO_ANSWER = "it does not answer"

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True)
class Looked:
    """A regular file or a block device.

    :param target: its ``(st_dev, st_ino)``.
    :param references: the texts in its header that may name another file, and the files that a device is made
        of.
    :param real: its path without links, or empty if it is not known.
    :param is_device: it is a block device, whose path another one may have had before.
    """

    target: tuple[int, int]
    references: tuple[bytes, ...]
    real: str = ""
    is_device: bool = False


@dataclasses.dataclass(frozen=True)
class Nothing:
    """There is something of that name, and it is neither a regular file nor a block device."""


@dataclasses.dataclass(frozen=True)
class CannotTell:
    """It is not there, cannot be read, or does not answer.

    :param cause: a clause.
    :param real: the path without links of what is not there, or empty if it is not known.
    :param references: the files that a block device is made of.
    """

    cause: str
    real: str = ""
    references: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Device:
    """A block device, which was not opened yet.

    :param number: its ``st_rdev``.
    """

    number: int


#: What tells a filesystem apart: the path of where it is mounted, or ``st_dev`` where a link led to it.
Mount = str | int

Answer = Looked | Nothing | CannotTell


class Follower:
    """Looks at files. Safe to share between threads.

    :ivar inside: makes looks at what lies in instance directories and may not answer: block devices, mounts,
        what links lead to. Apart from the others, since what a guest wrote must not hold these up.
    :ivar roots: makes looks at disk roots, likewise.
    :param limit: seconds that a look may take.
    :param roots_limit: seconds that a look at a disk root may take, or at disks on another filesystem than
        the cache's, without getting on.
    :param looks: looks at one file, and at the disks that begin in it at some offsets, however long that
        takes, or None to look with stat(2) and open(2).
    """

    def __init__(
        self,
        limit: float = bounded.LIMIT,
        *,
        roots_limit: float = _ROOTS_LIMIT,
        looks: Callable[[str, Sequence[int]], Answer | Device] | None = None,
    ) -> None:
        self.inside = Bounded(limit)
        self.roots = Bounded(roots_limit)
        self._looks = looks or _look
        self._limit = limit
        self._roots_limit = roots_limit
        self._mounts: dict[Mount, Bounded] = {}
        self._outside: dict[Mount, Bounded] = {}

    def at(self, mount: Mount) -> Bounded:
        """Return what makes looks at the disks on one filesystem, which may cease to answer at any time.

        Each filesystem has one of its own, so that one that is gone does not hide the others. While one is
        gone the others, which may be of the same server, have less time.
        """
        found = self._mounts.setdefault(mount, Bounded(self._roots_limit))
        gone = any(each.is_stuck for each in list(self._mounts.values()) if each is not found)
        found.limit = self._limit if gone else self._roots_limit
        return found

    def pinned(self, path: str) -> str | None:
        """Return the format that the ``disk.info`` beside a disk, which is read now, pins; or None if it pins
        none, or does not answer: the disk's header counts then, which keeps more."""
        answers = self.inside.call(lambda: headers.pinned_format(path))
        return answers[0] if answers else None

    def may_be_pinned(self, path: str, format: str) -> bool:
        """Whether the ``disk.info`` beside a disk, which is read now, pins a format, or does not answer."""
        answers = self.inside.call(lambda: headers.pinned_format(path))
        return not answers or answers[0] == format

    def real(self, path: str) -> str:
        """Return a disk's path without links, or the path itself if that does not answer."""
        answers = self.inside.call(lambda: os.path.realpath(path))
        return answers[0] if answers else path

    def look(self, path: str, starts: Sequence[int] = (0,)) -> Answer:
        """Look at a file. Returns what it is, or why that cannot be told within the limit.

        :param starts: where in it a disk may begin, in bytes.
        """
        answer = self._look(mounts.of(path, mounts.points()), lambda: self._looks(path, starts))
        return self._look_at_device(path, answer.number, starts) if isinstance(answer, Device) else answer

    def _look_at_device(self, path: str, number: int, starts: Sequence[int]) -> Answer:
        try:
            beneath = block_devices.files_beneath(number)
        except OSError as error:
            return CannotTell(error.strerror or str(error))
        answer = self._look(number, lambda: _read(path, starts, beneath))
        return dataclasses.replace(answer, references=beneath) if isinstance(answer, CannotTell) else answer

    def _look(self, where: Mount, look: Callable[[], _T]) -> _T | CannotTell:
        """Look at a file on one filesystem, or on one block device, which ``st_rdev`` tells apart."""
        bounded = self._outside.setdefault(where, Bounded(self._limit))
        if bounded.is_stuck:
            return CannotTell("a file that was looked at before it does not answer")
        answers = bounded.call(look)
        return answers[0] if answers else CannotTell(NO_ANSWER)


def _look(path: str, starts: Sequence[int]) -> Answer | Device:
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        return CannotTell(error.strerror or str(error), os.path.realpath(path))
    except (OSError, ValueError) as error:
        return CannotTell(getattr(error, "strerror", None) or str(error))
    if stat.S_ISBLK(found.st_mode):
        return Device(found.st_rdev)
    return _read(path, starts) if stat.S_ISREG(found.st_mode) else Nothing()


def _read(path: str, starts: Sequence[int], beneath: tuple[bytes, ...] = ()) -> Answer:
    """Read the headers in a file or a block device.

    :param starts: where.
    :param beneath: the files that the device is made of.
    """
    try:
        with Descriptor(path, _OPEN) as fd:
            found = os.fstat(fd)
            is_device = stat.S_ISBLK(found.st_mode)
            if is_device and not os.pread(fd, 1, 0):
                return CannotTell("there is nothing in the device")
            references = beneath
            for start in starts:
                if head := headers.read_head(fd, start):
                    references += headers.references(fd, head, start)
            real = os.path.realpath(path) if references else ""
    except FileNotFoundError as error:
        return CannotTell(error.strerror or str(error), os.path.realpath(path))
    except (OSError, ValueError) as error:
        return CannotTell(getattr(error, "strerror", None) or str(error))
    return Looked((found.st_dev, found.st_ino), references, real, is_device)
