# SPDX-License-Identifier: Apache-2.0
"""Empty qcow2 overlays, written natively: four clusters and a hole, in microseconds instead of a process.

The layout is QEMU's own (docs/interop/qcow2.rst): header, refcount table, refcount blocks, L1 table, in
this order, each from a new cluster. An empty L1 maps nothing, so every read goes to the backing file.
"""

from __future__ import annotations

import dataclasses
import os
import struct

from imagecache_lib import dates, errors
from imagecache_lib.formats.qcow2 import header

#: QEMU's default cluster size.
DEFAULT_CLUSTER_BITS = 16

_REFCOUNT_ORDER = 4
_REFCOUNT_BYTES = 2
_HEADER_LENGTH = 112


class OverlayError(errors.BackendError):
    """No qcow2 overlay can be made like this; the cause says which limit stands against it."""


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the metadata lies, counted in clusters."""

    cluster_bits: int
    refcount_table_clusters: int
    refcount_blocks: int
    l1_entries: int
    l1_clusters: int

    @property
    def l1_at(self) -> int:
        return 1 + self.refcount_table_clusters + self.refcount_blocks

    @property
    def clusters(self) -> int:
        return self.l1_at + self.l1_clusters


def write_overlay(
    fd: int,
    virtual_size: int,
    backing_file: str,
    backing_format: str,
    *,
    cluster_bits: int = DEFAULT_CLUSTER_BITS,
) -> None:
    """Write an empty version 3 overlay into an empty file. Nothing is synced.

    :param fd: open for writing; the file must be empty, because zeros are left as holes.
    :param virtual_size: bytes the guest sees; a multiple of 512.
    :param backing_file: goes into the header as it is; a relative one counts from the overlay's directory.
    :param backing_format: QEMU's name of the backing file's format, so that no guest can choose how its
        backing file is read.
    :param cluster_bits: 9 to 21; the cluster size is ``1 << cluster_bits``.
    :raises OverlayError: the path is longer than 1,023 bytes or than the cluster allows, the size is not a
        multiple of 512, or the clusters are too small for the size.
    :raises OSError: the file cannot be written.
    """
    layout = _plan(virtual_size, cluster_bits)
    start = _first_cluster(layout, virtual_size, os.fsencode(backing_file), backing_format.encode())
    cluster_size = 1 << cluster_bits
    _write(fd, start, 0)
    blocks_at = 1 + layout.refcount_table_clusters
    table = struct.pack(
        f">{layout.refcount_blocks}Q",
        *((blocks_at + index) << cluster_bits for index in range(layout.refcount_blocks)),
    )
    _write(fd, table, cluster_size)
    # One reference for every metadata cluster, none for what comes after: the blocks are contiguous.
    _write(fd, struct.pack(">H", 1) * layout.clusters, blocks_at << cluster_bits)
    os.ftruncate(fd, layout.clusters << cluster_bits)


def _plan(virtual_size: int, cluster_bits: int) -> _Layout:
    entries = l1_entries(virtual_size, cluster_bits)
    l1_clusters = -(-entries * 8 >> cluster_bits)
    table_clusters, blocks = refcount_clusters(1 + l1_clusters, cluster_bits)
    return _Layout(cluster_bits, table_clusters, blocks, entries, l1_clusters)


def l1_entries(virtual_size: int, cluster_bits: int) -> int:
    """Return how many entries the L1 table of a disk has.

    :raises OverlayError: no qcow2 disk can have this size with these clusters.
    """
    if not header.MIN_CLUSTER_BITS <= cluster_bits <= header.MAX_CLUSTER_BITS:
        raise OverlayError(f"a qcow2 cluster cannot have 2**{cluster_bits} bytes")
    if virtual_size < 0 or virtual_size % 512:
        raise OverlayError(f"a qcow2 disk of {virtual_size} bytes is impossible, sizes are multiples of 512")
    cluster_size = 1 << cluster_bits
    mapped_per_entry = cluster_size // 8 * cluster_size
    # QEMU never makes an L1 table without entries.
    entries = max(1, -(-virtual_size // mapped_per_entry))
    if entries * 8 > header.MAX_L1_BYTES:
        raise OverlayError(
            f"a disk of {dates.size(virtual_size)} is larger than a qcow2 file with clusters of "
            f"{dates.size(cluster_size)} can be",
            next_step="choose a smaller disk",
        )
    return entries


def refcount_clusters(others: int, cluster_bits: int) -> tuple[int, int]:
    """Return how many clusters the refcount table and the refcount blocks take beside ``others``."""
    cluster_size = 1 << cluster_bits
    per_block = cluster_size // _REFCOUNT_BYTES
    table_clusters, blocks = 1, 1
    # The refcounts count their own clusters too, so that their number is a fixed point.
    while True:
        needed_blocks = -(-(others + table_clusters + blocks) // per_block)
        needed_table = -(-needed_blocks * 8 // cluster_size)
        if (needed_table, needed_blocks) == (table_clusters, blocks):
            return table_clusters, blocks
        table_clusters, blocks = needed_table, needed_blocks


def header_fields(
    *,
    cluster_bits: int,
    virtual_size: int,
    l1_entries: int,
    l1_offset: int,
    refcount_table_offset: int,
    refcount_table_clusters: int,
    backing_file_offset: int = 0,
    backing_file_length: int = 0,
) -> bytes:
    """Return a version 3 header of 112 bytes, without extensions. Offsets and lengths are bytes."""
    fields = header.V2_FIELDS.pack(
        header.MAGIC,
        3,
        backing_file_offset,
        backing_file_length,
        cluster_bits,
        virtual_size,
        0,
        l1_entries,
        l1_offset,
        refcount_table_offset,
        refcount_table_clusters,
        0,
        0,
    )
    return (fields + header.V3_FIELDS.pack(0, 0, 0, _REFCOUNT_ORDER, _HEADER_LENGTH)).ljust(
        _HEADER_LENGTH, b"\0"
    )


def _first_cluster(layout: _Layout, virtual_size: int, backing_file: bytes, backing_format: bytes) -> bytes:
    if not 0 < len(backing_file) <= header.MAX_BACKING_NAME:
        raise OverlayError(
            f"a backing file's path of {len(backing_file)} bytes does not fit a qcow2 header,"
            " which holds 1 to 1023",
            path=os.fsdecode(backing_file),
            next_step="keep the cache under a shorter path",
        )
    extension = struct.pack(">II", header.EXTENSION_BACKING_FORMAT, len(backing_format))
    extension += backing_format.ljust(-(-len(backing_format) // 8) * 8, b"\0") + bytes(8)
    name_at = _HEADER_LENGTH + len(extension)
    if name_at + len(backing_file) > 1 << layout.cluster_bits:
        raise OverlayError(
            f"a backing file's path of {len(backing_file)} bytes does not fit a qcow2 cluster of"
            f" {1 << layout.cluster_bits} bytes",
            path=os.fsdecode(backing_file),
            next_step="choose larger clusters",
        )
    fields = header_fields(
        cluster_bits=layout.cluster_bits,
        virtual_size=virtual_size,
        l1_entries=layout.l1_entries,
        l1_offset=layout.l1_at << layout.cluster_bits,
        refcount_table_offset=1 << layout.cluster_bits,
        refcount_table_clusters=layout.refcount_table_clusters,
        backing_file_offset=name_at,
        backing_file_length=len(backing_file),
    )
    return fields + extension + backing_file


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
