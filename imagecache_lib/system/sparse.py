# SPDX-License-Identifier: Apache-2.0
"""Writing data so that zeros become holes, and summing it up on its way."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Protocol

#: The filesystem's block: no smaller hole is possible on ext4 and xfs by default.
BLOCK = 4096

#: What a hole reads as: a reader that passes on a hole passes on (a slice of) this, which costs no memory.
ZEROS = bytes(2**20)

#: First look at this much at a time: most data has neither long zero runs nor none at all.
_STRIDE = 64 * 1024
_ZEROS = bytes(_STRIDE)
_ZERO_BLOCK = bytes(BLOCK)

_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Sink(Protocol):
    """Where a disk's content goes, in pieces of any order and from any thread."""

    def write(self, data: bytes | bytearray, offset: int, start: int = 0, end: int | None = None) -> None:
        """Write ``data[start:end]`` at an offset of the disk, which has nothing there yet.

        :raises OSError: it cannot be written.
        """

    def truncate(self, size: int) -> None:
        """Give the disk its size in bytes."""


class Sums(Protocol):
    """Takes what is written, to sum it up."""

    def add(self, data: memoryview, offset: int) -> None:
        """Take data that was written at an offset of the file."""


class SparseFile:
    """A file that is filled once, without its zeros.

    :param fd: open for writing; it reads as zeros wherever nothing was written yet.
    :param checksums: takes the sums of what is written.
    """

    def __init__(self, fd: int, checksums: Sums | None = None) -> None:
        self._fd = fd
        self._checksums = checksums

    def write(self, data: bytes | bytearray, offset: int, start: int = 0, end: int | None = None) -> None:
        with memoryview(data) as whole:
            for first, last in data_runs(data, offset, start, end):
                position = first
                while position < last:
                    with whole[position:last] as rest:
                        position += os.pwrite(self._fd, rest, offset + position - start)
                if self._checksums is not None:
                    with whole[first:last] as run:
                        self._checksums.add(run, offset + first - start)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)


def data_runs(
    data: bytes | bytearray, offset: int, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of what is not zero in ``data[start:end]``, in whole blocks of the file.

    :param offset: where in the file ``data[start]`` belongs.
    """
    if data is ZEROS:
        return
    end = len(data) if end is None else end
    # Compared in place: a slice would copy every block once more.
    is_zero = data.startswith
    ahead = offset - start
    position, run = start, -1
    while position < end:
        stop = min(position + _STRIDE - (ahead + position) % _STRIDE, end)
        if is_zero(_ZEROS[: stop - position] if stop - position < _STRIDE else _ZEROS, position, stop):
            if run >= 0:
                yield run, position
                run = -1
            position = stop
            continue
        while position < stop:
            last = min(position + BLOCK - (ahead + position) % BLOCK, stop)
            size = last - position
            if is_zero(_ZERO_BLOCK if size == BLOCK else _ZERO_BLOCK[:size], position, last):
                if run >= 0:
                    yield run, position
                    run = -1
            elif run < 0:
                run = position
            position = last
    if run >= 0:
        yield run, end


def data_extents(fd: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of what a file has that is no hole, in order, as lseek(2) tells it.

    :raises OSError: the file cannot be asked.
    """
    size = os.fstat(fd).st_size
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def start_writeback(fd: int) -> None:
    """Ask the kernel to begin writing a file's dirty pages, without waiting, so that the last fsync is short.

    sync_file_range(2) with only ``SYNC_FILE_RANGE_WRITE`` neither waits nor takes note of write errors, so
    that the fsync to come still reports them. Where the call is not possible nothing is lost but time.
    """
    _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
