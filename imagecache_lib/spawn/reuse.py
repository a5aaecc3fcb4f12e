# SPDX-License-Identifier: Apache-2.0
"""Using a disk or a file again that is there already: evacuation, rebuild, a retry."""

from __future__ import annotations

import os
import stat

from imagecache_lib import dates, errors, model
from imagecache_lib.backends.interface import StorageBackend
from imagecache_lib.store import evidence
from imagecache_lib.system.translate import translated

_SECTOR = 512


def require_reuse(target: str, if_exists: str) -> None:
    """Refuse an existing target unless it may be used again.

    :raises DiskExistsError: the target exists, and may not be used again.
    """
    if if_exists != "reuse":
        raise errors.DiskExistsError(
            "the target exists already",
            path=target,
            next_step="remove it, or ask for it to be reused (imagecache: --reuse)",
        )


def is_reused(backend: StorageBackend, target: str, if_exists: str) -> bool:
    """Whether a disk is there already, to be used again.

    :raises DiskExistsError: the disk is there, and may not be used again.
    :raises BackendError: the target cannot be one, or a crash may have taken the disk's content.
    """
    backend.check_target(target)
    if not backend.exists(target):
        return False
    require_reuse(target, if_exists)
    if not backend.ensure_durable(target):
        raise errors.BackendError(
            "the host restarted soon after the disk was made, and its content was not synced before",
            path=target,
            next_step="remove the disk and make it anew; with sync_copied_disks this cannot happen",
        )
    return True


def grown(
    backend: StorageBackend,
    target: str,
    size: int | None,
    *,
    known: evidence.Record | None,
    base: str | None,
) -> model.Disk:
    """Grow an existing disk, and return what it is now. Nothing else of it changes.

    :param size: least virtual size in bytes, or None to leave the disk as large as it is.
    :param known: the record of the base image of the disk's image, or None if the cache has none.
    :param base: where that base image is, or None likewise.
    :raises NoSpaceError, BackendError: the disk cannot be read, or does not grow; or it is smaller than its
        image, or lacks part of itself, as a copy does that was interrupted.
    """
    disk = backend.inspect(target)
    if not disk.virtual_size:
        # Grown, it would be all zeros: a guest without its data.
        raise errors.BackendError(
            "what is there is empty, and no disk", path=target, next_step="remove it, and ask again"
        )
    # What was fetched as a plain file, a disk image perhaps, says nothing of a disk's size.
    least = known.virtual_size if known is not None and known.inspected is not None else 0
    if -(-disk.virtual_size // _SECTOR) * _SECTOR < least:
        found, wanted = dates.sizes(disk.virtual_size, least)
        raise errors.BackendError(
            f"what is there has {found}, and its image {wanted}: it is cut off, or another image's",
            path=target,
            next_step="copy it again from where it came, or remove it, and ask again",
        )
    # Data in a qcow2 base may be zeros, and its tables are data themselves.
    is_told_by_holes = least > 0 and known is not None and known.stored_format == "raw"
    backend.check_content(target, base if is_told_by_holes else None)
    if size is not None and size > disk.virtual_size:
        return backend.resize(disk, size)
    return disk


def check_file(path: str, known: evidence.Record | None) -> None:
    """Refuse what cannot be a kernel or a ramdisk that was put there before.

    :param known: the record of its image's base, or None if the cache has none.
    :raises BackendError: the path is no regular file, or the file is empty, or has not its image's size.
    """
    with translated(path):
        found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        raise errors.BackendError(
            "what is there is no regular file, or empty", path=path, next_step="remove it, and ask again"
        )
    as_it_came = known is not None and known.origin is evidence.Origin.FETCHED and not known.converted
    if known is not None and as_it_came and found.st_size != known.size:
        has, wanted = dates.sizes(found.st_size, known.size)
        raise errors.BackendError(
            f"what is there has {has}, and its image {wanted}: it is cut off, or another image's",
            path=path,
            next_step="remove it, and ask again",
        )
