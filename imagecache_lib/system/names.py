# SPDX-License-Identifier: Apache-2.0
"""What names lead to: by what the server says, and not by what this host's kernel remembers of it.

A client of a network filesystem answers stat(2) and open(2) of a name for a while from what it knew (NFS's
``acdirmin``, the ``entry_timeout`` of FUSE, GlusterFS and CephFS). The listing of a directory comes from the
server: NFS validates a directory when it is opened, and FUSE keeps no listings.
"""

from __future__ import annotations

import ctypes
import os

from imagecache_lib import errors
from imagecache_lib.system.descriptor import Descriptor

#: ``f_type`` of statfs(2) of filesystems that no other host changes, from linux/magic.h.
_LOCAL = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x2FC12FC1,  # zfs
        0x794C7630,  # overlayfs
        0xF2F52010,  # f2fs
        0xCA451A4E,  # bcachefs
        0x3153464A,  # jfs
        0x52654973,  # reiserfs
        0x4D44,  # vfat
        0x2011BAB0,  # exfat
        0x7366746E,  # ntfs3
    }
)

_libc = ctypes.CDLL(None, use_errno=True)

#: Room for struct statfs, which has 120 bytes. ctypes makes a type for each such request, if none is kept.
_Statfs = ctypes.c_char * 256


def require_path(path: object) -> None:
    """Refuse what can be no path of a file.

    :raises BackendError: it is no text, or empty, or holds what the kernel takes in no path.
    """
    try:
        possible = isinstance(path, str) and path != "" and "\0" not in path and os.fsencode(path) != b""
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise errors.BackendError(
            f"{errors.shown(path)} can be no path of a file", next_step="give the absolute path, as text"
        )


def is_at_or_below(path: str, top: str) -> bool:
    """Whether an absolute path is another one, or below it, however both are spelled. No link is followed."""
    plain, above = _plain(path), _plain(top)
    return plain == above or plain.startswith(above.rstrip("/") + "/")


def _plain(path: str) -> str:
    # POSIX lets two slashes at the beginning mean something else, which Linux does not.
    return "/" + os.path.normpath(path).lstrip("/")


def real_directory(path: str) -> str:
    """Return a directory's path without symbolic links, as :func:`os.path.realpath` does.

    The kernel is asked for it (proc_pid_fd(5)), which takes a third of the time of a look at each part of the
    path. Where it cannot tell, each part is looked at.
    """
    try:
        with Descriptor(path, os.O_PATH | os.O_DIRECTORY) as fd:
            real = os.readlink(f"/proc/self/fd/{fd}")
            if os.path.samestat(os.stat(real), os.fstat(fd)):
                return real
    except OSError:
        pass  # it cannot be opened, there is no /proc, or it says that the directory was removed
    return os.path.realpath(path)


def may_be_stale(fd: int) -> bool:
    """Whether another host may change the filesystem of an open file. True if that cannot be told."""
    answer = _Statfs()
    if _libc.fstatfs(fd, answer) != 0:
        return True
    return ctypes.c_ulong.from_buffer(answer).value not in _LOCAL


def may_be_there(path: str) -> bool:
    """Whether a file may be at a path though open(2) just found none: its directory lists it, and the
    kernel's word does not count.

    :raises OSError: the directory cannot be listed.
    """
    directory, name = os.path.split(path)
    try:
        # It may be one in which this user finds names, and which it must not list.
        with Descriptor(directory, os.O_PATH | os.O_DIRECTORY) as fd:
            return may_be_stale(fd) and name in os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_listed(directory: str, name: str, inode: int, *, known: str) -> bool:
    """Whether the listing of a directory has a name, for a file of that inode number.

    :param known: another name in the directory. Where its listed inode number is not that of stat(2), the
        filesystem lists other numbers, and the name alone counts.
    :raises OSError: the directory cannot be listed.
    """
    found: dict[str, int] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name in (name, known):
                found[entry.name] = entry.inode()
                if len(found) == len({name, known}):
                    break
    if name not in found:
        return False
    tells = found.get(known) == os.stat(os.path.join(directory, known), follow_symlinks=False).st_ino
    return found[name] == inode or not tells
