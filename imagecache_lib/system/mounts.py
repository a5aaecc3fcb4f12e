# SPDX-License-Identifier: Apache-2.0
"""What is mounted where, and what kind of filesystem a path is on, as proc(5) tells it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator

from imagecache_lib.system import names
from imagecache_lib.system.statx import Statx

#: How the kernel writes a space, a tab, a line feed and a backslash in a path.
_ESCAPE = re.compile(rb"\\([0-3][0-7][0-7])")

#: So many links in a path are one too many for Linux (path_resolution(7)).
_MOST_LINKS = 40

#: Filesystems that several machines may have mounted. Memory that processes map is not shared between them.
_NETWORK = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "fuse.ceph",
        "fuse.glusterfs",
        "fuse.sshfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "panfs",
        "smb3",
        "smbfs",
        "virtiofs",
    }
)


def is_network(path: str, *, mountinfo: str = "/proc/self/mountinfo") -> bool:
    """Return whether a path is on a filesystem that other machines may have mounted too.

    Returns False if that cannot be told.

    :param mountinfo: the file that lists the mounts.
    """
    try:
        device = os.stat(path).st_dev
        with open(mountinfo, encoding="utf-8", errors="replace") as stream:
            return is_listed_as_network(stream.read(), device)
    except OSError:
        return False


def is_listed_as_network(listing: str, device: int) -> bool:
    """Whether a list of mounts in the form of proc(5)'s mountinfo has a device as a network filesystem."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in listing.splitlines():
        mount, _separator, filesystem = line.partition(" - ")
        if mount.split()[2:3] == [wanted]:
            return filesystem.split()[:1] != [] and filesystem.split()[0] in _NETWORK
    return False


def table(*, mountinfo: str = "/proc/self/mountinfo") -> tuple[tuple[str, bytes], ...]:
    """Return the paths at which something is mounted, without links, each with what tells that mount from
    others there, as far as that can be told.

    None of them is looked at: its server may be gone.
    """
    try:
        with open(mountinfo, "rb") as stream:
            # Its number, that of the one above it, its device and which directory of that it shows.
            found = [line.split()[:5] for line in stream if line.count(b" ") > 4]
    except OSError:
        return ()
    return tuple((os.fsdecode(_ESCAPE.sub(_octal, each[4])), b" ".join(each[:4])) for each in found)


def points(*, mountinfo: str = "/proc/self/mountinfo") -> tuple[str, ...]:
    """Return the paths at which something is mounted, as :func:`table` has them."""
    return tuple(path for path, _which in table(mountinfo=mountinfo))


def _octal(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 8)])


def of(path: str, mounted: Collection[str]) -> str:
    """Return where the filesystem is mounted that a path leads to, as far as can be told without waiting.

    Links on the host's own filesystem are followed, which always answers: nothing works without it. Any other
    is not looked at, so that a link there may lead to another.

    :param path: absolute.
    :param mounted: what :func:`points` returned.
    """
    found, pending, links = "/", path.split("/")[::-1], 0
    real = ""
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            real = os.path.dirname(real)
            continue
        real = f"{real.rstrip('/')}/{part}"
        found = _longest(real, mounted)
        if found != "/":
            inner = _longest(os.path.normpath("/".join((real, *reversed(pending)))), mounted)
            return inner if names.is_at_or_below(inner, found) else found
        try:
            target = os.readlink(real)
        except (OSError, ValueError):
            continue
        links += 1
        if links > _MOST_LINKS:
            break
        real = "" if target.startswith("/") else os.path.dirname(real)
        pending += target.split("/")[::-1]
    return found


def _longest(path: str, mounted: Iterable[str]) -> str:
    """Return the longest of the mount points that a path is at or below by name."""
    return max((point for point in mounted if names.is_at_or_below(path, point)), key=len, default="/")


def below(directory: str, real: str, mounted: Iterable[str]) -> Iterator[str]:
    """Yield the paths below a directory at which something is mounted, as they are spelled by its own.

    :param real: the directory's path without links.
    :param mounted: what :func:`points` returned.
    """
    prefix, top = os.path.join(real, ""), os.path.join(directory, "")
    return (top + point[len(prefix) :] for point in mounted if point.startswith(prefix) and point != prefix)


def between(directory: str, tops: Collection[str]) -> str | None:
    """Return the path at which a filesystem is mounted that a directory is on, and none of the directories
    above it by name is; or None if there is none, or it is the whole host's.

    :param directory: an existing one. A link may have led to it.
    :param tops: paths of directories, one of which leads to it.
    """
    statx = Statx()
    mount = statx.mount_at(directory)
    if mount is None or any(statx.mount_at(top) == mount for top in tops):
        return None
    path = names.real_directory(directory)
    while path != "/" and statx.mount_at(os.path.dirname(path)) == mount:
        path = os.path.dirname(path)
    return path if path != "/" else None
