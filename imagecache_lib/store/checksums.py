# SPDX-License-Identifier: Apache-2.0
"""Checksums of a base's content, taken of the data in flight: what a scrub compares the disk with.

A digest computed from the file later would certify whatever the disk made of it. So each piece of data is
summed up where it is at hand, just after it was written, in whatever order and by whichever thread.

The content is divided into granules of 64 KiB, and each has a CRC-32 (the polynomial of zlib and ISO-HDLC)
without the usual inversions at begin and end. That one is linear: zeros sum up to 0, zeros in front change
nothing, and the sum of a granule is the exclusive or of the sums of its pieces, each shifted by the zeros
that follow it. So a granule need not be written in one piece, a hole costs nothing, and the last granule
counts as if zeros filled it.

On disk (``records/<name>.sums``, all numbers little-endian)::

    8 bytes   magic, version included
    32 bytes  random id of the base, as text: the sums are of no other file
    u32       granule size in bytes
    u32       number of pages
    pages     u64 number of the page; 64 sums (u32) of the granules from 64 * number on
    u32       zlib's CRC-32 of all the above

Pages of zeros are left out. A page is small, since all are in memory at once, and an image of some megabytes
can scatter its data over terabytes.
"""

from __future__ import annotations

import functools
import os
import struct
import sys
import threading
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from imagecache_lib.system import sparse

#: Bytes that one sum stands for.
GRANULE = 64 * 1024

#: As much of a file of checksums as is read, in bytes: that of 16 TiB of data has not more.
LIMIT = 2**30 + 2**26

_PAGE = 64
_MAGIC = b"imgsums\2"
_HEADER = struct.Struct("<8s32sII")
_PAGE_NUMBER = struct.Struct("<Q")
_SUM = struct.Struct("<I")
_ALL = 0xFFFF_FFFF
_POLYNOMIAL = 0xEDB8_8320
_READ = 2**20

#: CRC-32 as :func:`zlib.crc32`: data and start value to value.
Crc32 = Callable[[memoryview, int], int]


def fastest_crc32() -> Crc32:
    """Return libdeflate's CRC-32 if the ``fast`` extra is installed, else zlib's. Both yield the same."""
    try:
        import deflate
    except ImportError:
        return zlib.crc32
    crc32: Crc32 = deflate.crc32
    return crc32


class Waiting(Protocol):
    """A caller who waits, and may cease to: a :class:`~imagecache_lib.system.waiter.Waiter` will do."""

    def check(self) -> None:
        """Raise if the caller no longer waits."""


