# SPDX-License-Identifier: Apache-2.0
"""From the bytes as they arrive to the bytes that are stored: pass through, decode, or spool and convert."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.formats import vhd
from imagecache_lib.formats.inspection import Ending, Finding, Rules
from imagecache_lib.formats.qcow2.decoder import StreamDecoder
from imagecache_lib.formats.qemu_img import DataRefused, DiskFile, QemuImg
from imagecache_lib.formats.reader import OpenFile
from imagecache_lib.ingest.stream import Consumer
from imagecache_lib.store import stage as stages
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.stage import Stage, StageGone
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated

#: A guest's disk is counted in sectors of this size, so a raw image ends on a whole one.
SECTOR = 512

#: Formats that qemu-img converts, and whose data may be larger than the file.
_COMPRESSING = ("qcow2", "vmdk")


class Decoder(Consumer[int], Protocol):
    """Fills a stage file with what is to be stored. Its result is the virtual size in bytes.

    :meth:`feed` and :meth:`finish` raise ImageRejected if the bytes make no sense, and NoSpaceError if there
    is no room for what they decode to.
    """

    #: qemu's name of the source's format, as far as it is known. :meth:`finish` settles it.
    source_format: str
    #: qemu's name of the stored format.
    stored_format: str


class PassThrough:
    """Stores the bytes of a raw disk as they come, zeros as holes."""

    stored_format = "raw"

    def __init__(self, stage: Stage, ending: Ending = Ending.NONE) -> None:
        self.source_format = "raw"
        self._stage = stage
        self._ending = ending
        self._held = b""
        self._offset = 0

    def feed(self, chunk: bytes) -> None:
        if self._ending is not Ending.NONE:
            # What may be a footer is held back: what was written is summed up, and cannot be taken back.
            whole = self._held + chunk
            chunk, self._held = whole[: -vhd.FOOTER_BYTES], whole[-vhd.FOOTER_BYTES :]
        self._write(chunk)

    def _write(self, chunk: bytes) -> None:
        self._stage.write(chunk, self._offset)
        self._offset += len(chunk)

    def finish(self) -> int:
        if vhd.is_fixed(self._held, self._offset):
            self.source_format = "vpc"
        elif self._ending is Ending.DEMANDED:
            raise errors.ImageRejected(
                "its content is raw, claimed to be vhd: no VHD's footer is at its start or its end",
                next_step="have its owner state the format that it has",
            )
        else:
            self._write(self._held)
        with translated(self._stage.path):
            self._stage.content.truncate(self._offset)
        return -(-self._offset // SECTOR) * SECTOR

    def close(self) -> None:
        pass


class Keep:
    """Stores an image in the format that it has, once qemu-img opens what came."""

    def __init__(
        self, stage: Stage, finding: Finding, *, rules: Rules, converter: QemuImg, check: Callable[[], None]
    ) -> None:
        self.source_format = self.stored_format = finding.format
        self._stage = stage
        self._rules = rules
        self._converter = converter
        self._check = check
        self._offset = 0

    def feed(self, chunk: bytes) -> None:
        self._stage.write(chunk, self._offset)
        self._offset += len(chunk)

    def finish(self) -> int:
        with translated(self._stage.path):
            self._stage.content.truncate(self._offset)
        try:
            return settle(
                self._stage.fd,
                self._stage.path,
                self.stored_format,
                self._rules,
                self._converter,
                self._check,
            )
        except errors.ImageCacheError as error:
            if not self._stage.is_at_path():
                raise StageGone from error
            raise

    def close(self) -> None:
        pass


def settle(
    fd: int, path: str, format: str, rules: Rules, converter: QemuImg, check: Callable[[], None]
) -> int:
    """Return the virtual size of a whole image on which its own header and the program that serves it agree.

    :param fd: the file at ``path``, open for reading.
    :raises ImageRejected: they do not, or the program does not open it, or the rules refuse it.
    :raises BackendError: the host is at fault.
    """
    stated = rules.judge(OpenFile(fd), format).virtual_size
    try:
        seen = converter.virtual_size(DiskFile(path, format), check=check)
    except DataRefused as error:
        raise errors.ImageRejected(
            f"it cannot be opened as {format}: {error.cause}",
            next_step="have its owner upload a good image under a new id",
        ) from error
    if seen != stated:
        raise errors.ImageRejected(
            f"its header states {stated} bytes for the disk, and qemu-img reads {seen}",
            next_step="have its owner convert it to qcow2 or raw, and upload that",
        )
    return seen


class Qcow2Stream:
    """Decodes a qcow2 image to raw as it arrives.

    :raises Unstreamable: from :meth:`feed` and :meth:`finish`: only the whole file can be converted.
    """

    source_format = "qcow2"
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

    def feed(self, chunk: bytes) -> None:
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
        finding: Finding,
        *,
        cache: CacheStore,
        rules: Rules,
        converter: QemuImg,
        reserve: Callable[[int], None],
        check: Callable[[], None],
    ) -> None:
        self.source_format = finding.format
        self._stage = stage
        self._check = check
        self._rules = rules
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

    def feed(self, chunk: bytes) -> None:
        self._spool.write(chunk, self._offset)
        self._offset += len(chunk)

    def finish(self) -> int:
        with translated(self._spool.path):
            os.ftruncate(self._spool.fd, self._offset)
        self._cache.host.trace(TracePoint.CONVERT)
        try:
            return self._convert()
        except errors.ImageCacheError as error:
            if not self._spool.is_at_path() or not self._stage.is_at_path():
                # No fault of the image: somebody swept away what qemu-img was to open.
                raise StageGone from error
            raise

    def _convert(self) -> int:
        source = DiskFile(self._spool.path, self.source_format)
        virtual_size = settle(
            self._spool.fd, self._spool.path, source.format, self._rules, self._converter, self._check
        )
        with translated(self._stage.path):
            os.ftruncate(self._stage.fd, virtual_size)
        # What the spool has allocated is gone from the free space already.
        self._reserve(self._decoded_bytes(source))
        self._converter.convert_to_raw(source, self._stage.path, check=self._check)
        self._stage.read_back()
        return virtual_size

    def _decoded_bytes(self, source: DiskFile) -> int:
        """Return how much it will be: the others store data as it is, and take no less room than it."""
        if source.format in _COMPRESSING:
            with contextlib.suppress(DataRefused):  # the conversion will say what is wrong
                return self._converter.mapped_bytes(source, check=self._check)
        return self._spool.allocated

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._spool.discard()


def choose(
    finding: Finding | None,
    stage: Stage,
    *,
    to_raw: bool,
    whole: bool,
    file_size: int | None,
    cache: CacheStore,
    rules: Rules,
    converter: QemuImg,
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
        return PassThrough(stage)
    if finding.format == "raw" or finding.ending is not Ending.NONE:
        return PassThrough(stage, finding.ending)
    if not to_raw:
        return Keep(stage, finding, rules=rules, converter=converter, check=check)
    if finding.format == "qcow2" and not whole:
        return Qcow2Stream(stage, cache=cache, file_size=file_size, reserve=reserve)
    return SpoolAndConvert(
        stage, finding, cache=cache, rules=rules, converter=converter, reserve=reserve, check=check
    )
