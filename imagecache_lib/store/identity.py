# SPDX-License-Identifier: Apache-2.0
"""Asking the kernel which directory a directory is."""

from __future__ import annotations

import os

from imagecache_lib.store.seen import Boundary, Identity, SeenDirectory
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.filesystem_id import FilesystemIds
from imagecache_lib.system.statx import Statx

#: Nothing but its inode is asked for, so that no right to list it is needed.
_LOOK = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def identity_of(
    fd: int,
    status: os.stat_result,
    filesystems: FilesystemIds,
    statx: Statx,
    boundary: Boundary,
    above: SeenDirectory | None,
) -> Identity:
    """Return what tells an open directory from any other.

    :param boundary: what led to it, if that is no mount.
    :param above: the directory that it is in, or None for a disk root.
    """
    is_mount, born = statx.mount_and_birth(fd)
    if boundary is Boundary.NONE and above is not None and above.identity is not None:
        other = status.st_dev != above.identity.device
        boundary = Boundary.MOUNT if is_mount or other else boundary
    return Identity(status.st_dev, status.st_ino, filesystems.of(fd, status.st_dev), boundary, born)


def identity_now(path: str, known: Identity | None) -> Identity:
    """Return which directory a disk root is now. Cheap, if it is the one that it was.

    :param known: which one it was, or None if that is unknown.
    :raises OSError: there is none, or it cannot be looked at.
    """
    # An automount point that is opened so by its own name is not mounted by that (open(2), O_PATH).
    with Descriptor(f"{path}/.", _LOOK) as fd:
        status, statx = os.fstat(fd), Statx()
        born = statx.born(fd)
        # A device's number may be given to another filesystem, whose top may have the same inode. Where it is
        # unknown when that was born, the filesystem is asked for its own id: a network filesystem's server.
        found = (status.st_dev, status.st_ino, born)
        if born and known is not None and found == (known.device, known.inode, known.born):
            return known
        return identity_of(fd, status, FilesystemIds(), statx, Boundary.NONE, None)
