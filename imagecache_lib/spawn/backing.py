# SPDX-License-Identifier: Apache-2.0
"""What an existing overlay needs: reading a header that a guest may have written."""

from __future__ import annotations

import errno
import os
import stat

from imagecache_lib import errors, layout
from imagecache_lib.qcow2 import header as qcow2_header

_HEADER_BYTES = 65536


def wanted(disk_path: str, image_id: str, where: layout.Layout) -> str | None:
    """Return the format that a disk's header demands of its base. None: it has no base.

    :raises BackendError: the disk cannot be read, or its header names anything but this image's base in
        this cache, with a format.
    """
    try:
        # A FIFO in the disk's place must not make us wait for a writer.
        fd = os.open(disk_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            header = qcow2_header.parse(file.read(_HEADER_BYTES))
    except qcow2_header.NotQcow2:
        return None
    except (OSError, ValueError, qcow2_header.HeaderError) as error:
        raise errors.BackendError(
            f"the disk cannot be read: {error}", image=image_id, path=disk_path, next_step="check the disk"
        ) from error
    if header.backing_file is None:
        return None
    named = os.fsdecode(header.backing_file)
    base = where.base(layout.base_name(image_id))
    if not os.path.isabs(named) or "\0" in named or not _same_place(named, base):
        raise errors.BackendError(
            f"its header names {named!r}, which is not this image's base image {base!r}",
            image=image_id,
            path=disk_path,
            next_step="find out where the disk came from; rebase it if it is trusted",
        )
    if header.backing_format is None:
        raise errors.BackendError(
            "its header does not say which format its base image has, so that a guest could choose it",
            image=image_id,
            path=disk_path,
            next_step="rebase it with an explicit backing format",
        )
    return header.backing_format.decode("ascii", "replace")


def _same_place(one: str, other: str) -> bool:
    """Whether two paths name one entry of one directory, however the directory is reached."""
    if os.path.basename(one) != os.path.basename(other):
        return False
    return os.path.realpath(os.path.dirname(one)) == os.path.realpath(os.path.dirname(other))
