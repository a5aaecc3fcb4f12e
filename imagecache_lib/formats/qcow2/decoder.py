# SPDX-License-Identifier: Apache-2.0
"""Decodes a qcow2 image to raw while it arrives, front to back, without a second look at it.

What the stream holds is taken in the order of the file. Three kinds of things are awaited, each at a known
offset: the L1 table, the L2 tables it names, and the clusters they map. Common writers put a table before the
data it maps, so that everything passes once and in order. Bytes that pass before a table has spoken for them
are kept aside (:mod:`spill`) until all tables are known, and looked up when a late table wants them. So any
layout is right, and the usual one needs no second pass.

Memory is bounded whatever the image says: maps that would not fit are set aside like data, and read at the
end.
"""

from __future__ import annotations

import dataclasses
from types import TracebackType

from imagecache_lib import errors
from imagecache_lib.formats.qcow2 import tables
from imagecache_lib.formats.qcow2.header import (
    EXTENSION_ENCRYPTION,
    KNOWN_INCOMPATIBLE,
    V2_LENGTH,
    Compression,
    Header,
    Incompatible,
    NotQcow2,
    Truncated,
    parse,
)
from imagecache_lib.formats.qcow2.inflate import Inflater, fastest_deflate, zstd
from imagecache_lib.formats.qcow2.output import Output
from imagecache_lib.formats.qcow2.pool import InflatePool, default_threads
from imagecache_lib.formats.qcow2.spill import Spill
from imagecache_lib.formats.qcow2.walk import MAP_BYTES, UNCONDITIONAL, Leave, Unstreamable, Walk
from imagecache_lib.system.sparse import Sink

__all__ = ["Decoded", "StreamDecoder", "Unstreamable", "check", "supports"]

