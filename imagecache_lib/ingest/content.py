# SPDX-License-Identifier: Apache-2.0
"""The stage that finds out what an image's content is, and decodes it."""

from __future__ import annotations

import contextlib

from imagecache_lib import errors, model
from imagecache_lib.formats import vhd
from imagecache_lib.formats.inspection import Ending, Finding, Inspection, Uninspected
from imagecache_lib.ingest import decode
from imagecache_lib.ingest.decode import Decoder, Work
from imagecache_lib.ingest.fit import require_fit
from imagecache_lib.ingest.stream import Content
from imagecache_lib.store import evidence
from imagecache_lib.store.evidence import Requirements, Use


class ContentStage:
    """Inspects content and fills the stage file: a :class:`~imagecache_lib.ingest.stream.Consumer`.

    The first chunks are held back until they show what the image is.

    :param content_size: size of the content in bytes, or None if it is not known before its last byte came.
    :param disk_size: virtual size in bytes of the disk that is wanted, or None for the image's own size.
    """

    def __init__(
        self,
        image: model.Image,
        requirements: Requirements,
        work: Work,
        *,
        content_size: int | None,
        disk_size: int | None,
    ) -> None:
        self._image = image
        self._requirements = requirements
        self._work = work
        self._content_size = content_size
        self._disk_size = disk_size
        self._inspection: Inspection | Uninspected = Uninspected()
        if requirements.use is Use.DISK:
            self._inspection = Inspection(image.disk_format, work.rules, vouched=image.digest is not None)
        self._finding: Finding | None = None
        self._decoder: Decoder | None = None
        self._held: list[bytes] = []
        self._taken = 0
        self._closing = contextlib.ExitStack()
        self._closing.callback(self._inspection.close)

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk of the content.

        :raises ImageRejected: as soon as the bytes show that the image is bad.
        :raises DiskTooSmallError: as soon as they show that it is larger than the disk.
        :raises NoSpaceError, BackendError: the filesystem is full, or failed.
        :raises Unstreamable: it has to be converted as a whole.
        """
        self._inspection.feed(chunk)
        self._taken += len(chunk)
        if self._decoder is not None:
            self._decoder.feed(chunk)
        else:
            self._held.append(chunk)
            if isinstance(self._inspection, Uninspected) or self._inspection.finding is not None:
                self._begin_decoding()
        if self._finding is not None and self._finding.format == "raw" and self._content_size is None:
            behind = 0 if self._finding.ending is Ending.NONE else vhd.FOOTER_BYTES
            self._require_fit(self._taken - behind)

    def finish(self) -> Content:
        """Check the whole content and complete the stage file.

        :returns: what the stage file holds.
        :raises: as :meth:`feed`.
        """
        self._inspection.finish()
        decoder = self._decoder or self._begin_decoding()
        virtual_size = decoder.finish()
        inspected = None
        if self._finding is not None:
            if not virtual_size:
                raise errors.ImageRejected(
                    "there is no byte of a disk in it",
                    next_step="have its owner upload the disk under a new id",
                )
            self._require_fit(virtual_size)
            inspected = evidence.INSPECTION_RULES if self._work.rules.strict else None
        return Content(decoder.source_format, decoder.stored_format, virtual_size, inspected=inspected)

    def close(self) -> None:
        """Let go of everything but the stage file."""
        self._closing.close()

    def _begin_decoding(self) -> Decoder:
        self._finding = self._inspection.finding
        if self._finding is not None:
            self._require_beginning_fits(self._finding)
        decoder = decode.choose(
            self._finding,
            self._work,
            wanted=self._requirements.stored_format,
            file_size=self._content_size,
        )
        self._decoder = decoder
        self._closing.callback(decoder.close)
        for chunk in self._held:
            decoder.feed(chunk)
        self._held.clear()
        return decoder

    def _require_beginning_fits(self, finding: Finding) -> None:
        """Refuse what the disk is too small for before it is downloaded, as far as its beginning tells."""
        virtual_size = finding.virtual_size
        if finding.format == "raw" and finding.ending is Ending.NONE:
            virtual_size = self._content_size  # raw bytes of a disk are as many as the guest sees
        if virtual_size is not None:
            self._require_fit(virtual_size)

    def _require_fit(self, virtual_size: int) -> None:
        require_fit(self._image.id, virtual_size, self._disk_size)
