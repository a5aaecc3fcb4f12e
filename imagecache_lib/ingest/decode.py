# SPDX-License-Identifier: Apache-2.0
"""From the bytes as they arrive to the bytes that are stored: pass through, decode, or spool and convert."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.formats import inspection, qemu_img
from imagecache_lib.formats.qcow2.decoder import StreamDecoder
from imagecache_lib.store import stage as stages
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.stage import Stage, StageGone
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated

#: A guest's disk is counted in sectors of this size, so a raw image ends on a whole one.
SECTOR = 512

#: Formats that qemu-img converts, and whose data may be larger than the file.
_COMPRESSING = ("qcow2", "vmdk")


class Decoder(Protocol):
    """Takes the image's bytes in order and fills a stage file with what is to be stored."""

    #: qemu's name of the stored format.
    stored_format: str

    def write(self, chunk: bytes) -> None:
        """Take the next bytes.

        :raises ImageRejected: they make no sense.
        :raises NoSpaceError: no room for what they decode to.
        """

    def finish(self) -> int:
        """Complete the stage file after the last byte. Returns the virtual size in bytes.

        :raises: as :meth:`write`.
        """

    def close(self) -> None:
        """Let go of everything but the stage file, whether finished or not."""


class PassThrough:
    """Stores the bytes as they come, zeros as holes."""

    def __init__(self, stage: Stage, stored_format: str, virtual_size: int | None) -> None:
        self.stored_format = stored_format
        self._stage = stage
        self._virtual_size = virtual_size
        self._offset = 0

    def write(self, chunk: bytes) -> None:
        self._stage.write(chunk, self._offset)
        self._offset += len(chunk)

    def finish(self) -> int:
        with translated(self._stage.path):
            os.ftruncate(self._stage.fd, self._offset)
        if self._virtual_size is not None:
            return self._virtual_size
        return -(-self._offset // SECTOR) * SECTOR

    def close(self) -> None:
        pass


class Qcow2Stream:
    """Decodes a qcow2 image to raw as it arrives.

    :raises Unstreamable: from :meth:`write` and :meth:`finish`: only the whole file can be converted.
    """

    stored_format = "raw"

    def __init__(
        self,
        stage: Stage,
        *,
        cache: CacheStore,
        file_size: int | None,
        reserve: Callable[[int], None],
    ) -> None:
        self._stage = stage
        self._reserve = reserve
        self._decoder = StreamDecoder(
            stage.content,
            spill=lambda: stages.side_file(cache),
            file_size=file_size,
            max_virtual_size=cache.config.max_virtual_size,
        )

    def write(self, chunk: bytes) -> None:
        with translated(self._stage.path):
            self._decoder.write(chunk)
        self._stage.taken(len(chunk))
        # The tables say what will be stored, long before the data they map has come.
        needed = self._decoder.mapped_bytes + self._decoder.spilled_bytes
        if needed > self._stage.reserved:
            self._reserve(needed)

    def finish(self) -> int:
        with translated(self._stage.path):
            return self._decoder.finish().virtual_size

    def close(self) -> None:
        self._decoder.close()


class SpoolAndConvert:
    """Keeps the bytes in a second stage file and lets qemu-img convert it at the end.

    For the formats whose layout does not let them be decoded as they flow.
    """

    stored_format = "raw"

    def __init__(
        self,
        stage: Stage,
        finding: inspection.Finding,
        *,
        cache: CacheStore,
        converter: qemu_img.QemuImg,
        reserve: Callable[[int], None],
        check: Callable[[], None],
    ) -> None:
        self._stage = stage
        self._check = check
        self._source_format = finding.format
        self._virtual_size = finding.virtual_size or 0
        self._converter = converter
        self._reserve = reserve
        self._cache = cache
        self._spool = Stage(cache, stage.name)
        # What was reserved for the download is filled by the spool now; the stage needs its own later.
        self._spool.reserved, stage.reserved = stage.reserved, 0
        self._offset = 0
        try:
            self._spool.write_info()
            stage.write_info()
        except BaseException:
            self._spool.discard()
            raise

    def write(self, chunk: bytes) -> None:
        self._spool.write(chunk, self._offset)
        self._offset += len(chunk)

    def finish(self) -> int:
        with translated(self._stage.path):
            os.ftruncate(self._spool.fd, self._offset)
            os.ftruncate(self._stage.fd, self._virtual_size)
        self._cache.host.trace(TracePoint.CONVERT)
        try:
            # What the spool has allocated is gone from the free space already.
            self._reserve(self._decoded_bytes())
            self._converter.convert_to_raw(
                self._spool.path, self._source_format, self._stage.path, check=self._check
            )
            self._stage.read_back()
        except errors.ImageRejected as error:
            if not self._spool.is_at_path() or not self._stage.is_at_path():
                # No fault of the image: somebody swept away what qemu-img was to open.
                raise StageGone from error
            raise
        return self._virtual_size

    def _decoded_bytes(self) -> int:
        """Return how much it will be: the others store data as it is, and take no less room than it."""
        if self._source_format in _COMPRESSING:
            with contextlib.suppress(errors.BackendError):  # the conversion will say what is wrong
                return self._converter.mapped_bytes(self._spool.path, self._source_format)
        return self._spool.allocated

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._spool.discard()


def choose(
    finding: inspection.Finding | None,
    stage: Stage,
    *,
    to_raw: bool,
    whole: bool,
    file_size: int | None,
    cache: CacheStore,
    converter: qemu_img.QemuImg,
    reserve: Callable[[int], None],
    check: Callable[[], None],
) -> Decoder:
    """Return how an image becomes what is stored.

    :param finding: what the content is. None: a plain file, such as a kernel, which nobody looks into.
    :param to_raw: store it as raw, whatever it is.
    :param whole: do not decode it as it arrives: that was tried and is not possible.
    :param file_size: of the image's data in bytes, if it is known.
    :param reserve: raises the stage's reservation to so many bytes, or raises NoSpaceError.
    :param check: raises once nobody waits any more.
    """
    if finding is None:
        return PassThrough(stage, "raw", None)
    if finding.format == "raw" or not to_raw:
        return PassThrough(stage, finding.format, finding.virtual_size)
    if finding.format == "qcow2" and not whole:
        return Qcow2Stream(stage, cache=cache, file_size=file_size, reserve=reserve)
    return SpoolAndConvert(stage, finding, cache=cache, converter=converter, reserve=reserve, check=check)
