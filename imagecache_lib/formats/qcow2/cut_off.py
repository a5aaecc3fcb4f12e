# SPDX-License-Identifier: Apache-2.0
"""How long a qcow2 file must be to hold its tables. Facts from QEMU's docs/interop/qcow2.rst.

QEMU flushes a table before anything refers to it, so that no crash leaves a reference to one behind the end
of the file. Of data a crash may leave such a reference: QEMU reads zeros there, and so it must stay.
"""

from __future__ import annotations

import os
import sys
from array import array

from imagecache_lib.formats.qcow2.header import MAX_L1_BYTES, Header
from imagecache_lib.formats.qcow2.tables import OFFSET_MASK

#: QEMU's limit on the refcount table.
_MAX_REFCOUNT_TABLE_BYTES = 8 * 2**20


def end_of_tables(fd: int, header: Header) -> int:
    """Return how many bytes of a file its L1 table, its L2 tables, its refcount table and the blocks of that
    take, counted from its start. Of what lies behind the end of the file no more is looked for.

    :param header: of that file.
    :raises OSError: it cannot be read.
    """
    l1_bytes = min(header.l1_size * 8, MAX_L1_BYTES)
    refcount_bytes = min(header.refcount_table_clusters * header.cluster_size, _MAX_REFCOUNT_TABLE_BYTES)
    end = max(header.l1_table_offset + l1_bytes, header.refcount_table_offset + 1)
    for offset, length in (
        (header.l1_table_offset, l1_bytes),
        (header.refcount_table_offset, refcount_bytes),
    ):
        last = max(_entries(os.pread(fd, length, offset)), default=0)
        end = max(end, last + header.cluster_size if last else 0)
    return end


def _entries(data: bytes) -> array[int]:
    entries = array("Q", data[: len(data) // 8 * 8])
    if sys.byteorder == "little":
        entries.byteswap()
    return array("Q", (entry & OFFSET_MASK for entry in entries))
