# SPDX-License-Identifier: Apache-2.0
"""Inflating compressed clusters. Which library does it never changes the result.

Deflate clusters are raw streams (RFC 1951) that hold one cluster; bytes behind a stream's end belong to its
neighbours, since the table knows a stream's length only in sectors of 512 bytes. Zstandard clusters are one
frame.
"""

from __future__ import annotations

import abc
import struct
import threading
import zlib
from collections.abc import Sequence
from typing import Any

from imagecache_lib import errors
from imagecache_lib.system.sparse import Buffer

_WRONG = "a compressed qcow2 cluster does not hold one cluster of data"


class Inflater(abc.ABC):
    """Inflates what the table says holds a compressed cluster to exactly one cluster. Safe to share between
    threads."""

    @abc.abstractmethod
    def one(self, data: bytes | memoryview, size: int) -> Buffer:
        """Return the cluster.

        :param size: bytes of a cluster.
        :raises ImageRejected: the stream is broken, or ends before ``size`` bytes.
        """

    def all(self, clusters: Sequence[bytes | memoryview], size: int) -> Sequence[Buffer]:
        """Return several clusters in their order, as :meth:`one` does.

        All threads take turns to run the interpreter's code, so that as little of it as possible lies between
        two clusters.
        """
        return [self.one(data, size) for data in clusters]


class Zlib(Inflater):
    """Inflates with the standard library. This one defines what is valid."""

    def one(self, data: bytes | memoryview, size: int) -> bytes:
        try:
            # No more than a cluster is ever produced. QEMU writes 4 KiB windows; RFC 1951 allows 32.
            cluster = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        except zlib.error as error:
            raise errors.ImageRejected(f"{_WRONG}: {error}") from error
        if len(cluster) != size:
            raise errors.ImageRejected(_WRONG)
        return cluster


class _Libdeflate(Inflater):
    """Inflates with libdeflate, and what that refuses with zlib.

    :param library: the module ``deflate``.
    """

    def __init__(self, library: Any) -> None:
        self._decompress = library.deflate_decompress
        self._refusals = (library.DeflateError, ValueError)
        self._zlib = Zlib()

    def one(self, data: bytes | memoryview, size: int) -> Buffer:
        try:
            cluster: bytearray = self._decompress(data, size)
        except self._refusals:
            # libdeflate refuses a stream that goes on behind the cluster, which the format allows.
            return self._zlib.one(data, size)
        return cluster if len(cluster) == size else self._zlib.one(data, size)

    def all(self, clusters: Sequence[bytes | memoryview], size: int) -> Sequence[Buffer]:
        decompress = self._decompress
        try:
            found: list[bytearray] = [decompress(data, size) for data in clusters]
        except self._refusals:
            return super().all(clusters, size)
        if all(len(cluster) == size for cluster in found):
            return found
        return super().all(clusters, size)


class _Zstandard(Inflater):
    """Inflates Zstandard frames.

    :param library: the module ``zstandard``.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        # A decompressor must not be shared between threads.
        self._local = threading.local()
        # Not every build of the library has it.
        self._has_many = hasattr(library.ZstdDecompressor, "multi_decompress_to_buffer")

    def one(self, data: bytes | memoryview, size: int) -> bytes:
        try:
            # A frame's header may claim any size, and that is what would be allocated.
            claimed = self._library.frame_content_size(data)
            if claimed not in (-1, size):
                raise errors.ImageRejected(_WRONG)
            cluster: bytes = self._decompressor().decompress(
                data, max_output_size=size, allow_extra_data=True
            )
        except self._library.ZstdError as error:
            raise errors.ImageRejected(f"{_WRONG}: {error}") from error
        if len(cluster) != size:
            raise errors.ImageRejected(_WRONG)
        return cluster

    def all(self, clusters: Sequence[bytes | memoryview], size: int) -> Sequence[Buffer]:
        if not self._has_many:
            return super().all(clusters, size)
        sizes = struct.pack(f"={len(clusters)}Q", *[size] * len(clusters))
        try:
            # One call for all of them. It inflates no more than it is told to, whatever the frames claim.
            found = self._decompressor().multi_decompress_to_buffer(list(clusters), decompressed_sizes=sizes)
        except (self._library.ZstdError, ValueError):
            # Which one it is, and whether it is a frame that another way accepts.
            return super().all(clusters, size)
        return [memoryview(segment) for segment in found]

    def _decompressor(self) -> Any:
        decompressor: Any = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = self._local.decompressor = self._library.ZstdDecompressor()
        return decompressor


def fastest_deflate() -> Inflater:
    """Return libdeflate's inflate if the ``fast`` extra is installed, else zlib's."""
    try:
        import deflate
    except ImportError:
        return Zlib()
    return _Libdeflate(deflate)


def zstd() -> Inflater | None:
    """Return an inflater of Zstandard clusters, or None if the ``zstd`` extra is not installed."""
    try:
        import zstandard
    except ImportError:
        return None
    return _Zstandard(zstandard)
