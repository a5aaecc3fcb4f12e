# SPDX-License-Identifier: Apache-2.0
"""Writing data so that zeros become holes, and summing it up on its way."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

#: The filesystem's block: no smaller hole is possible on ext4 and xfs by default.
BLOCK = 4096

#: What a hole reads as: a reader that passes on a hole passes on (a slice of) this, which costs no memory.
ZEROS = bytes(2**20)

#: Zeros that are compared with at once, by their length, longest first.
_ZERO_RUNS = {length: bytes(length) for length in (len(ZEROS), 16 * BLOCK, BLOCK)}

#: Where each block is looked at first. Nearly all blocks of data have something there, and the same place of
#: all blocks is one slice: a few slices tell of a whole run which of its blocks may be zeros.
_PROBES = (0, 1032, 2064, 3096)

#: As many buffers as one call writes: Linux' IOV_MAX.
_MOST_BUFFERS = 1024

#: What holds bytes to write.
Buffer = bytes | bytearray | memoryview

#: Bytes to write, as where they begin and end in what holds them: a slice would copy them.
Piece = tuple[Buffer, int, int]

#: Writing back begins whenever so many bytes were written, so that the final fsync finds little to do.
_WRITEBACK = 16 * 2**20

_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Sink(Protocol):
    """Where a disk's content goes, in pieces of any order and from any thread."""

    def write(self, data: Buffer, offset: int, start: int = 0, end: int | None = None) -> None:
        """Write ``data[start:end]`` at an offset of the disk, which has nothing there yet.

        :raises OSError: it cannot be written.
        """

    def write_pieces(self, pieces: Iterable[tuple[int, Piece]]) -> None:
        """Write pieces, each at an offset of the disk, which has nothing there yet.

        :raises OSError: one cannot be written.
        """

    def truncate(self, size: int) -> None:
        """Give the disk its size in bytes."""


class Sums(Protocol):
    """Takes what is written, to sum it up."""

    def add_all(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Take buffers that were written at an offset of the file, one behind the other."""


class Writeback:
    """Has the kernel write a file's dirty pages while more are made. Safe to share between threads."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._counting = threading.Lock()
        self._dirty = 0

    def wrote(self, length: int) -> None:
        """Count bytes that were written, and let the kernel begin once they are many."""
        with self._counting:
            self._dirty += length
            if self._dirty < _WRITEBACK:
                return
            self._dirty = 0
        start_writeback(self._fd)


class SparseFile:
    """A file that is filled once, without its zeros.

    :param fd: open for writing; it reads as zeros wherever nothing was written yet.
    :param checksums: takes the sums of what is written.
    :param writeback: is told of what is written, if the file will be synced.
    """

    def __init__(self, fd: int, checksums: Sums | None = None, writeback: Writeback | None = None) -> None:
        self._fd = fd
        self._checksums = checksums
        # The kernel lets one thread at a time write to a file, and the others spin until they may.
        self._writing = threading.Lock()
        self._writeback = writeback

    def write(self, data: Buffer, offset: int, start: int = 0, end: int | None = None) -> None:
        self.write_pieces([(offset, (data, start, len(data) if end is None else end))])

    def write_pieces(self, pieces: Iterable[tuple[int, Piece]]) -> None:
        buffers: list[memoryview] = []
        begin = position = 0
        for offset, (data, start, end) in pieces:
            ahead = offset - start
            for first, last in data_runs(data, offset, start, end):
                if buffers and (ahead + first != position or len(buffers) == _MOST_BUFFERS):
                    self._write(buffers, begin)
                    buffers = []
                if not buffers:
                    begin = ahead + first
                whole = last - first == len(data)
                buffers.append(memoryview(data) if whole else memoryview(data)[first:last])
                position = ahead + last
        if buffers:
            self._write(buffers, begin)

    def _write(self, buffers: list[memoryview], offset: int) -> None:
        with self._writing:
            write_all(self._fd, buffers, offset)
        if self._checksums is not None:
            self._checksums.add_all(buffers, offset)
        if self._writeback is not None:
            self._writeback.wrote(sum(map(len, buffers)))

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)


def write_all(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write buffers, one behind the other, at an offset of a file. There are at most 1,024.

    :raises OSError: they cannot be written.
    """
    written = os.pwritev(fd, buffers, offset)
    for number, buffer in enumerate(buffers):
        if written < len(buffer):
            offset += sum(map(len, buffers[:number])) + written
            write_all(fd, [buffer[written:], *buffers[number + 1 :]], offset)
            return
        written -= len(buffer)


def data_runs(data: Buffer, offset: int, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Return the (start, end) of what is not zero in ``data[start:end]``, in whole blocks of the file.

    :param offset: where in the file ``data[start]`` belongs.
    """
    if data is ZEROS:
        return []
    end = len(data) if end is None else end
    runs = []
    run = start
    for first, last in _zero_blocks(data, start, end, (start - offset) % BLOCK):
        if run < first:
            runs.append((run, first))
        run = last
    if run < end:
        runs.append((run, end))
    return runs


def _zero_blocks(data: Buffer, start: int, end: int, phase: int) -> list[tuple[int, int]]:
    """Return the (start, end) of blocks that are zero in ``data[start:end]``, in order.

    :param phase: a block of the file begins wherever a position in ``data`` leaves this rest.
    """
    found: list[tuple[int, int]] = []
    first = start + (phase - start) % BLOCK
    if start < first and _is_zero(data, start, min(first, end)):
        found.append((start, min(first, end)))
    while first + BLOCK <= end:
        count = min((end - first) // BLOCK, len(ZEROS) // BLOCK)
        seen = _probe(data, first, count)
        number = seen.find(0)
        while number >= 0:
            # Blocks that show nothing where they were looked at, up to the next that does.
            behind = count - len(seen[number:].lstrip(b"\0"))
            found += _confirmed(data, first + number * BLOCK, first + behind * BLOCK)
            number = seen.find(0, behind)
        first += count * BLOCK
    if first < end and _is_zero(data, first, end):
        found.append((first, end))
    return found


def _confirmed(data: Buffer, begin: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of what is zero of some blocks, in order."""
    while begin < stop:
        for length in _ZERO_RUNS:
            if begin + length <= stop and _is_zero(data, begin, begin + length):
                yield begin, begin + length
                begin += length
                break
        else:
            begin += BLOCK


def _is_zero(data: Buffer, first: int, last: int) -> bool:
    """Return whether ``data[first:last]``, of no more than a MiB, holds nothing but zeros."""
    zeros = _ZERO_RUNS.get(last - first) or ZEROS[: last - first]
    if isinstance(data, memoryview):
        return data[first:last].tobytes() == zeros
    # Compared in place: a slice would copy every block once more.
    return data.startswith(zeros, first, last)


def _probe(data: Buffer, first: int, count: int) -> bytes:
    """Return one byte for each of some blocks, which is 0 if the block shows nothing but zeros."""
    end = first + count * BLOCK
    seen = 0
    for at in _PROBES:
        seen |= int.from_bytes(data[first + at : end : BLOCK], "little")
    return seen.to_bytes(count, "little")


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