#: Input is taken in pieces of at most this.
_PIECE = 2**20


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a decoded image came to.

    :param virtual_size: bytes the guest sees, which is the raw file's size.
    :param mapped_bytes: bytes of clusters that the tables map to data; no more than these were written.
    :param spilled_bytes: bytes that were set aside in the side file.
    """

    virtual_size: int
    mapped_bytes: int
    spilled_bytes: int


def check(header: Header, max_virtual_size: int) -> None:
    """Refuse what must not be used as a base image, or cannot be decoded by any program here.

    :raises ImageRejected: encryption, an external data file, a backing file, an unknown incompatible feature
        or compression, the corrupt bit, or more than ``max_virtual_size`` bytes.
    """
    features = header.incompatible_features
    for refused, cause in (
        (header.crypt_method, "is encrypted"),
        (EXTENSION_ENCRYPTION in header.extensions, "is encrypted"),
        (header.backing_file_offset, "has a backing file"),
        (features & Incompatible.DATA_FILE, "keeps its data in another file"),
        (features & Incompatible.CORRUPT, "is marked corrupt"),
        (
            features & ~KNOWN_INCOMPATIBLE,
            f"needs unknown features (bit mask {features & ~KNOWN_INCOMPATIBLE:#x})",
        ),
        (
            header.compression_type > max(Compression),
            f"uses unknown compression {header.compression_type}",
        ),
        (
            header.virtual_size > max_virtual_size,
            f"has a virtual size of {header.virtual_size} bytes, more than the {max_virtual_size} allowed",
        ),
        (header.l1_size and header.l1_table_offset < header.cluster_size, "has its L1 table in its header"),
    ):
        if refused:
            raise errors.ImageRejected(f"the qcow2 image {cause}")


def supports(header: Header) -> bool:
    """Return whether an installed library can decode the image; otherwise qemu-img has to convert it."""
    return header.compression_type == Compression.DEFLATE or zstd() is not None


class StreamDecoder:
    """Takes a qcow2 file in pieces of any size and writes the disk it holds.

    :param out: takes the disk's content. Nothing is synced.
    :param spill: takes what has to be set aside. It is closed with the decoder.
    :param file_size: bytes the whole file has, if known: tables that point outside are then refused at once.
    :param max_virtual_size: bytes above which the image is refused.
    :param inflater: inflates deflate clusters, or None for the fastest one that is installed.
    :param map_bytes: memory for maps of data that has not arrived; what exceeds it is read again at the end.
    :param leave: asked again and again while a piece is taken. What it raises ends the decoding.
    :param threads: number of threads that inflate and write clusters, or None for one per
        processor, up to four.
    """

    def __init__(
        self,
        out: Sink,
        *,
        spill: Spill,
        file_size: int | None,
        max_virtual_size: int,
        inflater: Inflater | None = None,
        threads: int | None = None,
        map_bytes: int = MAP_BYTES,
        leave: Leave = UNCONDITIONAL,
    ) -> None:
        self._out = out
        self._spill = spill
        self._file_size = file_size
        self._max_virtual_size = max_virtual_size
        self._inflater = inflater
        self._map_bytes = map_bytes
        self._leave = leave
        self._thread_count = threads or default_threads()
        self._header: Header | None = None
        self._walk: Walk | None = None
        self._start = bytearray()
        self._needed = V2_LENGTH

    def __enter__(self) -> StreamDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def header(self) -> Header | None:
        """The header, or None while it has not arrived."""
        return self._header

    @property
    def virtual_size(self) -> int | None:
        """Bytes the guest sees, or None while the header has not arrived."""
        return None if self._header is None else self._header.virtual_size

    @property
    def mapped_bytes(self) -> int:
        """Bytes of clusters that the tables so far map to data: what the raw file may allocate by then.

        It grows while the stream arrives, ahead of the data in the usual layout: reserve space by it.
        """
        return 0 if self._walk is None else self._walk.mapped_bytes

    @property
    def spilled_bytes(self) -> int:
        """Bytes that went to the side file so far."""
        return self._spill.spilled

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the file.

        :raises ImageRejected: the file is not a qcow2 image, is malformed, or is one that :func:`check`
            refuses.
        :raises Unstreamable: only qemu-img can convert the image, from the whole file.
        :raises OSError: the raw file or the side file cannot be written.
        """
        for start in range(0, len(chunk), _PIECE):
            if isinstance(chunk, bytes) and len(chunk) <= _PIECE:
                piece = chunk  # it cannot change
            else:
                # A reference to a part of a large chunk would keep all of it in memory.
                piece = bytes(chunk[start : start + _PIECE])
            if self._walk is None:
                self._begin(piece)
            else:
                self._walk.feed(piece)

    def finish(self) -> Decoded:
        """Call after the last byte: resolve what was set aside, and give the raw file its size.

        Returns what was decoded. Raises as :meth:`write` does, and ImageRejected also for a file that ends
        too early.
        """
        if self._walk is None:
            self._parse_header(final=True)
        assert self._walk is not None and self._header is not None
        self._walk.finish()
        self._out.truncate(self._header.virtual_size)
        return Decoded(self._header.virtual_size, self._walk.mapped_bytes, self._spill.spilled)

    def close(self) -> None:
        """Stop the threads and drop what was set aside. The raw file is the caller's."""
        if self._walk is not None:
            self._walk.close()
        self._spill.close()

    def _begin(self, piece: bytes) -> None:
        self._start += piece
        if len(self._start) >= self._needed:
            self._parse_header(final=False)

    def _parse_header(self, *, final: bool) -> None:
        try:
            header = parse(bytes(self._start))
        except NotQcow2 as error:
            raise errors.ImageRejected("the data is no qcow2 image") from error
        except Truncated as error:
            if final:
                raise
            self._needed = error.needed
            return
        check(header, self._max_virtual_size)
        self._header = header
        pool = InflatePool(self._out, header.cluster_size, self._choose_inflater(header), self._thread_count)
        geometry = tables.Geometry.of(header, self._file_size)
        output = Output(geometry, pool)
        self._walk = Walk(geometry, output, self._spill, map_bytes=self._map_bytes, leave=self._leave)
        start, self._start = self._start, bytearray()
        self._walk.feed(bytes(start))

    def _choose_inflater(self, header: Header) -> Inflater:
        if header.compression_type == Compression.DEFLATE:
            return self._inflater or fastest_deflate()
        inflater = zstd()
        if inflater is None:
            raise Unstreamable(
                "a zstd-compressed qcow2 image cannot be decoded as it arrives",
                next_step="install the zstd extra, or convert it with qemu-img",
            )
        return inflater
