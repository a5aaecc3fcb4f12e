# SPDX-License-Identifier: Apache-2.0
"""From the bytes as they arrive to the bytes that are stored: pass through, decode, or spool and convert."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.config import CacheConfig
from imagecache_lib.formats import foreign, vhd, whole
from imagecache_lib.formats.inspection import Ending, Finding, Rules
from imagecache_lib.formats.qcow2.decoder import StreamDecoder
from imagecache_lib.formats.qcow2.spill import Spill
from imagecache_lib.formats.qemu_img import DataRefused, DiskFile, QemuImg
from imagecache_lib.formats.reader import OpenFile
from imagecache_lib.ingest.resumption import Resumption
from imagecache_lib.ingest.stream import Consumer
from imagecache_lib.store import stage as stages
from imagecache_lib.store.checksums import Checksums
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.reservations import Reservation
from imagecache_lib.store.stage import Stage, StageGone
from imagecache_lib.system.sparse import Piece
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter
from imagecache_lib.system.write_behind import WriteBehind

#: A guest's disk is counted in sectors of this size, so a raw image ends on a whole one.
SECTOR = 512

#: As much of the end of raw content as is looked at: a footer, or the last block of an image of Apple's.
_END = 512

#: As much more than is reserved may be decoded of one chunk of a qcow2 image before more is reserved.
_UNRESERVED = 64 * 2**20


class Decoder(Consumer[int], Protocol):
    """Fills a stage file with what is to be stored. Its result is the virtual size in bytes.

    :meth:`feed` and :meth:`finish` raise ImageRejected if the bytes make no sense, and NoSpaceError if there
    is no room for what they decode to.
    """

    #: qemu's name of the source's format, as far as it is known. :meth:`finish` settles it.
    source_format: str
    #: qemu's name of the stored format.
    stored_format: str


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A chunk that is written as it came."""

    offset: int
    data: bytes

    def pieces(self) -> list[tuple[int, Piece]]:
        return [(self.offset, (self.data, 0, len(self.data)))]


class _InOrder:
    """Writes chunks one behind the other: what a stage file is filled with unchanged.

    Its methods raise NoSpaceError and BackendError, perhaps of a chunk before.

    :param at_once: whether a chunk is in the file when :meth:`write` returns, since another fetch may go on
        behind it; else a thread of its own writes it.
    """

    def __init__(self, stage: Stage, *, at_once: bool) -> None:
        self._stage = stage
        self._behind = None if at_once else WriteBehind(stage.content, 1, "imagecache-write")
        #: Bytes so far.
        self.length = 0

    def write(self, chunk: bytes) -> None:
        """Take the next chunk."""
        if self._behind is None:
            self._stage.write(chunk, self.length)
        else:
            with translated(self._stage.path):
                self._behind.put(_Chunk(self.length, chunk))
        self.length += len(chunk)

    def finish(self) -> None:
        """Wait until everything is written, and give the file its size."""
        with translated(self._stage.path):
            if self._behind is not None:
                self._behind.drain()
            self._stage.content.truncate(self.length)

    def close(self) -> None:
        """End the thread. Nothing is written after that."""
        if self._behind is not None:
            self._behind.close()


