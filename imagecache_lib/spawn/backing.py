# SPDX-License-Identifier: Apache-2.0
"""What an existing overlay needs: reading a header that a guest may have written."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import struct

from imagecache_lib import errors
from imagecache_lib.formats import superblock
from imagecache_lib.formats.qcow2 import header as qcow2_header
from imagecache_lib.formats.qcow2.header import Header, HeaderError, NotQcow2
from imagecache_lib.store import layout

_HEADER_BYTES = 65536

#: Of an entry of the L1 and L2 tables, from QEMU's docs/interop/qcow2.rst.
_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62


@dataclasses.dataclass(frozen=True)
class Backing:
    """The base that a disk needs.

    :param name: its name in the cache.
    :param format: the format it must have, by QEMU's name.
    :param disk_size: the disk's own virtual size in bytes.
    """

    name: str
    format: str
    disk_size: int


def wanted(disk_path: str, image_id: str | None, where: layout.Layout) -> Backing | None:
    """Return what a disk's header demands of its base. None: it has no base.

    :param image_id: the image that the disk was made from. None: it is a swap or an ephemeral disk.
    :raises BackendError: the disk cannot be read, or its header names anything but this image's base, or a
        swap or ephemeral base, in this cache, with a format.
    """
    try:
        # A FIFO in the disk's place must not make us wait for a writer.
        fd = os.open(disk_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            header = qcow2_header.parse(file.read(_HEADER_BYTES))
    except NotQcow2:
        return None
    except (OSError, ValueError, HeaderError) as error:
        raise errors.BackendError(
            f"the disk cannot be read: {error}", image=image_id, path=disk_path, next_step="check the disk"
        ) from error
    if header.backing_file is None:
        return None
    name = _cached(os.fsdecode(header.backing_file), disk_path, image_id, where)
    if header.backing_format is None:
        raise errors.BackendError(
            "its header does not say which format its base image has, so that a guest could choose it",
            image=image_id,
            path=disk_path,
            next_step="rebase it with an explicit backing format",
        )
    return Backing(name, header.backing_format.decode("ascii", "replace"), header.virtual_size)


def _cached(named: str, disk_path: str, image_id: str | None, where: layout.Layout) -> str:
    """Return the name in the cache that a header's path means."""
    name = os.path.basename(named)
    if image_id is not None:
        expected = f"this image's base image {where.base(layout.base_name(image_id))!r}"
        right = name == layout.base_name(image_id)
    else:
        expected = f"a swap or ephemeral base in {where.base_path!r}"
        right = layout.classify(name) in (layout.Kind.SWAP, layout.Kind.EPHEMERAL)
    if not right or not os.path.isabs(named) or "\0" in named or not _same_place(named, where.base(name)):
        raise errors.BackendError(
            f"its header names {named!r}, which is not {expected}",
            image=image_id,
            path=disk_path,
            next_step="find out where the disk came from; rebase it if it is trusted",
        )
    return name


def check_made_on(disk_path: str, base_fd: int) -> None:
    """Refuse an overlay on a filesystem that was made on another base of the same name.

    Nova's bases have a UUID of their own each. A guest's writes on one of them, over the metadata of another,
    are a broken filesystem without any error. Once it was mounted, the overlay has a superblock that tells;
    before that, one base is as good as another. A guest that made a new filesystem gave it its own label.

    :param base_fd: the base that is here.
    :raises BackendError: it was, or the disk cannot be read.
    """
    try:
        with open(disk_path, "rb") as file:
            head = _first_cluster(file.fileno(), qcow2_header.parse(file.read(_HEADER_BYTES)))
        made_on, here = superblock.read(head), superblock.read(os.pread(base_fd, superblock.LENGTH, 0))
    except (OSError, struct.error, HeaderError) as error:
        raise errors.BackendError(
            f"the disk cannot be read: {error}", path=disk_path, next_step="check the disk"
        ) from error
    if made_on is None or here is None or made_on.identity == here.identity:
        return
    if (made_on.kind, made_on.label) == (here.kind, here.label):
        raise errors.BackendError(
            "it was made on another host's base of the same name, whose filesystem is not the one here",
            path=disk_path,
            next_step="flatten it on the host that it came from, and move it again",
        )


def _first_cluster(fd: int, header: Header) -> bytes:
    """Return what an overlay itself has of its first cluster: nothing, if that is the base's."""
    at = header.l1_table_offset
    for _level in ("L1", "L2"):
        (entry,) = struct.unpack(">Q", os.pread(fd, 8, at))
        at = entry & _OFFSET
        if not at or entry & _COMPRESSED:
            return b""
    return os.pread(fd, min(superblock.LENGTH, header.cluster_size), at)


def _same_place(one: str, other: str) -> bool:
    """Whether two paths name one entry of one directory, however the directory is reached."""
    if os.path.basename(one) != os.path.basename(other):
        return False
    return os.path.realpath(os.path.dirname(one)) == os.path.realpath(os.path.dirname(other))
