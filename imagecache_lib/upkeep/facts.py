# SPDX-License-Identifier: Apache-2.0
"""What a reading of the disk roots found, as plain values, which references and audit fold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from imagecache_lib.store.seen import Identity, SeenDirectory


@dataclasses.dataclass(frozen=True, slots=True)
class Overlay:
    """A file whose header refers to others, or a block device that is made of some.

    :param directory: where it was found.
    :param references: the texts that may name what it refers to: a backing file, an external data file, or of
        a header that cannot be parsed, all that is near it. Of a block device, the files too that it is made
        of.
    :param inode: ``st_ino``.
    :param born: ``stx_btime`` in nanoseconds, or 0 if it is unknown.
    """

    path: str
    directory: SeenDirectory
    references: tuple[bytes, ...]
    inode: int
    born: int


@dataclasses.dataclass(frozen=True, slots=True)
class LinkedFile:
    """A symbolic link in a disk root that leads to a file, or a file that is mounted there.

    :param target: ``(st_dev, st_ino)`` of that file.
    """

    path: str
    directory: SeenDirectory
    target: tuple[int, int]
    inode: int


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """A file or a directory that cannot be read.

    :param cause: the error's text.
    :param is_directory: False for a file, and for a link to something that cannot be told.
    :param inode: ``st_ino``, or 0 if it is unknown.
    :param born: ``stx_btime`` in nanoseconds, or 0 if it is unknown.
    :param size: apparent bytes of a regular file, or None if it is no regular file or its size is unknown.
    :param foreign: it belongs to another user, and this one may neither list nor enter nor write it.
    :param too_deep: its path is longer than the kernel takes (PATH_MAX), so that no program opens by its path
        what is in it.
    """

    path: str
    cause: str
    is_directory: bool
    inode: int = 0
    born: int = 0
    size: int | None = None
    foreign: bool = False
    too_deep: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class DanglingLink:
    """A symbolic link that leads nowhere.

    :param target: the path that it leads to, without links; empty if that cannot be told.
    """

    path: str
    target: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceNode:
    """A node of a block device. Its device may not be there, or be another."""

    path: str


@dataclasses.dataclass(frozen=True, slots=True)
class MountPoint:
    """A path at which something is mounted, and so hides what has it in the directory."""

    path: str


@dataclasses.dataclass(frozen=True, slots=True)
class PassedOver:
    """A directory in which no disk lies, by its name. That it is not read proves nothing."""

    path: str


@dataclasses.dataclass(frozen=True, slots=True)
class MissingRoot:
    """A disk root that is not there, or cannot be read.

    :param configured: False if the configuration does not name it, but a former pass read it or another
        process of this host names it.
    """

    path: str
    cause: str
    configured: bool


@dataclasses.dataclass(frozen=True, slots=True)
class MissingInstance:
    """An instance that the driver reports on this host, and that has no directory in any disk root."""

    uuid: str


@dataclasses.dataclass(frozen=True, slots=True)
class NotADirectoryName:
    """A name that the driver reports as an instance's directory, and that cannot be one."""

    uuid: object
    name: object


@dataclasses.dataclass(frozen=True, slots=True)
class Unfinished:
    """A disk in the making, or what is left of one."""

    path: str


@dataclasses.dataclass(frozen=True, slots=True)
class Unsettled:
    """A disk root below which names changed all the while it was read, or where something was mounted."""

    path: str


Fact = (
    Overlay
    | LinkedFile
    | Unreadable
    | DanglingLink
    | DeviceNode
    | MountPoint
    | PassedOver
    | MissingRoot
    | MissingInstance
    | NotADirectoryName
    | Unfinished
    | Unsettled
)


@dataclasses.dataclass(frozen=True, slots=True)
class ReadDirectory:
    """A directory that was read to its end.

    :param entries: the inode of each name in it, as its listing has them.
    """

    seen: SeenDirectory
    entries: Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """All that a reading found.

    :param facts: in the order in which they were met.
    :param roots: which directory each disk root is that is there.
    :param directories: every directory that was read.
    :param lost: ``st_mtime_ns`` of each ``lost+found`` that was not read, by the path of its filesystem's
        top.
    """

    facts: tuple[Fact, ...]
    roots: Mapping[str, Identity]
    directories: tuple[ReadDirectory, ...]
    lost: Mapping[str, int]