class PassThrough:
    """Stores the bytes of a raw disk as they come, zeros as holes.

    :param ending: what may follow the data.
    :param inspected: whether it must not be something that only its end shows to be no disk.
    """

    stored_format = "raw"

    def __init__(self, work: Work, ending: Ending = Ending.NONE, *, inspected: bool = False) -> None:
        self.source_format = "raw"
        self._out = _InOrder(work.stage, at_once=work.resumption is not None)
        self._ending = ending
        self._inspected = inspected
        self._end = b""
        self._held = b""

    def feed(self, chunk: bytes) -> None:
        self._end = (self._end + chunk[-_END:])[-_END:]
        if self._ending is not Ending.NONE:
            # What may be a footer is held back: what was written is summed up, and cannot be taken back.
            whole = self._held + chunk
            chunk, self._held = whole[: -vhd.FOOTER_BYTES], whole[-vhd.FOOTER_BYTES :]
        self._out.write(chunk)

    def finish(self) -> int:
        if self._inspected:
            foreign.refuse_end(self._end)
        if vhd.is_fixed(self._held, self._out.length):
            self.source_format = "vpc"
        elif self._ending is Ending.DEMANDED:
            raise errors.ImageRejected(
                "its content is raw, claimed to be vhd: no VHD's footer is at its start or its end",
                next_step="have its owner state the format that it has",
            )
        else:
            self._out.write(self._held)
        self._out.finish()
        return -(-self._out.length // SECTOR) * SECTOR

    def close(self) -> None:
        self._out.close()


@dataclasses.dataclass(frozen=True)
class Work:
    """What the decoders of one pass work with.

    :param stage: is filled.
    :param reservation: of the stage; raised before more is written than was known to come.
    :param rules: of inspection, as far as they are judged on a whole file.
    :param resumption: keeps what comes for another fetch, should this one break off; or None for content that
        is not what the source sends.
    :param whole: convert an image as a whole: decoding it as it arrives was tried and is not possible.
    """

    stage: Stage
    cache: CacheStore
    reservation: Reservation
    converter: QemuImg
    rules: Rules
    waiter: Waiter
    resumption: Resumption | None
    whole: bool = False


class Keep:
    """Stores an image in the format that it has, once qemu-img has read all of what came."""

    def __init__(self, finding: Finding, work: Work) -> None:
        self.source_format = self.stored_format = finding.format
        self._stage = work.stage
        self._work = work
        self._out = _InOrder(work.stage, at_once=work.resumption is not None)

    def feed(self, chunk: bytes) -> None:
        self._out.write(chunk)

    def finish(self) -> int:
        self._out.finish()
        try:
            disk, work = DiskFile(self._stage.path, self.stored_format), self._work
            before = self._seen()
            size = settle(self._stage.fd, disk, work.rules, work.converter, work.waiter)
            _read_through(disk, size, work)
            if self._seen() != before:
                self._require_unchanged()
            return size
        except errors.ImageCacheError as error:
            if not self._stage.is_at_path():
                raise StageGone from error
            raise

    def _seen(self) -> tuple[int, int]:
        with translated(self._stage.path):
            found = os.fstat(self._stage.fd)
        return found.st_size, found.st_mtime_ns

    def _require_unchanged(self) -> None:
        """Refuse a file that is not what came any more: a program that nothing shuts in may write to it.

        A filesystem that several hosts share may tell of another time though nothing was changed.
        """
        found = Checksums()
        with translated(self._stage.path):
            found.read_back(self._stage.fd, self._work.waiter)
        if self._seen()[0] != self._out.length or found.differing(self._stage.checksums):
            raise errors.BackendError(
                "what came was changed by what was to read it only",
                path=self._stage.path,
                next_step="find out what runs in the place of qemu-img; another host may do it",
            )

    def close(self) -> None:
        self._out.close()


def settle(fd: int, disk: DiskFile, rules: Rules, converter: QemuImg, waiter: Waiter) -> int:
    """Return the virtual size of a whole image on which its own header and the program that serves it agree.

    :param fd: the disk's file, open for reading.
    :raises ImageRejected: they do not agree, or the program does not open the image, or the rules refuse it,
        or its file lacks data that its tables map.
    :raises BackendError: the host is at fault, and not the image.
    """
    image = OpenFile(fd)
    stated = rules.judge(image, disk.format).virtual_size
    whole.require(image, disk.format, waiter)
    try:
        seen = converter.virtual_size(disk, waiter=waiter)
    except DataRefused as error:
        raise errors.ImageRejected(
            f"it cannot be opened as {disk.format}: {error.cause}",
            next_step="have its owner upload a good image under a new id",
        ) from error
    if seen != stated:
        raise errors.ImageRejected(
            f"its header states {stated} bytes for the disk, and qemu-img reads {seen}",
            next_step="have its owner convert it to qcow2 or raw, and upload that",
        )
    return seen


def _read_through(disk: DiskFile, virtual_size: int, work: Work) -> None:
    """Refuse an image that is kept as it is, and of which a guest could not read all.

    :raises ImageRejected: some of it cannot be read.
    :raises BackendError: the host is at fault, and not the image.
    """
    try:
        work.converter.read_through(disk, virtual_size, waiter=work.waiter)
    except DataRefused as error:
        raise errors.ImageRejected(
            f"not all of it can be read as {disk.format}: {error.cause}",
            next_step="have its owner upload a good image under a new id",
        ) from error


class Qcow2Stream:
    """Decodes a qcow2 image to raw as it arrives.

    :raises Unstreamable: from :meth:`feed` and :meth:`finish`: only the whole file can be converted.
    """

    source_format = "qcow2"
    stored_format = "raw"

    def __init__(self, work: Work, file_size: int | None) -> None:
        self._stage = work.stage
        self._reservation = work.reservation
        self._waiter = work.waiter
        self._copy = None if work.resumption is None else work.resumption.beside(work.reservation)
        self._decoder = StreamDecoder(
            work.stage.content,
            spill=Spill(lambda: stages.side_file(work.cache)),
            file_size=file_size,
            max_virtual_size=work.cache.config.max_virtual_size,
            leave=self,
        )

    def require(self, needed: int) -> None:
        """Let the decoder go on with a chunk while the caller waits, and there is room for what it maps."""
        self._waiter.check()
        if needed > self._reservation.reserved + _UNRESERVED:
            self._reservation.raise_to(needed)

    def feed(self, chunk: bytes) -> None:
        if self._copy is not None:
            self._copy.append(chunk)
        with translated(self._stage.path):
            self._decoder.write(chunk)
        # The tables say what will be stored, long before the data they map has come.
        needed = self._decoder.mapped_bytes + self._decoder.spilled_bytes
        self._reservation.raise_to(needed)

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

    def __init__(self, finding: Finding, work: Work) -> None:
        self.source_format = finding.format
        self._work = work
        self._stage = stage = work.stage
        self._spool = Stage(work.cache, stage.name)
        # What was reserved for the download is filled by the spool now; the stage needs its own later.
        self._spool.reserved, stage.reserved = stage.reserved, 0
        self._out = _InOrder(self._spool, at_once=work.resumption is not None)
        try:
            self._spool.write_info()
            stage.write_info()
            if work.resumption is not None:
                work.resumption.hold(self._spool)
        except BaseException:
            self._spool.discard()
            raise

    def feed(self, chunk: bytes) -> None:
        self._out.write(chunk)

    def finish(self) -> int:
        self._out.finish()
        self._work.cache.host.trace(TracePoint.CONVERT)
        try:
            return self._convert()
        except errors.ImageCacheError as error:
            if not self._spool.is_at_path() or not self._stage.is_at_path():
                # No fault of the image: another program swept away what qemu-img was to open.
                raise StageGone from error
            raise

    def _convert(self) -> int:
        work = self._work
        source = DiskFile(self._spool.path, self.source_format)
        virtual_size = settle(self._spool.fd, source, work.rules, work.converter, work.waiter)
        with translated(self._stage.path):
            os.ftruncate(self._stage.fd, virtual_size)
        # The spool is whole, and what it has allocated is gone from the free space already. It took over what
        # an attempt to decode the image as it arrives may have reserved, far more than its file.
        self._spool.reserved = 0
        self._spool.write_info()
        work.reservation.raise_to(min(self._decoded_bytes(source), virtual_size))
        work.converter.convert_to_raw(source, self._stage.path, waiter=work.waiter)
        self._stage.read_back(work.waiter)
        return virtual_size

    def _decoded_bytes(self, source: DiskFile) -> int:
        """Return the most bytes that the raw image takes.

        They may be far more than the file has: clusters are compressed, and a table may name one block of the
        file for every block of the disk.
        """
        work = self._work
        counted = whole.mapped_bytes(OpenFile(self._spool.fd), source.format, work.waiter)
        if counted is not None:
            return counted
        try:
            return work.converter.mapped_bytes(source, waiter=work.waiter)
        except DataRefused:  # the conversion will say what is wrong
            return self._spool.allocated

    def close(self) -> None:
        self._out.close()
        resumption = self._work.resumption
        if resumption is None or not resumption.holds(self._spool):
            with contextlib.suppress(OSError):
                self._spool.discard()


def choose(finding: Finding | None, work: Work, *, wanted: str | None, file_size: int | None) -> Decoder:
    """Return the decoder that turns an image into what is stored.

    :param finding: what the content is, or None for a plain file, such as a kernel, which is not inspected.
    :param wanted: qemu's name of the format that the base must have, or None if any format will do.
    :param file_size: of the image's data in bytes, if it is known.
    :raises ImageRejected: the format that is wanted is neither raw nor the image's own.
    """
    is_raw = finding is None or finding.format == "raw" or finding.ending is not Ending.NONE
    to_raw = finding is not None and _is_converted(finding, wanted, work.cache.config)
    if work.resumption is not None and (is_raw or not to_raw):
        work.resumption.hold(work.stage)
    if finding is None:
        return PassThrough(work)
    if is_raw:
        return PassThrough(work, finding.ending, inspected=work.rules.strict)
    if not to_raw:
        return Keep(finding, work)
    if finding.format == "qcow2" and not work.whole:
        return Qcow2Stream(work, file_size)
    return SpoolAndConvert(finding, work)


def _is_converted(finding: Finding, wanted: str | None, config: CacheConfig) -> bool:
    """Whether the image is stored as raw, whatever its own format.

    :raises ImageRejected: the format that is wanted is neither raw nor the image's own.
    """
    # What programs read different sizes from is the same for all of them once it is raw.
    keepable = finding.one_size and finding.ending is not Ending.DEMANDED
    if wanted is None:
        return config.force_raw_images or not keepable
    if wanted != "raw" and (wanted != finding.format or not keepable):
        kept = finding.format if keepable else "raw"
        raise errors.ImageRejected(
            f"it is {finding.format}, to be stored as {kept}, and its overlay needs a base that is {wanted}",
            next_step="find out which image the overlay was made from",
        )
    return wanted == "raw"
