# SPDX-License-Identifier: Apache-2.0
"""What the kernel says, in the library's errors."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from imagecache_lib import errors


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn what the filesystem says into the library's errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise errors.NoSpaceError(
                "the filesystem is full", path=path, next_step="make room, then ask again"
            ) from error
        raise errors.BackendError(
            f"the filesystem failed: {error.strerror or error}",
            path=path,
            next_step="check the disk and its mount options, then ask again",
        ) from error
