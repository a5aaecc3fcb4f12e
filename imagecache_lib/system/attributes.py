# SPDX-License-Identifier: Apache-2.0
"""Extended attributes of files: what a file says of itself, and no guest that writes into it can change."""

from __future__ import annotations

import contextlib
import errno
import os

_NONE = (errno.ENODATA, errno.ENOTSUP, errno.EOPNOTSUPP)
_NOT_POSSIBLE = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EROFS)


def read(fd: int, name: str) -> str | None:
    """Return an attribute of an open file, or None if it has none or the filesystem has no attributes.

    :raises OSError: as fgetxattr(2).
    """
    try:
        return os.getxattr(fd, name).decode("utf-8", "replace")
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise


def write(fd: int, name: str, value: str) -> bool:
    """Give an open file an attribute.

    Returns False if the filesystem has no attributes, or if the file is another user's.

    :raises OSError: as fsetxattr(2).
    """
    try:
        os.setxattr(fd, name, value.encode())
    except OSError as error:
        if error.errno in _NOT_POSSIBLE:
            return False
        raise
    return True


def remove(fd: int, name: str) -> None:
    """Remove an attribute as far as that is possible."""
    with contextlib.suppress(OSError):
        os.removexattr(fd, name)
