# SPDX-License-Identifier: Apache-2.0
"""The single pass: source, digest, inspection, decoding, stage file. Nothing is published here."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterator
from typing import Protocol

from imagecache_lib import errors, events, model
from imagecache_lib.formats import qemu_img
from imagecache_lib.formats.inspection import Rules
from imagecache_lib.ingest import adopt, certificates, decompress, dedup, download, signing
from imagecache_lib.ingest.call import Call, origin_of
from imagecache_lib.ingest.checked_certificates import CheckedCertificates
from imagecache_lib.ingest.decode import Work
from imagecache_lib.ingest.producer import BaseRequest, NotPrepared
from imagecache_lib.ingest.resumption import Resumption
from imagecache_lib.ingest.stream import Content
from imagecache_lib.sources import checked, transfer
from imagecache_lib.sources.identity import identity
from imagecache_lib.sources.interface import ImageSource, SourceRefused
from imagecache_lib.sources.retry import DeadlinePassed
from imagecache_lib.store import base_attributes, evidence, failures
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.evictor import Evictor
from imagecache_lib.store.evidence import Unmet
from imagecache_lib.store.failures import Failure
from imagecache_lib.store.reservations import Reservation
from imagecache_lib.store.stage import SealedStage, Stage, StageGone
from imagecache_lib.system import threads
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

#: How often one that waits for a slot looks whether its caller still waits, in seconds.
_SLOT_SLICE = 0.25


class DiskOps(Protocol):
    """Limits how many threads fetch and convert at a time: a :class:`threading.Semaphore` will do."""

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a slot. Returns False if no slot became free within ``timeout`` seconds."""

    def release(self) -> None:
        """Give the slot back."""


class Ingest:
    """Brings images into stage files. Safe to share between threads.

    :param evictor: asked for room.
    :param certificate_store: for images whose signature must be verified, or None for the certificates in
        ``certificates_path``, without which such images are refused.
    :param disk_ops: limits how many threads fetch and convert at a time, together with all other users of the
        same object; or None for ``max_concurrent_disk_ops`` in this process, whichever backends their disks
        have.
    """

    def __init__(
        self,
        cache: CacheStore,
        evictor: Evictor,
        *,
        certificate_store: certificates.CertificateStore | None = None,
        disk_ops: DiskOps | None = None,
    ) -> None:
        config = cache.config
        if certificate_store is None and config.certificates_path is not None:
            certificate_store = certificates.DirectoryCertificates(config.certificates_path)
        self.cache = cache
        self.evictor = evictor
        self.converter = qemu_img.QemuImg(config, cache.host)
        self.certificates = certificate_store
        self._disk_ops = disk_ops
        self._slots = os.getpid(), self._new_slots()
        self._making_slots = threads.lock()

    def request(self, call: Call, use: evidence.Use) -> BaseRequest:
        """Return the base image that a call needs, as a lease takes it."""
        producer = ImageProducer(self, call, use)
        return BaseRequest(call.name, producer.requirements, producer, call.waiter, image_id=call.image_id)

    @contextlib.contextmanager
    def slot(self, stage: Stage, waiter: Waiter) -> Iterator[None]:
        """Wait until fewer than the allowed number of threads fetch, and count as one of them in the body.

        Meanwhile the stage shows callers that wait for the same image that this process is making it.
        """
        slots = self._own_slots()
        if slots is None:
            yield
            return
        while not slots.acquire(True, _SLOT_SLICE):
            waiter.check()
            stage.touch()
        try:
            yield
        finally:
            slots.release()

    def _own_slots(self) -> DiskOps | None:
        """Return the slots of this process: in a forked child nobody would give back those of its parent."""
        if self._disk_ops is not None:
            return self._disk_ops
        with self._making_slots:
            if self._slots[0] != os.getpid():
                self._slots = os.getpid(), self._new_slots()
            return self._slots[1]

    def _new_slots(self) -> DiskOps | None:
        limit = self.cache.config.max_concurrent_disk_ops
        return threading.BoundedSemaphore(limit) if limit else None


