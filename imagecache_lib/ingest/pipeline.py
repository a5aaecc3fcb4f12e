# SPDX-License-Identifier: Apache-2.0
"""What happens to an image's bytes as they flow by: digest, inspection, decoding. One object for one pass."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

from imagecache_lib import errors, model
from imagecache_lib.formats import inspection, qemu_img
from imagecache_lib.ingest import certificates, decode, decompress, digest, signing
from imagecache_lib.ingest.call import Call
from imagecache_lib.store import directory as store
from imagecache_lib.store import evidence
from imagecache_lib.store.stage import Stage

_NOBODY = signing.Vouching()


@dataclasses.dataclass(frozen=True)
class Content:
    """What a pass found.

    :param source_format: what the source's content is (``gpt`` counts as raw); ``raw+gzip`` if it came
        compressed.
    :param stored_format: qemu's name of what the stage file holds.
    :param virtual_size: in bytes.
    :param received: bytes of the source. 0: they were in the cache already.
    :param inspected: version of the inspection rules it passed. None: it was not inspected as a disk.
    :param vouching: who signed it, as far as that was verified.
    """

    source_format: str
    stored_format: str
    virtual_size: int
    received: int
    inspected: int | None
    vouching: signing.Vouching = _NOBODY


class Intake:
    """Takes the chunks of one pass, in order, and fills the stage file.

    :param reserve: raises the stage's reservation to so many bytes, or raises NoSpaceError.
    :param certificate_store: for images whose signature must be verified.
    :param whole: convert it as a whole, since decoding it as it arrives was tried and is not possible.
    """

    def __init__(
        self,
        stage: Stage,
        call: Call,
        image: model.Image,
        use: evidence.Use,
        cache: store.CacheStore,
        converter: qemu_img.QemuImg,
        *,
        reserve: Callable[[int], None],
        certificate_store: certificates.CertificateStore | None,
        whole: bool,
    ) -> None:
        self._stage = stage
        self._call = call
        self._image = image
        self._cache = cache
        self._converter = converter
        self._reserve = reserve
        self._whole = whole
        self._closing = contextlib.ExitStack()
        self._inspection = self._new_inspection() if use is evidence.Use.DISK else None
        compression = decompress.compression_of(image, use, cache.config)
        self._unpacking = (
            decompress.Unpacking(compression, call, most=cache.config.max_virtual_size, reserve=reserve)
            if compression is not None
            else None
        )
        # Of the content, which is what is inspected and decoded.
        self._content_size = image.size if self._unpacking is None else None
        self._finding: inspection.Finding | None = None
        self._decoder: decode.Decoder | None = None
        self._held: list[bytes] = []
        self._received = 0
        self._digest = digest.StreamDigest(image.digest)
        self._closing.callback(self._digest.close)
        self._verification = self._new_verification(certificate_store)

    def _new_verification(self, store: certificates.CertificateStore | None) -> signing.Verification | None:
        if not self._call.demands_signature:
            return None
        assert store is not None  # else it was refused before anything was fetched
        try:
            verification = signing.Verification(self._image, store, self._call.trusted_certs)
        except BaseException:
            self.close()
            raise
        self._closing.callback(verification.close)
        return verification

    def _new_inspection(self) -> inspection.Inspection:
        config = self._cache.config
        return inspection.Inspection(
            self._image.disk_format,
            vmdk_allowed_types=config.vmdk_allowed_types,
            max_virtual_size=config.max_virtual_size,
            strict=not config.disable_deep_image_inspection,
        )

    def take(self, chunk: bytes) -> None:
        """Take the next chunk. The first ones are held back until they show what the image is.

        :raises ImageRejected: as soon as the bytes show that the image is bad.
        :raises DiskTooSmallError: as soon as they show that it is larger than the disk.
        :raises NoSpaceError, BackendError: the filesystem is full, or failed.
        :raises Unstreamable: it has to be converted as a whole.
        """
        self._received += len(chunk)
        self._digest.feed(chunk)
        if self._verification is not None:
            self._verification.feed(chunk)
        if self._unpacking is None:
            self._take_content(chunk)
            return
        for piece in self._unpacking.feed(chunk):
            self._take_content(piece)
            if self._finding is not None and self._finding.format == "raw":
                self._call.require_fit(self._unpacking.produced)

    def _take_content(self, chunk: bytes) -> None:
        if self._inspection is not None:
            self._finding = self._inspection.feed(chunk)
        if self._decoder is not None:
            self._decoder.write(chunk)
            return
        self._held.append(chunk)
        if self._inspection is None or self._finding is not None:
            self._begin_decoding()

    def finish(self) -> Content:
        """Check the whole and complete the stage file. Raises as :meth:`take`."""
        if self._received == 0:
            raise errors.ImageRejected("it has no data", next_step="have its owner upload its data")
        if self._unpacking is not None:
            self._unpacking.finish()
        if self._inspection is not None:
            self._finding = self._inspection.finish()
        # Before the decoder completes, which for some formats is the expensive part.
        if mismatch := self._digest.mismatch():
            raise errors.ImageRejected(
                mismatch, next_step="have its owner upload a good image under a new id"
            )
        vouching = self._verification.finish() if self._verification is not None else _NOBODY
        decoder = self._decoder or self._begin_decoding()
        strict = self._finding is not None and not self._cache.config.disable_deep_image_inspection
        source_format = self._finding.format if self._finding is not None else decoder.stored_format
        if self._unpacking is not None:
            source_format = f"{source_format}+{self._unpacking.compression}"
        return Content(
            source_format,
            decoder.stored_format,
            decoder.finish(),
            self._received,
            inspected=evidence.INSPECTION_RULES if strict else None,
            vouching=vouching,
        )

    def close(self) -> None:
        """Let go of everything but the stage file."""
        self._closing.close()

    def _begin_decoding(self) -> decode.Decoder:
        self._require_fit()
        self._decoder = decoder = decode.choose(
            self._finding,
            self._stage,
            to_raw=self._to_raw(),
            whole=self._whole,
            file_size=self._content_size,
            cache=self._cache,
            converter=self._converter,
            reserve=self._reserve,
            check=self._call.check,
        )
        self._closing.callback(decoder.close)
        for chunk in self._held:
            decoder.write(chunk)
        self._held.clear()
        return decoder

    def _require_fit(self) -> None:
        """Refuse what the disk is too small for before it is downloaded, as far as its beginning tells."""
        if self._finding is None:
            return
        virtual_size = self._finding.virtual_size
        if virtual_size is None:
            virtual_size = self._content_size  # raw bytes of a disk are as many as the guest sees
        if virtual_size is not None:
            self._call.require_fit(virtual_size)

    def _to_raw(self) -> bool:
        """Whether the image is converted.

        :raises ImageRejected: the format that the call needs is neither raw nor the image's own.
        """
        wanted = self._call.stored_format
        if wanted is None:
            return self._cache.config.force_raw_images
        if self._finding is not None and wanted not in ("raw", self._finding.format):
            raise errors.ImageRejected(
                f"it is {self._finding.format}, and its overlay needs a base that is {wanted}",
                next_step="find out which image the overlay was made from",
            )
        return wanted == "raw"
