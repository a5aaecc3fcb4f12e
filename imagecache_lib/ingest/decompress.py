# SPDX-License-Identifier: Apache-2.0
"""Images that are compressed as a whole: unpacked while they arrive, one layer, within bounds.

gzip (RFC 1952), xz, Zstandard (RFC 8878) and bzip2, each as its own program writes it: several members one
after the other are one stream, xz's padding between them is allowed, and anything else behind the last one is
refused. What is unpacked is an image like any other. In particular it is inspected, and refused if it is
compressed again.

The bytes are hostile. What is produced is bounded by ``max_virtual_size``, by the disk's size where the
content is raw, and by :data:`MOST_RATIO` times what came; room is reserved as it grows, zeros left out. It is
produced in pieces of at most :data:`PIECE` bytes, between which the caller may cancel. Memory is bounded by
refusing what was written with larger windows: :data:`ZSTD_WINDOW` and :data:`XZ_MEMORY`. Time is bounded by
refusing what consists of members that are nearly empty: :data:`LEAST_PER_MEMBER`.
"""

from __future__ import annotations

import bz2
import dataclasses
import lzma
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

from imagecache_lib import dates, errors, model
from imagecache_lib.config import CacheConfig
from imagecache_lib.ingest.stream import Consumer, Content
from imagecache_lib.store import evidence
from imagecache_lib.store.reservations import Reservation
from imagecache_lib.system import sparse
from imagecache_lib.system.waiter import Waiter

#: Most bytes in one piece of what is produced.
PIECE = 2**20
#: Most bytes that may be produced from one that came, once they are more than :data:`GRACE`. A disk that is
#: nearly empty packs well; zeros alone pack a thousandfold with gzip and seven thousandfold with xz.
MOST_RATIO = 10_000
GRACE = 2**30
#: Members of a stream, or frames, may be many more than this only if they make so many bytes on average: each
#: takes its time, whatever is in it. Programs that pack in parallel make members of 64 KiB and more.
MANY_MEMBERS = 10_000
LEAST_PER_MEMBER = 4096
#: Largest window of Zstandard, in bytes: what ``zstd --ultra -22`` uses.
ZSTD_WINDOW = 128 * 2**20
#: Most memory that xz may take, in bytes: a dictionary of 64 MiB, which ``xz -9`` uses, and what comes with
#: it. The next larger one that an xz stream can state (its size is 2^n or 2^n + 2^(n-1)) has 96 MiB.
XZ_MEMORY = 68 * 2**20
#: In this step room is reserved beyond what is produced.
_ROOM_STEP = 64 * 2**20
#: As many bytes are taken at a time. What follows a member is copied for the next one, so that a chunk of
#: many members costs the square of its length.
_SLICE = 2**16
#: Zstandard has no bound for what one call produces. A block of it takes at least 4 bytes and makes at most
#: 128 KiB, so that this much makes no more than 32 MiB.
_ZSTD_SLICE = 1024
#: What such slices make is joined, since each piece takes its time, whatever is in it.
_ZSTD_JOINED = 2**16

#: How a compressed stream begins, by its name in :data:`model.COMPRESSIONS`.
MAGIC = {
    "gzip": b"\x1f\x8b\x08",
    "xz": b"\xfd7zXZ\x00",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bzip2": b"BZh",
}
_LONGEST_MAGIC = 6
_NOT_COMPRESSED = "it does not begin as such data does"
_SKIPPABLE = b"\x2a\x4d\x18"  # the last three bytes of the magic of a Zstandard frame without content

#: What says that an image is compressed, and not how.
ANY = "any"

#: Container formats of Glance that are no disks, with what they are and what to do.
_NO_DISKS = {
    "ova": ("an OVA, a tar archive of disks", "unpack it (tar xf) and upload the disk that is in it"),
    "docker": ("a container's filesystem, a tar archive", "choose the image of a disk"),
}


