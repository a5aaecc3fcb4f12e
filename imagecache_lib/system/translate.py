# SPDX-License-Identifier: Apache-2.0
"""What the kernel says, in the library's errors."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
from collections.abc import Iterator

from imagecache_lib import errors


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn an ``OSError`` of the body into one of the library's errors.

    :param path: what the body works on, for the message.
    :raises NoSpaceError: the filesystem or a quota is full.
    :raises BackendError: for any other ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise errors.NoSpaceError(
                "the filesystem is full", path=path, next_step="make room, then ask again"
            ) from error
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path
        if error.errno in (errno.EACCES, errno.EPERM):
            raise errors.BackendError(
                f"permission denied for {_user()}",
                path=where,
                next_step="run as the service's user, or correct the owner and mode",
            ) from error
        raise errors.BackendError(
            f"the filesystem failed: {error.strerror or error}",
            path=where,
            next_step="check the disk and its mount options, then ask again",
        ) from error


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"
