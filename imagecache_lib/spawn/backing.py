# SPDX-License-Identifier: Apache-2.0
"""What an existing overlay needs: reading a header that a guest may have written."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import stat
import struct

from imagecache_lib import errors
from imagecache_lib.backends.chain import HEADER_BYTES, Chain, ChainReader
from imagecache_lib.config import CacheConfig
from imagecache_lib.formats import superblock
from imagecache_lib.formats.qcow2 import header as qcow2_header
from imagecache_lib.formats.qcow2.header import Header, HeaderError, NotQcow2
from imagecache_lib.formats.superblock import Signature
from imagecache_lib.ingest.generation import (
    GIB,
    IDENTITIES,
    LABEL,
    MIB,
    Generation,
    can_be_shared,
    filesystem,
)
from imagecache_lib.store import layout
from imagecache_lib.system.descriptor import Descriptor

#: Of an entry of the L1 and L2 tables, from QEMU's docs/interop/qcow2.rst.
_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62

#: What a driver labels the filesystems that it makes; guests give theirs another label.
_OUR_LABELS = re.compile(r"ephemeral\d+")

#: Filesystems that earlier releases made under a name of its own, and nothing else under that name.
_EARLIER = ("ext4", "ext3")


@dataclasses.dataclass(frozen=True)
class Backing:
    """The base that a disk needs.

    :param name: its name in the cache.
    :param format: the format it must have, by QEMU's name.
    :param disk_size: the disk's own virtual size in bytes.
    :param seen: the filesystem that the disk itself shows, once its guest mounted or made one. Not looked for
        in an image's disk.
    :param untouched: the guest wrote nothing. Not looked for in an image's disk.
    """

    name: str
    format: str
    disk_size: int
    seen: Signature | None = None
    untouched: bool = False


def wanted(disk_path: str, image_id: str | None, chains: ChainReader, where: layout.Layout) -> Backing | None:
    """Return what a disk's header, or that of an overlay under it, demands of its base, or None without one.

    :param image_id: the image that the disk was made from, or None for a swap or an ephemeral disk.
    :raises BackendError: the disk cannot be read, or its header names anything but this image's base, or a
        swap or ephemeral base, in this cache, with a format.
    """
    try:
        # A FIFO in the disk's place must not make us wait for a writer.
        with Descriptor(disk_path, os.O_RDONLY | os.O_NONBLOCK) as fd:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            header = qcow2_header.parse(os.read(fd, HEADER_BYTES))
        chain = chains.read(disk_path, header)
        seen, untouched = (None, False) if image_id is not None else _shown_by(chain)
    except NotQcow2:
        return None
    except errors.BackendError as error:
        error.image = image_id
        raise
    except (OSError, ValueError, struct.error, HeaderError) as error:
        raise errors.BackendError(
            f"the disk cannot be read: {error}", image=image_id, path=disk_path, next_step="check the disk"
        ) from error
    if chain.base is None:
        return None
    _require_expected(chain.base, disk_path, image_id, where)
    if chain.base_format is None:
        raise errors.BackendError(
            "its header does not say which format its base image has, so that a guest could choose it",
            image=image_id,
            path=disk_path,
            next_step="rebase it with an explicit backing format",
        )
    return Backing(chain.base, chain.base_format, header.virtual_size, seen, untouched)


def generation(
    needed: Backing,
    disk_path: str,
    *,
    os_type: str | None = None,
    fs: str | None = None,
    label: str | None = None,
    config: CacheConfig,
) -> Generation:
    """Return what an existing overlay on a swap or ephemeral base was made on.

    A base that is there has to be that, and one that is not there is made if every host makes it alike. The
    filesystem is what the caller says, or what the overlay shows of it. The name of its base does not tell.

    :param os_type: the guest's type that the disk was asked for with, or None if the caller does not know it.
    :param fs: the filesystem, likewise.
    :param label: the label, likewise.
    :raises BackendError: this library makes no overlay like that; or the disk shows another filesystem than
        the guest's type stands for.
    """
    is_swap = layout.classify(needed.name) is layout.Kind.SWAP
    size = int(needed.name.split("_")[1]) * (MIB if is_swap else GIB)
    # The disk was made as large as its base, and only ever grown. A guest that made the header up would
    # otherwise choose how much the cache holds.
    if needed.format != "raw" or not 0 < size <= needed.disk_size:
        raise errors.BackendError(
            f"its header wants the base {needed.name} as {needed.format} under {needed.disk_size} bytes",
            path=disk_path,
            next_step="find out where the disk came from; make it anew",
        )
    if is_swap:
        return Generation(needed.name, size, "swap", shared=True, publishable=True)
    told = fs is not None or os_type is not None
    kind = filesystem(os_type, fs, config) if told else _shown(needed, size, label)
    doubt = _contradiction(needed, kind, label)
    if doubt is not None and fs is None:
        raise errors.BackendError(
            doubt.cause,
            path=disk_path,
            next_step="ask with fs, and name the filesystem that its base was made with",
        )
    unfit = doubt or _obstacle(needed, kind, label, told=told)
    impossible = None if unfit is None else _cannot_be_made(unfit.cause, disk_path)
    return Generation(needed.name, size, kind, shared=True, publishable=True, impossible=impossible)


def _shown(needed: Backing, size: int, label: str | None) -> str | None:
    """Return the filesystem of the base as the overlay shows it, or None if the overlay does not show it."""
    if needed.seen is not None:
        return needed.seen.kind if _is_bases(needed.seen, label) else None
    if needed.untouched:
        # Whichever filesystem it gets, nothing of the guest is lost: it gets the one that it was made on, if
        # an earlier release made it.
        return next((fs for fs in _EARLIER if layout.ephemeral_name(size // GIB, fs) == needed.name), None)
    return None


def _is_bases(seen: Signature, label: str | None) -> bool:
    """Whether a filesystem in an overlay is the one of its base, and not one that its guest made."""
    return seen.label is not None and (seen.label == label or _OUR_LABELS.fullmatch(seen.label) is not None)


@dataclasses.dataclass(frozen=True)
class _Unfit:
    """A base cannot be what is asked for. ``cause`` says why, as a clause."""

    cause: str


def _contradiction(needed: Backing, kind: str | None, label: str | None) -> _Unfit | None:
    """Return how the overlay contradicts what its base is said to be, or None if it does not."""
    seen = needed.seen
    if seen is None or kind is None or seen.kind == kind or not _is_bases(seen, label):
        return None
    return _Unfit(
        f"it holds {seen.kind} with the label {seen.label!r}, and is said to have been made on {kind}"
    )


def _obstacle(needed: Backing, kind: str | None, label: str | None, *, told: bool) -> _Unfit | None:
    """Return why no host can make the base of an overlay anew, or None if every host can."""
    if kind is None and told:
        return _Unfit(
            "an operator's command made it, and nothing tells whether that would make the same again"
        )
    if kind is None:
        return _Unfit(
            "nothing tells which filesystem it had: say so with os_type or fs, as the disk was asked for"
        )
    if not can_be_shared(kind):
        return _Unfit(f"no two hosts make {kind} alike")
    if label not in (None, LABEL):
        return _Unfit(f"its label is {label!r}, and only {LABEL!r} is the same on every host")
    seen = needed.seen
    if seen is None or seen.kind != kind or not _is_bases(seen, label):
        return None
    if seen.identity == IDENTITIES[kind]:
        return None
    return _Unfit("it is another host's, whose filesystem no other host can make")


def _cannot_be_made(cause: str, disk_path: str) -> errors.BackendError:
    return errors.BackendError(
        f"its base is not here and cannot be made: {cause}",
        path=disk_path,
        next_step="copy the base from the host that the disk came from, or flatten the disk there and move it"
        " again",
    )


def _require_expected(name: str, disk_path: str, image_id: str | None, where: layout.Layout) -> None:
    """Refuse a base that the caller did not ask for."""
    if image_id is not None:
        expected = f"this image's base image {where.base(layout.base_name(image_id))!r}"
        original, _, resized = name.partition("_")
        right = original == layout.base_name(image_id) and (
            not resized or layout.classify(name) is layout.Kind.RESIZED
        )
    else:
        expected = f"a swap or ephemeral base in {where.base_path!r}"
        right = layout.classify(name) in (layout.Kind.SWAP, layout.Kind.EPHEMERAL)
    if not right:
        raise errors.BackendError(
            f"its header names {where.base(name)!r}, which is not {expected}",
            image=image_id,
            path=disk_path,
            next_step="find out where the disk came from; rebase it if it is trusted",
        )


def check_made_on(disk_path: str, base_fd: int, chains: ChainReader) -> None:
    """Refuse an overlay on a filesystem that was made on another base of the same name.

    Nova's bases have a UUID of their own each. A guest's writes on one of them, over the metadata of another,
    are a broken filesystem without any error. Once it was mounted, the overlay has a superblock that tells;
    before that, one base is as good as another. A guest that made a new filesystem gave it its own label.

    :param base_fd: the base that is here.
    :raises BackendError: the overlay was made on another base, or the disk cannot be read.
    """
    try:
        with open(disk_path, "rb") as file:
            header = qcow2_header.parse(file.read(HEADER_BYTES))
        made_on, _ = _shown_by(chains.read(disk_path, header))
        here = superblock.read(os.pread(base_fd, superblock.LENGTH, 0))
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


def _shown_by(chain: Chain) -> tuple[Signature | None, bool]:
    """Return the filesystem that overlays show of themselves, and whether nothing was written into them."""
    untouched = True
    for layer in chain.layers:
        with open(layer.path, "rb") as file:
            head = _first_cluster(file.fileno(), layer.header)
            # What an internal snapshot has is the guest's too.
            untouched &= not layer.header.snapshot_count and _is_empty(file.fileno(), layer.header)
        if head:
            return superblock.read(head), False
    return None, untouched


def _is_empty(fd: int, header: Header) -> bool:
    """Whether an overlay maps nothing at all. The parser bounds the L1 table's length."""
    return not any(os.pread(fd, header.l1_size * 8, header.l1_table_offset))


def _first_cluster(fd: int, header: Header) -> bytes:
    """Return what an overlay itself has of its first cluster: nothing, if that is the base's."""
    at = header.l1_table_offset
    for _level in ("L1", "L2"):
        (entry,) = struct.unpack(">Q", os.pread(fd, 8, at))
        at = entry & _OFFSET
        if not at or entry & _COMPRESSED:
            return b""
    return os.pread(fd, min(superblock.LENGTH, header.cluster_size), at)