def compression_of(image: model.Image, use: evidence.Use, config: CacheConfig) -> str | None:
    """Return how an image's data is compressed, or None if it is to be stored without unpacking.

    :returns: one of :data:`model.COMPRESSIONS`, or :data:`ANY`: its first bytes tell.
    :raises ImageRejected: the image is to be a disk and its container format is of something else, or it is
        compressed and that is not allowed.
    """
    if use is evidence.Use.FILE:
        return None
    if image.compression is not None:
        if image.compression not in model.COMPRESSIONS:
            raise errors.ImageRejected(
                f"its compression {image.compression[:40]!r} is not known here",
                image=image.id,
                next_step=f"use one of {', '.join(model.COMPRESSIONS)}",
            )
        return image.compression
    container = (image.container_format or "").lower()
    if container in _NO_DISKS:
        kind, next_step = _NO_DISKS[container]
        raise errors.ImageRejected(
            f"its container format is {container}: it is {kind}, and no disk",
            image=image.id,
            next_step=next_step,
        )
    if container != "compressed":
        return None
    if not config.decompress_images:
        raise errors.ImageRejected(
            "its container format is compressed",
            image=image.id,
            next_step="upload the image unpacked, or set decompress_images",
        )
    return ANY


class _Member(Protocol):
    """One member of a compressed stream: what one run of the compressing program wrote."""

    @property
    def ended(self) -> bool: ...

    @property
    def unused(self) -> bytes:
        """What followed its end in the bytes that it was given."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take the next bytes, and yield what they make in pieces that are bounded."""


class _Gzip:
    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def ended(self) -> bool:
        return self._decoder.eof

    @property
    def unused(self) -> bytes:
        return self._decoder.unused_data

    def feed(self, data: bytes) -> Iterator[bytes]:
        while not self.ended:
            piece = self._decoder.decompress(data, PIECE)
            data = self._decoder.unconsumed_tail
            yield piece
            if not data and len(piece) < PIECE:
                return


class _BoundedMember:
    """xz and bzip2, whose decoders say themselves whether they wait for more."""

    def __init__(self, decoder: lzma.LZMADecompressor | bz2.BZ2Decompressor) -> None:
        self._decoder = decoder

    @property
    def ended(self) -> bool:
        return self._decoder.eof

    @property
    def unused(self) -> bytes:
        return self._decoder.unused_data

    def feed(self, data: bytes) -> Iterator[bytes]:
        while not self.ended:
            yield self._decoder.decompress(data, PIECE)
            data = b""
            if not self.ended and self._decoder.needs_input:
                return


class _Zstd:
    def __init__(self, zstandard: Any) -> None:
        self._decoder = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
        self.unused = b""
        self.ended = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        held = b""
        for start in range(0, len(data), _ZSTD_SLICE):
            made = held + self._decoder.decompress(data[start : start + _ZSTD_SLICE])
            self.ended = self._decoder.eof
            last = self.ended or start + _ZSTD_SLICE >= len(data)
            if len(made) < _ZSTD_JOINED and not last:
                held = made
                continue
            held = b""
            for first in range(0, len(made), PIECE):
                yield made[first : first + PIECE]
            if self.ended:
                self.unused = self._decoder.unused_data + data[start + _ZSTD_SLICE :]
                return