@dataclasses.dataclass(frozen=True)
class _Copy:
    """What was made from a base of the same content.

    :param shared: they share their extents.
    """

    content: Content
    shared: bool


class ImageProducer:
    """Fetches the base image of one call: a :class:`~imagecache_lib.ingest.producer.Producer`."""

    def __init__(self, ingest: Ingest, call: Call, use: evidence.Use) -> None:
        self._ingest = ingest
        self._cache = ingest.cache
        self._call = call
        self._use = use
        self.requirements = call.requirements(use)
        store = call.request.certificates or ingest.certificates
        self._certificates = None if store is None else CheckedCertificates(store)
        self._judged_first = ""

    def unmet(self, opened: OpenBase) -> Unmet | None:
        """Find nothing wrong: the record of a fetched image says all that is known of it. Returns None."""
        return None

    def origins(self) -> tuple[str, ...]:
        """Return digests of where the image may come from, one for each of the caller's sources."""
        return self._call.origins()

    def prepare(self) -> None:
        """Ask the source what it says of the image, as :meth:`Call.ask`, and for the certificates it names.

        :raises ConfigError: as :meth:`refuse_impossible`.
        """
        self.refuse_impossible()
        # Once a fetch has begun, this is a part of it.
        with self._telling() if self._judged_first else contextlib.nullcontext():
            _source, image = self._call.ask()
        if self.requirements.signed and self._certificates is not None:
            signing.ask_for_certificates(image, self._certificates, self.requirements.trusted_certs)

    def require_prepared(self) -> None:
        """Raise if no source was asked yet.

        :raises NotPrepared: none was.
        """
        if not self._call.has_asked:
            raise NotPrepared

    def share(self, failure: Failure) -> None:
        """Raise how a fetch that this caller waited for failed, if it is of the same bytes for the same use.

        Whether this caller may have the image, its own source says first.

        :raises ImageRejected: these bytes were refused for good.
        :raises SourceError: two fetches in a row failed while this caller waited.
        :raises NotPrepared, ImageCacheError: as :meth:`Call.describe`.
        """
        if not failure.is_final:
            if failure.of == self._call.origins()[0]:
                raise errors.SourceError(
                    f"a fetch that this one waited for failed, and so did the one before: {failure.cause}",
                    image=self._call.image_id,
                    next_step=failure.next_step,
                )
        elif failure.of == self._judged(*self._call.describe()):
            raise errors.ImageRejected(failure.cause, image=self._call.image_id, next_step=failure.next_step)

    def _judged(self, source: ImageSource, image: model.Image) -> str:
        """Return a digest of what is judged, and by what rules: equal for whom the same bytes are refused."""
        config = self._cache.config
        # A source that does not tell where it reads is the same as itself only.
        where = origin_of(source, image.id)
        if not checked.origin(source, image.id):
            where += f" {self._cache.host_id} {os.getpid()} {id(source)}"
        claims = (image.size, image.digest, image.disk_format, image.container_format, image.compression)
        # Others may be asked when this one sends what is refused.
        where += "".join(f" {each}" for each in self._call.origins()[1:])
        formats = (sorted(config.vmdk_allowed_types), config.force_raw_images, config.decompress_images)
        rules = (formats, config.max_virtual_size, config.disable_deep_image_inspection)
        judged = (where, claims, image.converted_from, self.requirements, rules, evidence.INSPECTION_RULES)
        return hashlib.sha256(repr(judged).encode("utf-8", "replace")).hexdigest()

    def refuse_impossible(self) -> None:
        """Refuse what no fetch could satisfy, before one is begun.

        :raises ConfigError: a verified signature is demanded, and nothing here can verify one.
        """
        if not self._call.demands_signature:
            return
        if self._certificates is None:
            raise errors.ConfigError(
                "a verified signature is demanded, and there is nowhere to get certificates from",
                image=self._call.image_id,
                next_step="set certificates_path, or give the manager or the request a certificate store",
            )
        if not signing.is_possible():
            raise errors.ConfigError(
                "a verified signature is demanded, and what verifies signatures is not installed",
                image=self._call.image_id,
                next_step="install imagecache-lib[signatures]",
            )

    def authorize(self) -> None:
        """Ask the request's source about a base that is in the cache, as :meth:`Call.authorize`."""
        self._call.authorize()

    def produce(self) -> SealedStage:
        """Fetch the image into a stage file of its own, which is the caller's to publish or discard.

        A source that has the image, and not its data, is passed over for the next one.

        :raises NotPrepared: no source was asked yet, or the next one was not.
        :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, CancelledError: no file is left.
        :raises ConfigError: as :meth:`refuse_impossible`.
        :raises StageGone: the stage file was swept away.
        """
        self.refuse_impossible()
        with self._telling():
            source, image = self._call.describe()
            try:
                return self._produce(source, image)
            except (errors.ImageNotFound, errors.ImageRejected, errors.SourceError) as error:
                self._judged_first = self._judged_first or self._judged(source, image)
                self._call.pass_over(error)
        raise NotPrepared(has_begun=True)

    def _produce(self, source: ImageSource, image: model.Image) -> SealedStage:
        if self._use is evidence.Use.FILE and image.converted_from is not None:
            raise errors.ImageNotFound(
                f"all that is left of it is a conversion of its {image.converted_from} content",
                image=self._call.image_id,
                next_step="upload it anew",
            )
        decompress.compression_of(image, self._use, self._cache.config)  # refuses what is no disk
        most = self._cache.config.max_virtual_size
        if image.size is not None and image.size > most:
            raise transfer.absurd(image.size, most, image.id)
        origin = origin_of(source, image.id)
        ending, resumption = self._call.request.resume, None
        if ending is not None:
            data, size = identity(image), image.size or 0
            if data and self._call.imposes_digest:
                # Nothing shows yet that this source has that data: what it leaves is for itself only.
                data = hashlib.sha256(f"{data} {origin}".encode()).hexdigest()
            resumption = Resumption(self._cache, self._call.name, data, size, ending)
        stage = Stage(self._cache, self._call.name, origin=origin, total=image.size)
        try:
            sealed = self._produce_in(stage, source, image, resumption)
            if resumption is not None:
                resumption.end(stage, None)
            return sealed
        except BaseException as error:
            self._give_up(stage, error, resumption)
            raise

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell observers of a refusal in the body, and those who wait of that and of a source that failed."""
        try:
            yield
        except errors.ImageRejected as error:
            self._cache.observers(events.Rejected(self._call.name, self._call.image_id, reason=error.cause))
            # A signature is verified with the certificates that a caller brings.
            if self._judged_first and not self._call.demands_signature:
                self._tell(Failure(self._judged_first, True, error.cause, error.next_step))
            raise
        except errors.SourceError as error:
            # What a source says of a caller's rights, or a caller's deadline, is no other caller's.
            if not isinstance(error, SourceRefused | DeadlinePassed):
                self._tell(Failure(self._call.origins()[0], False, error.cause, error.next_step))
            raise

    def _tell(self, failure: Failure) -> None:
        failures.write(self._cache, self._call.name, failure)

    def adopt(self, opened: OpenBase, known: evidence.Record | None) -> evidence.Record | Unmet:
        """Check a base that carries no evidence, or too little: :mod:`imagecache_lib.ingest.adopt`.

        :raises NotPrepared: the source has to be asked for that, and was not.
        """
        with self._telling():
            return self._adopt(opened, known)

    def _adopt(self, opened: OpenBase, known: evidence.Record | None) -> evidence.Record | Unmet:
        if known is None:
            bound = adopt.bind_again(self._cache, opened, self._call)
            if isinstance(bound, Unmet):
                return bound
            known = bound
        unmet = None if known is None else evidence.unmet(known, self.requirements)
        if known is not None and unmet is not None and unmet.can_compare:
            compared, reason = adopt.compare_again(self._cache, opened, known, self._call)
            if compared is None:
                return Unmet(reason)
            known, unmet = compared, evidence.unmet(compared, self.requirements)
        if known is not None and (unmet is None or not unmet.can_recheck):
            return known
        if known is None or known.inspected is None:
            self.require_prepared()
        if known is not None:
            record, reason = adopt.inspect_again(
                self._cache, opened, known, self._call, self._ingest.converter
            )
        else:
            record, reason = adopt.adopt(self._cache, opened, self._call, self._use, self._ingest.converter)
        return record if record is not None else Unmet(reason)

    def _produce_in(
        self, stage: Stage, source: ImageSource, image: model.Image, resumption: Resumption | None
    ) -> SealedStage:
        started = self._cache.host.monotonic()
        reservation = Reservation(stage, self._cache, self._ingest.evictor, self._call.waiter)
        stage.write_info()
        with self._ingest.slot(stage, self._call.waiter):
            twin = self._copy_twin(stage, source, image, reservation)
            if twin is None:
                if resumption is not None:
                    resumption.make_room(reservation)
                rules, converter = Rules.of(self._cache.config), self._ingest.converter
                work = Work(stage, self._cache, reservation, converter, rules, self._call.waiter, resumption)
                content = download.fill(work, self._call, self.requirements, self._certificates)
            else:
                content = twin.content
            record = self._seal(stage, image, content)
        allocated = 0 if twin is not None and twin.shared else stage.allocated
        if twin is None:
            self._cache.observers(
                events.Fetched(
                    self._call.name,
                    self._call.image_id,
                    received=content.received,
                    allocated=allocated,
                    seconds=self._cache.host.monotonic() - started,
                )
            )
        return SealedStage(stage, record, content.received, allocated)

    def _copy_twin(
        self, stage: Stage, source: ImageSource, image: model.Image, reservation: Reservation
    ) -> _Copy | None:
        """Make the base from another of the same content. Returns None if no whole one is in the cache."""
        with translated(self._cache.layout.records):
            found = dedup.find(self._cache, self._call, source, image, self._use)
        if found is None:
            return None
        with contextlib.closing(found.opened):
            shared = dedup.share(found, stage)
            if shared:
                whole = dedup.is_whole(found, stage, self._call)
            else:
                reservation.raise_to(found.allocated)
                whole = dedup.copy(found, stage, self._call)
            if not whole:
                stage.clear()
                return None
        record = found.record
        stage.pieces = self._cache.pieces_of(record)  # the same digest, so the same data
        self._cache.observers(
            events.Copied(self._call.name, self._call.image_id, origin=record.name, shared=shared)
        )
        content = Content(
            record.source_format, record.stored_format, record.virtual_size, 0, inspected=record.inspected
        )
        return _Copy(content, shared)

    def _give_up(self, stage: Stage, error: BaseException, resumption: Resumption | None) -> None:
        """Remove or leave what came, whatever else fails, and tell why."""
        swept = False
        try:
            with contextlib.suppress(OSError):
                swept = not stage.is_at_path()
        finally:
            if resumption is None:
                stage.discard()
            else:
                resumption.end(stage, error)
        if swept and isinstance(error, errors.BackendError):
            raise StageGone from error
        if isinstance(error, errors.ImageRejected) and error.next_step is None:
            error.next_step = "have its owner upload a good image under a new id"

    def _seal(self, stage: Stage, image: model.Image, content: Content) -> evidence.Record:
        """Make data and evidence durable, in this order, before anything can refer to them."""
        base_attributes.write_name(stage.fd, image.properties.get("name"))
        base_id = stage.seal()
        with translated(stage.path):
            found = os.fstat(stage.fd)
        # A conversion that came from another cache proves nothing of the image's own data.
        digest = image.digest if image.converted_from is None else None
        record = evidence.Record(
            name=self._call.name,
            image_id=self._call.image_id,
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
            certificates=content.signature.chain,
            signed_by=content.signature.signed_by,
        )
        stage.write_info(record)
        self._cache.host.trace(TracePoint.INGEST_SEALED)
        return record
