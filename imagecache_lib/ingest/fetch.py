# SPDX-License-Identifier: Apache-2.0
"""The single pass: source, digest, inspection, decoding, stage file. Nothing is published here."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Generator, Iterator

from imagecache_lib import errors, events, model
from imagecache_lib.formats import qemu_img
from imagecache_lib.formats.qcow2.decoder import Unstreamable
from imagecache_lib.ingest import adopt, certificates, dedup, signing
from imagecache_lib.ingest.call import Call
from imagecache_lib.ingest.pipeline import Content, Intake
from imagecache_lib.sources import transfer
from imagecache_lib.store import evidence, reservations
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.reservations import MakeRoom
from imagecache_lib.store.stage import SealedStage, Stage, StageGone
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated

LOG = logging.getLogger(__name__)

#: Tell observers how far a transfer is every so many bytes.
_TELL_EVERY = 16 * 2**20

#: How often one that waits for its turn looks whether its caller still waits, in seconds.
_TURN_SLICE = 0.25

#: Reserve in steps of this many bytes while the source does not say how large the image is.
_UNKNOWN_SIZE_STEP = 16 * 2**20


class Ingest:
    """Brings images into stage files. Safe to share between threads.

    :param make_room: evicts so many bytes if policy allows, and returns how many it freed.
    :param certificate_store: for images whose signature must be verified. None: they are refused.
    """

    def __init__(
        self,
        cache: CacheStore,
        converter: qemu_img.QemuImg,
        observers: events.Observers,
        *,
        make_room: MakeRoom = reservations.nothing_to_free,
        certificate_store: certificates.CertificateStore | None = None,
    ) -> None:
        self._cache = cache
        self._make_room = make_room
        self._certificates = certificate_store
        self._converter = converter
        self._observers = observers
        limit = cache.config.max_concurrent_disk_ops
        self._turns = threading.BoundedSemaphore(limit) if limit else None

    def refuse_impossible(self, call: Call) -> None:
        """Refuse what no fetch could satisfy, before one is begun.

        :raises ConfigError: a verified signature is demanded, and nothing here can verify one.
        """
        if not call.demands_signature:
            return
        if self._certificates is None:
            raise errors.ConfigError(
                "a verified signature is demanded, and there is nowhere to get certificates from",
                image=call.image_id,
                next_step="set certificates_path, or give the manager a certificate store",
            )
        if not signing.is_possible():
            raise errors.ConfigError(
                "a verified signature is demanded, and what verifies signatures is not installed",
                image=call.image_id,
                next_step="install imagecache-lib[signatures]",
            )

    def run(self, call: Call, use: evidence.Use) -> SealedStage:
        """Fetch an image into a stage file of its own, which is the caller's to publish or discard.

        :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, CancelledError: and nothing is left.
        :raises ConfigError: as :meth:`refuse_impossible`.
        """
        self.refuse_impossible(call)
        while True:
            with contextlib.suppress(StageGone):
                return self._run_once(call, use)

    def adopt(
        self, opened: OpenBase, known: evidence.Record | None, call: Call, use: evidence.Use
    ) -> tuple[evidence.Record | None, str]:
        """Check a base that carries no evidence, or too little: :mod:`imagecache_lib.ingest.adopt`."""
        if known is not None:
            return adopt.inspect_again(self._cache, opened, known, call)
        return adopt.adopt(self._cache, opened, call, use)

    def _run_once(self, call: Call, use: evidence.Use) -> SealedStage:
        _source, image = call.describe()
        if use is evidence.Use.FILE and image.converted_from is not None:
            raise errors.ImageNotFound(
                f"all that is left of it is a conversion of its {image.converted_from} content",
                image=call.image_id,
                next_step="upload it anew",
            )
        started = self._cache.host.clock()
        stage = Stage(self._cache, call.name)
        try:
            stage.write_info()
            with self._turn(stage, call):
                content = self._copy_twin(stage, call, image, use)
                if content is None:
                    self._reserve(stage, call, image.size or 0)
                    self._cache.host.trace(TracePoint.INGEST_RESERVED)
                    content = self._fill(stage, call, image, use)
                record = self._seal(stage, call, image, content)
        except BaseException as error:
            self._give_up(stage, call, error)
            raise
        if content.received:
            self._observers(
                events.Fetched(
                    call.name,
                    call.image_id,
                    received=content.received,
                    allocated=stage.allocated,
                    seconds=self._cache.host.clock() - started,
                )
            )
        return SealedStage(stage, record)

    def _copy_twin(self, stage: Stage, call: Call, image: model.Image, use: evidence.Use) -> Content | None:
        """Make it from a base of the same content. None: there is none that is whole."""
        with translated(self._cache.layout.records):
            found = dedup.find(self._cache, call, image, use)
        if found is None:
            return None
        with contextlib.closing(found.opened):
            shared = dedup.share(found, stage)
            if not shared:
                self._reserve(stage, call, found.allocated)
                if not dedup.copy(found, stage, call):
                    stage.clear()
                    return None
        self._observers(events.Copied(call.name, call.image_id, origin=found.record.name, shared=shared))
        record = found.record
        return Content(
            record.source_format, record.stored_format, record.virtual_size, 0, inspected=record.inspected
        )

    def _reserve(self, stage: Stage, call: Call, needed: int) -> None:
        reservations.reserve(
            stage,
            needed,
            self._cache,
            check=call.check,
            make_room=self._make_room,
            deadline=call.request.deadline,
        )

    @contextlib.contextmanager
    def _turn(self, stage: Stage, call: Call) -> Iterator[None]:
        """Wait until few enough others fetch. Whoever waits for this image sees that somebody is at it."""
        if self._turns is None:
            yield
            return
        while not self._turns.acquire(timeout=_TURN_SLICE):
            call.check()
            stage.touch()
        try:
            yield
        finally:
            self._turns.release()

    def _give_up(self, stage: Stage, call: Call, error: BaseException) -> None:
        swept = not stage.is_at_path()
        stage.discard()
        if swept and isinstance(error, errors.BackendError):
            raise StageGone from error
        if isinstance(error, errors.ImageRejected):
            if error.next_step is None:
                error.next_step = "have its owner upload a good image under a new id"
            self._observers(events.Rejected(call.name, call.image_id, reason=error.cause))

    def _fill(self, stage: Stage, call: Call, image: model.Image, use: evidence.Use) -> Content:
        """Pass over the data until it is whole. A clean restart is granted where a resume may be to blame."""
        fetch = call.transfer()
        whole = False
        while True:
            stage.clear()
            try:
                with contextlib.ExitStack() as stack:
                    taken = Intake(
                        stage,
                        call,
                        image,
                        use,
                        self._cache,
                        self._converter,
                        reserve=functools.partial(self._reserve, stage, call),
                        certificate_store=self._certificates,
                        whole=whole,
                    )
                    stack.callback(taken.close)
                    for chunk in stack.enter_context(
                        contextlib.closing(self._watched(fetch, stage, call, image))
                    ):
                        taken.take(chunk)
                    return taken.finish()
            except transfer.StartAgain:
                continue
            except Unstreamable as error:
                LOG.info(
                    "Image %s is fetched once more, to be converted as a whole: %s",
                    call.image_id,
                    error.cause,
                )
                whole = True
            except errors.ImageRejected:
                if not fetch.grant_clean_pass():
                    raise

    def _watched(
        self, fetch: transfer.Transfer, stage: Stage, call: Call, image: model.Image
    ) -> Generator[bytes]:
        """Yield the chunks; reserve as they come if their number is unknown, and tell how far it is."""
        told = 0
        with contextlib.closing(fetch.chunks()) as chunks:
            for chunk in chunks:
                if image.size is None and fetch.offset > stage.reserved:
                    self._reserve(stage, call, fetch.offset + _UNKNOWN_SIZE_STEP)
                yield chunk
                if fetch.offset - told >= _TELL_EVERY or fetch.offset == image.size:
                    told = fetch.offset
                    self._observers(
                        events.Progress(call.name, call.image_id, received=told, total=image.size)
                    )

    def _seal(self, stage: Stage, call: Call, image: model.Image, content: Content) -> evidence.Record:
        """Make data and evidence durable, in this order, before anything can refer to them."""
        base_id = stage.seal()
        found = os.fstat(stage.fd)
        # A conversion that came from another cache proves nothing of the image's own data.
        digest = image.digest if image.converted_from is None else None
        record = evidence.Record(
            name=call.name,
            image_id=call.image_id,
            base_id=base_id,
            inode=found.st_ino,
            size=found.st_size,
            origin=evidence.Origin.FETCHED,
            source_format=image.converted_from or content.source_format,
            stored_format=content.stored_format,
            virtual_size=content.virtual_size,
            digest=digest,
            digest_checked=digest is not None,
            inspected=content.inspected,
            certificates=content.vouching.chain,
            signed_by=content.vouching.signed_by,
        )
        stage.write_info(record)
        self._cache.host.trace(TracePoint.INGEST_SEALED)
        return record
