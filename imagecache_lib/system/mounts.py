# SPDX-License-Identifier: Apache-2.0
"""What kind of filesystem a path is on, as proc(5) tells it."""

from __future__ import annotations

import os

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