class Unpacking:
    """Turns the bytes of one compressed image into the image's own, as they come, and hands them on.

    A :class:`~imagecache_lib.ingest.stream.Consumer`, whose result is the next one's.

    :param compression: one of :data:`model.COMPRESSIONS`, or :data:`ANY`.
    :param following: takes what is unpacked, in pieces of at most :data:`PIECE` bytes.
    :param waiter: the caller, asked with each piece whether it still waits.
    :param most: most bytes to produce.
    :param reservation: raised as what is unpacked grows.
    :raises ConfigError: what unpacks Zstandard is not installed.
    """

    def __init__(
        self,
        compression: str,
        following: Consumer[Content],
        *,
        waiter: Waiter,
        most: int,
        reservation: Reservation,
    ) -> None:
        self._compression = compression
        self._following = following
        self._waiter = waiter
        self._most = most
        self._reservation = reservation
        self._zstandard = _zstandard() if compression == "zstd" else None
        self._member: _Member | None = None
        self._members = 0
        self._head = b""  # of what may be the next member
        self._padding = 0
        self._received = 0
        self._produced = 0
        self._data = 0
        self._reserved = 0

    @property
    def compression(self) -> str:
        """How the data is compressed; :data:`ANY` until its first bytes have come."""
        return self._compression

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes as they came, and hand on what they make.

        :raises ImageRejected: they are damaged, are something else, or make too much.
        :raises NoSpaceError: there is no room for what they make.
        :raises BackendError: this host lacks the memory to unpack it.
        :raises ConfigError: what unpacks it is not installed.
        """
        self._received += len(chunk)
        for start in range(0, len(chunk), _SLICE):
            self._waiter.check()
            self._take(chunk[start : start + _SLICE])

    def _take(self, chunk: bytes) -> None:
        while chunk:
            if self._member is None:
                chunk = self._without_padding(self._head + chunk)
                if len(chunk) < _LONGEST_MAGIC:
                    self._head = chunk
                    return
                self._head = b""
                self._member = self._next_member(chunk)
            for piece in self._bounded(self._member, chunk):
                self._following.feed(piece)
            if not self._member.ended:
                return
            chunk, self._member = self._member.unused, None
            self._members += 1
            if self._members > MANY_MEMBERS + self._produced // LEAST_PER_MEMBER:
                raise self._bad(f"{self._members} members make {dates.size(self._produced)} only")

    def finish(self) -> Content:
        """Check that the data ended where it should. Returns the result of the consumer of the pieces.

        :raises ImageRejected: the data is truncated, or the consumer refuses it.
        """
        if self._member is not None:
            raise self._bad("it ends early")
        if self._head or self._padding % 4:
            raise self._bad("something else follows it" if self._members else _NOT_COMPRESSED)
        content = self._following.finish()
        return dataclasses.replace(content, source_format=f"{content.source_format}+{self._compression}")

    def close(self) -> None:
        """Let go of what takes the pieces."""
        self._following.close()

    def _without_padding(self, data: bytes) -> bytes:
        """Take off the zeros that xz allows behind a stream."""
        if not self._members or self._compression != "xz":
            return data
        rest = data.lstrip(b"\0")
        self._padding += len(data) - len(rest)
        return rest

    def _next_member(self, head: bytes) -> _Member:
        skippable = head[1:4] == _SKIPPABLE and head[0] >> 4 == 5
        if self._compression == ANY:
            found = [name for name, magic in MAGIC.items() if head.startswith(magic)]
            if skippable:
                found = ["zstd"]  # the same begins an lz4 file, which its next frame shows
            if not found:
                raise self._bad(_NOT_COMPRESSED)
            self._compression = found[0]
        name = self._compression
        skippable = skippable and name == "zstd"
        if self._padding % 4 or not (head.startswith(MAGIC[name]) or skippable):
            raise self._bad("something else follows it" if self._members else _NOT_COMPRESSED)
        if name == "gzip":
            return _Gzip()
        if name == "xz":
            return _BoundedMember(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY))
        if name == "bzip2":
            return _BoundedMember(bz2.BZ2Decompressor())
        self._zstandard = self._zstandard or _zstandard()
        return _Zstd(self._zstandard)

    def _bounded(self, member: _Member, data: bytes) -> Iterator[bytes]:
        """Yield what a member makes of the data, as far as the bounds allow."""
        # bz2 raises OSError for bad data, zlib and lzma errors of their own.
        damaged: tuple[type[Exception], ...] = (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)
        if self._zstandard is not None:
            damaged += (self._zstandard.ZstdError,)
        pieces = member.feed(data)
        while True:
            try:
                piece = next(pieces, None)
            except damaged as error:
                raise self._bad(f"it cannot be unpacked ({error})") from error
            except MemoryError as error:
                raise errors.BackendError(
                    "this host lacks the memory to unpack it", next_step="try again, or on another host"
                ) from error
            if piece is None:
                return
            self._account(piece)
            if piece:
                yield piece

    def _account(self, piece: bytes) -> None:
        self._waiter.check()
        self._produced += len(piece)
        if self._produced > self._most:
            raise self._bad(f"it unpacks to more than {dates.size(self._most)}")
        if self._produced > max(GRACE, MOST_RATIO * self._received):
            came, unpacked = dates.sizes(self._received, self._produced - 1)
            raise self._bad(f"{came} of it unpack to more than {unpacked}")
        self._data += sum(last - first for first, last in sparse.data_runs(piece, 0))
        if self._data > self._reserved:
            self._reserved = self._data + _ROOM_STEP
            self._reservation.raise_to(self._reserved)

    def _bad(self, what: str) -> errors.ImageRejected:
        kind = "compressed" if self._compression == ANY else self._compression
        return errors.ImageRejected(
            f"its {kind} data is bad: {what}", next_step="have its owner upload it unpacked"
        )


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise errors.ConfigError(
            "an image is compressed with Zstandard, and what unpacks that is not installed",
            next_step="install imagecache-lib[zstd]",
        ) from None
    return zstandard
