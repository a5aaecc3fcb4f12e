# SPDX-License-Identifier: Apache-2.0
"""What a base file says of itself: its random id, which binds its record to it, and the name of its image.

Both are extended attributes of the file. :meth:`imagecache_lib.store.directory.CacheStore.record_of` compares
the id with the record's.
"""

from __future__ import annotations

import contextlib
import errno
import os

from imagecache_lib.store import layout
from imagecache_lib.system import attributes, durable

#: Letters of an image's name that are kept: as many as Glance allows.
_LONGEST_NAME = 255


def read_id(fd: int) -> str | None:
    """Return the random id that a base file carries; an empty one if it carries none.

    Returns None if the filesystem has no extended attributes.
    """
    try:
        return os.getxattr(fd, layout.ID_ATTRIBUTE).decode("ascii", "replace")
    except OSError as error:
        if error.errno == errno.ENODATA:
            return ""
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
            return None
        raise


def write_id(fd: int, base_id: str) -> bool:
    """Give a file its random id.

    Returns False if the filesystem has no extended attributes or is read-only, or if this process may not
    change the file.
    """
    try:
        os.setxattr(fd, layout.ID_ATTRIBUTE, base_id.encode())
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EROFS):
            return False
        raise
    return True


def mark(fd: int) -> str:
    """Make a base file carry a random id, if it carries none, and return the id that it carries.

    Returns an empty id if it carries none all the same: this process cannot mark a file that libvirt gave to
    QEMU's user, nor any file on a filesystem without extended attributes. Inode and size have to bind its
    record then.
    """
    carried = read_id(fd)
    if carried == "" and write_id(fd, fresh := durable.new_id()):
        return fresh
    return carried or ""


def read_name(fd: int) -> str | None:
    """Return the name that the image service had for a base file's image, or None if the file carries
    none."""
    with contextlib.suppress(OSError):
        return attributes.read(fd, layout.NAME_ATTRIBUTE) or None
    return None


def write_name(fd: int, name: object) -> None:
    """Let a base file carry the image service's name of its image, as far as there is one and that is
    possible.

    :param name: as the image service says it: nothing about it is trusted.
    """
    if not isinstance(name, str):
        return
    shown = "".join(each if each.isprintable() else "\ufffd" for each in name[:_LONGEST_NAME]).strip()
    if shown:
        with contextlib.suppress(OSError, UnicodeEncodeError):  # it is for people, and fails no fetch
            attributes.write(fd, layout.NAME_ATTRIBUTE, shown)
