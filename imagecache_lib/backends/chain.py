# SPDX-License-Identifier: Apache-2.0
"""What lies under an overlay, from what this cache knows: its header only says which base is meant."""

from __future__ import annotations

import os

from imagecache_lib import errors
from imagecache_lib.formats.qcow2.header import Header
from imagecache_lib.formats.qemu_img import DiskFile
from imagecache_lib.store import layout
from imagecache_lib.store.directory import CacheStore


def stated(target: str, header: Header, cache: CacheStore) -> DiskFile:
    """Return an overlay with its base as qemu-img is to open them.

    The base is the file that the cache has under that name. Its format is what its record says, and the
    header must say the same, since the guest has read it as that.

    :param header: the overlay's.
    :raises BackendError: the header means anything but a base of this cache, or it does not say the format.
    """
    if header.backing_file is None:
        return DiskFile(target, "qcow2")
    named = os.fsdecode(header.backing_file)
    name = os.path.basename(named)
    base = cache.layout.base(name)
    if layout.classify(name) in (layout.Kind.UNKNOWN, layout.Kind.FOREIGN_STAGE) or not _same_place(
        os.path.join(os.path.dirname(target), named), base
    ):
        raise errors.BackendError(
            f"its header names {named!r}, which is no base image in {cache.layout.base_path!r}",
            path=target,
            next_step="find out where the disk came from; rebase it if it is trusted",
        )
    said = None if header.backing_format is None else header.backing_format.decode("ascii", "replace")
    record = cache.evidence_of(name)
    format = said if record is None else record.stored_format
    if format is None or said not in (None, format):
        raise errors.BackendError(
            f"its header says {said or 'nothing'} of the format of its base image"
            + ("" if format is None else f", which is {format}"),
            path=target,
            next_step="rebase it with an explicit backing format, after finding out what its guest has read",
        )
    return DiskFile(target, "qcow2", DiskFile(base, format))


def _same_place(one: str, other: str) -> bool:
    """Whether two paths name one entry of one directory, however the directory is reached."""
    return os.path.realpath(os.path.dirname(one)) == os.path.realpath(os.path.dirname(other))
