# SPDX-License-Identifier: Apache-2.0
"""Writing data so that zeros become holes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

#: The filesystem's block: no smaller hole is possible on ext4 and xfs by default.
BLOCK = 4096

#: First look at this much at a time: most data has neither long zero runs nor none at all.
_STRIDE = 64 * 1024
_ZEROS = bytes(_STRIDE)

_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)


def data_runs(data: memoryview, offset: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of what is not zero in ``data``, in whole blocks of the file.

    :param offset: where in the file ``data`` begins.
    """
    position, run, length = 0, -1, len(data)
    while position < length:
        stride = min(_STRIDE - (offset + position) % _STRIDE, length - position)
        # bytes compares with memcmp(3); a memoryview would compare item by item, thirty times slower.
        if bytes(data[position : position + stride]) == _ZEROS[:stride]:
            if run >= 0:
                yield run, position
                run = -1
            position += stride
            continue
        end = position + stride
        while position < end:
            block = min(BLOCK - (offset + position) % BLOCK, end - position)
            if bytes(data[position : position + block]) == _ZEROS[:block]:
                if run >= 0:
                    yield run, position
                    run = -1
            elif run < 0:
                run = position
            position += block
    if run >= 0:
        yield run, length


def write(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write at an offset, leaving holes where the data is zero. The file has nothing there yet.

    :raises OSError: as write(2).
    """
    view = memoryview(data).cast("B")
    for start, end in data_runs(view, offset):
        position = start
        while position < end:
            position += os.pwrite(fd, view[position:end], offset + position)


def start_writeback(fd: int) -> None:
    """Ask the kernel to begin writing a file's dirty pages, without waiting, so that the last fsync is short.

    sync_file_range(2) with only ``SYNC_FILE_RANGE_WRITE`` neither waits nor takes note of write errors, so
    that the fsync to come still reports them. Where the call is not possible nothing is lost but time.
    """
    _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
