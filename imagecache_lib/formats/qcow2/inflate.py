# SPDX-License-Identifier: Apache-2.0
"""Inflating one compressed cluster. Which library does it never changes the result.

Deflate clusters are raw streams (RFC 1951) that hold one cluster; bytes behind a stream's end belong to its
neighbours, since the table knows a stream's length only in sectors of 512 bytes. Zstandard clusters are one
frame.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from typing import Any

from imagecache_lib import errors

#: Takes what the table says holds the compressed cluster, and the cluster size in bytes; returns exactly one
#: cluster as bytes or bytearray. Raises :class:`ImageRejected`. Called from several threads at once.
Inflate = Callable[["bytes | memoryview", int], "bytes | bytearray"]

_WRONG = "a compressed qcow2 cluster does not hold one cluster of data"


def zlib_inflate(data: bytes | memoryview, size: int) -> bytes:
    """Inflate with the standard library. This one defines what is valid.

    :raises ImageRejected: the stream is broken, or ends before ``size`` bytes.
    """
    try:
        # No more than a cluster is ever produced. QEMU writes 4 KiB windows; RFC 1951 allows 32.
        cluster = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
    except zlib.error as error:
        raise errors.ImageRejected(f"{_WRONG}: {error}") from error
    if len(cluster) != size:
        raise errors.ImageRejected(_WRONG)
    return cluster


def fastest_deflate() -> Inflate:
    """Return libdeflate's inflate if the ``fast`` extra is installed, else zlib's."""
    try:
        import deflate
    except ImportError:
        return zlib_inflate

    def inflate(data: bytes | memoryview, size: int) -> bytes | bytearray:
        try:
            cluster: bytes | bytearray = deflate.deflate_decompress(data, size)
        except (deflate.DeflateError, ValueError):
            # libdeflate refuses a stream that goes on behind the cluster, which the format allows.
            return zlib_inflate(data, size)
        return cluster if len(cluster) == size else zlib_inflate(data, size)

    return inflate


def zstd() -> Inflate | None:
    """Return an inflate for Zstandard clusters, or None if the ``zstd`` extra is not installed."""
    try:
        import zstandard
    except ImportError:
        return None
    local = threading.local()

    def inflate(data: bytes | memoryview, size: int) -> bytes:
        # A decompressor must not be shared between threads.
        decompressor: Any = getattr(local, "decompressor", None)
        if decompressor is None:
            decompressor = local.decompressor = zstandard.ZstdDecompressor()
        try:
            # A frame's header may claim any size, and that is what would be allocated.
            claimed = zstandard.frame_content_size(data)
            if claimed not in (-1, size):
                raise errors.ImageRejected(_WRONG)
            cluster: bytes = decompressor.decompress(data, max_output_size=size, allow_extra_data=True)
        except zstandard.ZstdError as error:
            raise errors.ImageRejected(f"{_WRONG}: {error}") from error
        if len(cluster) != size:
            raise errors.ImageRejected(_WRONG)
        return cluster

    return inflate
