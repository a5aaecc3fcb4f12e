# SPDX-License-Identifier: Apache-2.0
"""What happens to an image's bytes as they flow by. One object for one pass, and one chain of stages::

Pipeline: counts what arrived, reserves, tells observers
    digest, signature (ingest/digest.py, ingest/signing.py)
    Unpacking, if the image is compressed as a whole (ingest/decompress.py)
        ContentStage: inspection (formats/inspection.py), then a decoder (ingest/decode.py)
"""

from __future__ import annotations

import contextlib
import dataclasses

from imagecache_lib import errors, events, model
from imagecache_lib.ingest import decompress, digest, signing
from imagecache_lib.ingest.aside import Ignoring
from imagecache_lib.ingest.certificates import CertificateStore
from imagecache_lib.ingest.content import ContentStage
from imagecache_lib.ingest.decode import Work
from imagecache_lib.ingest.resumption import Copy
from imagecache_lib.ingest.stream import UNVERIFIED, Consumer, Content, VerifiedSignature
from imagecache_lib.store.evidence import Requirements

#: Tell observers how far a transfer is every so many bytes.
_TELL_EVERY = 16 * 2**20

#: Reserve in steps of this many bytes while it is not sure how large the image is.
_UNKNOWN_SIZE_STEP = 16 * 2**20


class Pipeline:
    """Takes the chunks of one pass, in order, and fills the stage file.

    :param image: as the source describes it.
    :param requirements: what the base image has to prove.
    :param work: what its decoder works with.
    :param certificate_store: for images whose signature must be verified.
    :param disk_size: virtual size in bytes of the disk that is wanted, or None for the image's own size.
    :param hash_pieces: whether the hashes of the pieces of the data are kept.
    :raises ImageRejected: what the source says of the image rules it out.
    :raises ConfigError: what unpacks it is not installed.
    """

    def __init__(
        self,
        image: model.Image,
        requirements: Requirements,
        work: Work,
        *,
        certificate_store: CertificateStore | None,
        disk_size: int | None,
        hash_pieces: bool,
    ) -> None:
        self._image = image
        self._work = work
        self._received = 0
        self._told = 0
        self._is_growing = False
        config, waiter = work.cache.config, work.waiter
        compression = decompress.compression_of(image, requirements.use, config)
        self._copy: Copy | None = None
        if compression is not None and work.resumption is not None:
            self._copy = work.resumption.beside(work.reservation)
            work = dataclasses.replace(work, resumption=None)
        with contextlib.ExitStack() as closing:
            self._content: Consumer[Content] = ContentStage(
                image,
                requirements,
                work,
                # Of the content, which is what is inspected and decoded.
                content_size=image.size if compression is None else None,
                disk_size=disk_size,
            )
            closing.callback(self._content.close)
            if compression is not None:
                self._content = decompress.Unpacking(
                    compression,
                    self._content,
                    waiter=waiter,
                    most=config.max_virtual_size,
                    reservation=work.reservation,
                )
            self._digest = digest.checking(image, waiter, hash_pieces=hash_pieces)
            closing.callback(self._digest.close)
            self._signature: Consumer[VerifiedSignature] = Ignoring(UNVERIFIED)
            if requirements.signed:
                assert certificate_store is not None  # else it was refused before anything was fetched
                trusted = requirements.trusted_certs
                self._signature = signing.Verification(image, certificate_store, trusted, waiter)
            closing.callback(self._signature.close)
            self._closing = closing.pop_all()

    def expect(self, size: int | None) -> None:
        """Reserve room for the data. Call it before the first chunk, once the source has begun to send.

        :param size: length of the data in bytes, or None if that is not sure, to reserve room as it comes.
        :raises NoSpaceError: there is not that much room.
        """
        self._is_growing = size is None
        self._work.reservation.raise_to(size or 0)

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk as it came.

        :raises ImageRejected: as soon as the bytes show that the image is bad.
        :raises DiskTooSmallError: as soon as they show that it is larger than the disk.
        :raises NoSpaceError, BackendError: the filesystem is full, or failed.
        :raises Unstreamable: it has to be converted as a whole.
        """
        self._received += len(chunk)
        reservation = self._work.reservation
        if self._is_growing and self._received > reservation.reserved:
            reservation.raise_to(self._received + _UNKNOWN_SIZE_STEP)
        if self._copy is not None:
            self._copy.append(chunk)
        self._digest.feed(chunk)
        self._signature.feed(chunk)
        self._content.feed(chunk)
        if self._received - self._told >= _TELL_EVERY or self._received == self._image.size:
            self._told = self._received
            if self._received >= _TELL_EVERY:  # less has arrived before anybody reads of it
                self._work.stage.tell(self._received, self._image.size)
            name = self._work.stage.name
            self._work.cache.observers(
                events.Progress(name, self._image.id, received=self._received, total=self._image.size)
            )

    def finish(self) -> Content:
        """Check the whole image and complete the stage file.

        :returns: what the stage file holds.
        :raises: as :meth:`feed`.
        """
        if self._received == 0:
            raise errors.ImageRejected("it has no data", next_step="have its owner upload its data")
        # Before the decoder completes, which for some formats is the expensive part.
        self._work.stage.pieces = self._digest.finish()
        signature = self._signature.finish()
        return dataclasses.replace(self._content.finish(), received=self._received, signature=signature)

    def close(self) -> None:
        """Let go of everything but the stage file."""
        self._closing.close()
