# SPDX-License-Identifier: Apache-2.0
"""What a pass sees of a host's disks and remembers: the disks, and which directories they were in.

A disk that was seen and is not seen now may have been removed, or lie on a filesystem that is not mounted
now. So each disk is remembered with the identity of its directory and of every directory above it, up to the
disk root: :mod:`imagecache_lib.upkeep.absence` says what they prove.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from imagecache_lib import model
from imagecache_lib.system import names


class Boundary(enum.StrEnum):
    """How a directory hangs in the one above it."""

    #: It is an entry of the directory above.
    NONE = ""
    #: A filesystem, or another directory of the same one, is mounted there.
    MOUNT = "mount"
    #: It was reached through a symbolic link.
    LINK = "link"


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Which directory a directory is.

    :param device: ``st_dev``, which may change at a boot.
    :param inode: ``st_ino``.
    :param fsid: a number of the filesystem that it keeps over a boot, as far as there is one: ``f_fsid`` of
        statvfs(3), or of a network filesystem, which has none, one that is made of where it is mounted from;
        0 if there is none.
    :param boundary: how it hangs in the directory above it.
    :param born: ``stx_btime`` of statx(2) in nanoseconds: a new directory may get the inode of one that was
        removed. It is 0 on a filesystem that does not keep it.
    """

    device: int
    inode: int
    fsid: int = 0
    boundary: Boundary = Boundary.NONE
    born: int = 0


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class SeenDirectory:
    """A directory that was read.

    :param path: where it was found.
    :param identity: which directory it was, or None if an older release read it and did not write that down.
    :param above: the directory in which it was found, or None for a disk root.
    """

    path: str
    identity: Identity | None
    above: SeenDirectory | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SeenDisk:
    """A disk that refers to bases.

    :param names: the bases' names.
    :param directory: the directory that it was in.
    :param inode: ``st_ino`` of the file, or 0 if it is unknown.
    :param born: ``stx_btime`` of statx(2) in nanoseconds: two files that had one inode differ in it. It is 0
        on a filesystem that does not keep it.
    :param instance: uuid of the instance whose directory it was in, as far as it was ever reported.
    """

    path: str
    names: tuple[str, ...]
    directory: SeenDirectory
    inode: int = 0
    born: int = 0
    instance: str | None = None


class LazyDisks(Mapping[str, SeenDisk], abc.ABC):
    """Disks by path that are made when they are asked for: most are seen again, and never are."""

    @abc.abstractmethod
    def elsewhere(self, disks: Mapping[str, SeenDisk]) -> Iterator[str]:
        """Yield the paths of these that others are at, in other directories."""


def elsewhere(before: Mapping[str, SeenDisk], now: Mapping[str, SeenDisk]) -> Iterator[str]:
    """Yield the paths at which disks were, and others are now, in other directories."""
    if isinstance(before, LazyDisks):
        yield from before.elsewhere(now)
        return
    for path, disk in now.items():
        known = before.get(path)
        if known is not None and known.directory.identity != disk.directory.identity:
            yield path


@dataclasses.dataclass(frozen=True)
class LastScan:
    """What the last pass of this host saw.

    :param disks: disks that refer to bases, by path.
    :param roots: which directory each disk root was.
    :param lost: ``st_mtime_ns`` of each ``lost+found`` that was not read, by the path of its filesystem's
        top.
    :param report: what the driver last reported, or None if it has not reported yet.
    :param covered: further disks at paths of these: another directory was found there since, as one is where
        a volume is not mounted, and nothing proves that what was in the first was removed.
    :param unreadable: why what was seen cannot be told, as a clause that names the file, or None if it can.
    :param report_unknown: why the last report cannot be told, likewise.
    :param data: what it was parsed from.
    :param fields: the same, as JSON's values.
    :param is_whole: the older release's form beside it says the same.
    """

    disks: Mapping[str, SeenDisk] = dataclasses.field(default_factory=dict)
    roots: Mapping[str, Identity] = dataclasses.field(default_factory=dict)
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)
    report: Sequence[model.Instance] | None = None
    covered: Sequence[SeenDisk] = ()
    unreadable: str | None = None
    report_unknown: str | None = None
    data: bytes | None = dataclasses.field(default=None, compare=False, repr=False)
    fields: Any = dataclasses.field(default=None, compare=False, repr=False)
    is_whole: bool = dataclasses.field(default=False, compare=False, repr=False)

    def all_disks(self) -> Iterator[SeenDisk]:
        """Yield each disk, several of one path among them."""
        yield from self.disks.values()
        yield from self.covered

    def without(self, path: str) -> LastScan:
        """Return this scan without what was seen at a path and below it, however that is spelled."""

        def stays(other: str) -> bool:
            return not names.is_at_or_below(other, path)

        return dataclasses.replace(
            self,
            disks={disk: seen for disk, seen in self.disks.items() if stays(disk)},
            covered=tuple(seen for seen in self.covered if stays(seen.path)),
            roots={root: identity for root, identity in self.roots.items() if stays(root)},
            lost={root: changed for root, changed in self.lost.items() if stays(root)},
        )
