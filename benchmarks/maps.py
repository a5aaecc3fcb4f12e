# SPDX-License-Identifier: Apache-2.0
"""The front of a huge qcow2 image: header and tables that map every cluster, before any data.

That is the moment at which the decoder holds most: all maps, and nothing done yet.
Layout: QEMU's docs/interop/qcow2.rst.
"""

from __future__ import annotations

import array
import os
import struct
import sys
from typing import BinaryIO

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_COPIED = 1 << 63


def feed(clusters: int, directory: str, *, threads: int) -> None:
    """Decode the front of an image with so many allocated clusters.

    :param clusters: a multiple of 8192, which is what one table maps.
    :param directory: for the files that are written, all unlinked.
    """
    from imagecache_lib.formats.qcow2 import decoder
    from imagecache_lib.formats.qcow2.spill import Spill
    from imagecache_lib.system import sparse

    per_table = _CLUSTER // 8
    tables = clusters // per_table
    l1_bytes = -(-tables * 8 // _CLUSTER) * _CLUSTER
    first_table = _CLUSTER + l1_bytes
    first_data = first_table + tables * _CLUSTER
    size = clusters * _CLUSTER
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, _CLUSTER_BITS, size, 0, tables, _CLUSTER, 0, 0, 0, 0
    ) + struct.pack(">QQQII", 0, 0, 0, 4, 104)
    with (
        _nameless(directory) as out,
        decoder.StreamDecoder(
            sparse.SparseFile(out.fileno()),
            spill=Spill(lambda: _nameless(directory)),
            file_size=first_data + size,
            max_virtual_size=size,
            threads=threads,
        ) as stream,
    ):
        stream.write(header.ljust(_CLUSTER, b"\0"))
        stream.write(_entries(first_table, tables).ljust(l1_bytes, b"\0"))
        for table in range(tables):
            stream.write(_entries(first_data + table * per_table * _CLUSTER, per_table))
        if stream.mapped_bytes != size:
            raise AssertionError(f"{stream.mapped_bytes} bytes are mapped, not {size}")


def _entries(start: int, count: int) -> bytes:
    entries = array.array("Q", range(start | _COPIED, (start + count * _CLUSTER) | _COPIED, _CLUSTER))
    if sys.byteorder == "little":
        entries.byteswap()
    return entries.tobytes()


def _nameless(directory: str) -> BinaryIO:
    return os.fdopen(os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600), "w+b")