class Checksums:
    """The sums of one base's granules. Safe to share between threads."""

    def __init__(self, *, crc32: Crc32 | None = None) -> None:
        self._crc32 = crc32 or fastest_crc32()
        self._pages: dict[int, array[int]] = {}
        self._lock = threading.Lock()

    def add(self, data: memoryview, offset: int) -> None:
        """Take data that was written at an offset. No byte of the file may be taken twice."""
        self.add_all((data,), offset)

    def add_all(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Take buffers that were written at an offset, one behind the other, as :meth:`add`."""
        crc32, found = self._crc32, []
        granule, begin = divmod(offset, GRANULE)
        # The inversion at begin undone; the next buffer of the same granule goes on with it.
        value, at = _ALL, begin
        for data in buffers:
            position, end = 0, len(data)
            while position < end:
                length = min(GRANULE - at, end - position)
                value = crc32(data if length == end else data[position : position + length], value)
                position += length
                at += length
                if at == GRANULE:
                    found.append((granule, value ^ _ALL))
                    granule, at, value = granule + 1, 0, _ALL
        if value != _ALL:
            found.append((granule, _multiply(_power(GRANULE - at), value ^ _ALL)))
        with self._lock:
            for granule, value in found:
                page, index = divmod(granule, _PAGE)
                if (sums := self._pages.get(page)) is None:
                    sums = self._pages[page] = array("I", bytes(4 * _PAGE))
                sums[index] ^= value

    def read_back(self, fd: int, waiter: Waiting | None = None) -> None:
        """Take what is in a file: the page cache's word for it, where another program wrote the data.

        :param waiter: asked after each piece whether the caller still waits.
        :raises OSError: it cannot be read.
        :raises: what the waiter raises.
        """
        for start, end in sparse.data_extents(fd):
            position = start
            while position < end and (data := os.pread(fd, min(_READ, end - position), position)):
                self.add(memoryview(data), position)
                position += len(data)
                if waiter is not None:
                    waiter.check()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._pages.clear()

    def of(self, granule: int) -> int:
        """Return a granule's sum: 0 for one of zeros."""
        sums = self._pages.get(granule // _PAGE)
        return 0 if sums is None else sums[granule % _PAGE]

    def granules(self) -> Iterator[int]:
        """Yield, in order, the numbers of all granules that hold more than zeros."""
        for page in sorted(self._pages):
            for index, value in enumerate(self._pages[page]):
                if value:
                    yield page * _PAGE + index

    def differing(self, other: Checksums) -> list[int]:
        """Return, in order, the numbers of all granules whose sums differ."""
        either = {*self.granules(), *other.granules()}
        return sorted(granule for granule in either if self.of(granule) != other.of(granule))

    def replace(self, other: Checksums) -> None:
        """Take another's sums instead of these."""
        with self._lock:
            self._pages = {page: array("I", sums) for page, sums in other._pages.items()}

    def to_bytes(self, base_id: str) -> bytes:
        """Return the checksums as they are stored, bound to a base."""
        pages = sorted((number, sums) for number, sums in self._pages.items() if any(sums))
        data = bytearray(_HEADER.pack(_MAGIC, base_id.encode(), GRANULE, len(pages)))
        for number, sums in pages:
            data += _PAGE_NUMBER.pack(number) + _little_endian(sums).tobytes()
        return bytes(data) + _SUM.pack(zlib.crc32(data))


def parse(data: bytes, base_id: str) -> Checksums | None:
    """Return the sums in ``data``, or None if ``data`` is torn, unknown or of another base.

    :param base_id: the random id of the base that they must be bound to.
    """
    content, own_sum = data[: -_SUM.size], data[-_SUM.size :]
    if len(content) < _HEADER.size or own_sum != _SUM.pack(zlib.crc32(content)):
        return None
    magic, bound_to, granule, count = _HEADER.unpack_from(data)
    step = _PAGE_NUMBER.size + 4 * _PAGE
    expected = (_MAGIC, base_id.encode(), GRANULE, _HEADER.size + count * step + _SUM.size)
    if (magic, bound_to, granule, len(data)) != expected:
        return None
    found = Checksums()
    for start in range(_HEADER.size, len(data) - _SUM.size, step):
        (number,) = _PAGE_NUMBER.unpack_from(data, start)
        sums = array("I", data[start + _PAGE_NUMBER.size : start + step])
        found._pages[number] = _little_endian(sums)
    return found


def _little_endian(sums: array[int]) -> array[int]:
    if sys.byteorder == "little":
        return sums
    swapped = array("I", sums)
    swapped.byteswap()
    return swapped


# Polynomials over GF(2) modulo the CRC's, as 32 bits of which the highest stands for x**0.


def _multiply(one: int, other: int) -> int:
    product = 0
    while one:
        if one & 0x8000_0000:
            product ^= other
        one = one << 1 & _ALL
        other = other >> 1 ^ _POLYNOMIAL if other & 1 else other >> 1
    return product


@functools.lru_cache(maxsize=GRANULE)
def _power(length: int) -> int:
    """Return x**(8 * length): what so many bytes of zeros behind a piece multiply its sum with."""
    result, factor = 0x8000_0000, 0x0080_0000  # 1 and x**8
    while length:
        if length & 1:
            result = _multiply(result, factor)
        factor = _multiply(factor, factor)
        length >>= 1
    return result
