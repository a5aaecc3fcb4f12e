# SPDX-License-Identifier: Apache-2.0
"""What the kernel says, in the library's errors."""

from __future__ import annotations

import errno
import os
import pwd
from types import TracebackType

from imagecache_lib import errors
from imagecache_lib.system.durable import FixedDirectory


class translated:
    """Turn an ``OSError`` of the body of a ``with`` statement into one of the library's errors.

    A class and no generator: a spawn enters it ten times.

    :param path: what the body works on, for the message.
    :raises NoSpaceError: the filesystem or a quota is full.
    :raises BackendError: for any other ``OSError``.
    """

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Begin the body."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise _translation(error, self._path) from error


#: What the kernel says where something else has a file's or a directory's name.
_ODD = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENOTEMPTY)


def odd_entry(error: OSError, path: str) -> errors.BackendError | None:
    """Return the library's error if something else than a file, or a directory, has a name that was used.

    Returns None if that is not why a call failed.

    :param path: what was used, where the kernel does not say it. The error names what is in the way.
    """
    if error.errno not in (*_ODD, errno.ENOENT):
        return None  # no look at what may not answer: the filesystem has just failed
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path
    in_the_way = _no_directory_above(where)
    if error.errno == errno.ENOENT and in_the_way is None:
        return None
    return errors.BackendError(
        f"something else is in the place of what belongs there: {error.strerror or error}",
        path=in_the_way or where,
        next_step="find out who put it there and move it away, then ask again",
    )


def _no_directory_above(path: str) -> str | None:
    """Return what is no directory above a path, a link that leads nowhere included, or None if all are."""
    above = os.path.dirname(path)
    found = None
    while above not in ("", "/") and not os.path.isdir(above):
        if os.path.lexists(above):
            found = above
        above = os.path.dirname(above)
    return found


#: What the kernel says where a process, or all of them, have as much as they may have.
_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def _translation(error: OSError, path: str) -> errors.ImageCacheError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(path, quota=error.errno == errno.EDQUOT)
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path
    if isinstance(error, FixedDirectory):
        return errors.BackendError(
            str(error.strerror),
            path=where,
            next_step="take the attribute away (lsattr -d shows it, chattr -a or -i), then ask again",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return errors.BackendError(
            f"permission denied for {_user()}",
            path=where,
            next_step="run as the service's user, or correct the owner and mode",
        )
    if error.errno in _LIMITS:
        return errors.BackendError(
            f"a limit of this process or of the host was met: {error.strerror or error}",
            path=where,
            next_step="look at the service's own limits (ulimit -a); another host may do it",
        )
    if error.errno == errno.EFBIG:
        return errors.BackendError(
            "it may have no file of that size",
            path=where,
            next_step="look at the service's own limit (ulimit -f, LimitFSIZE) and at that of the filesystem",
        )
    if error.errno == errno.EXDEV:
        return errors.BackendError(
            "parts of one directory are on different filesystems",
            path=where,
            next_step="take away what is mounted or linked between them: files are renamed and linked there",
        )
    if (odd := odd_entry(error, path)) is not None:
        return odd
    return errors.BackendError(
        f"the filesystem failed: {error.strerror or error}",
        path=where,
        next_step="check the disk and its mount options, then ask again",
    )


def no_space(path: str, *, quota: bool) -> errors.NoSpaceError:
    """Return the error for a write that found no room.

    :param quota: whether it is a quota that is used up, and not the filesystem.
    """
    if quota:
        return errors.NoSpaceError(
            "a quota is used up", path=path, next_step="make room or raise the quota, then ask again"
        )
    return errors.NoSpaceError("the filesystem is full", path=path, next_step="make room, then ask again")


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"
