# SPDX-License-Identifier: Apache-2.0
"""Writing without the zeros: blocks of zeros are left as the holes they already are."""

from __future__ import annotations

import os

#: Unit in which zeros are recognised: the block size of the usual filesystems.
BLOCK = 4096
_ZEROS = bytes(BLOCK)


def pwrite_sparse(
    fd: int, data: bytes | bytearray, offset: int, start: int = 0, end: int | None = None
) -> None:
    """Write ``data[start:end]`` at a file offset, except for its blocks of zeros.

    :param fd: a file that reads as zeros wherever nothing was written yet.
    :param offset: where ``data[start]`` goes; a multiple of :data:`BLOCK` makes the most holes.
    :raises OSError: the file cannot be written.
    """
    end = len(data) if end is None else end
    is_zero = data.startswith
    pending = position = start
    while position < end:
        stop = position + BLOCK
        # Compared in place: slicing would copy every block once more.
        if stop <= end:
            zero = is_zero(_ZEROS, position, stop)
        else:
            stop = end
            zero = is_zero(_ZEROS[: end - position], position, end)
        if zero:
            if pending < position:
                _pwrite(fd, data, pending, position, offset + pending - start)
            pending = stop
        position = stop
    if pending < end:
        _pwrite(fd, data, pending, end, offset + pending - start)


def _pwrite(fd: int, data: bytes | bytearray, start: int, end: int, offset: int) -> None:
    with memoryview(data) as whole:
        while start < end:
            with whole[start:end] as rest:
                count = os.pwrite(fd, rest, offset)
            start, offset = start + count, offset + count
