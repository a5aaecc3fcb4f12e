# SPDX-License-Identifier: Apache-2.0
"""Makes bases that have no image: swap areas and empty filesystems, by mkswap and mkfs."""

from __future__ import annotations

import contextlib
import os

from imagecache_lib import errors, model
from imagecache_lib.formats import program
from imagecache_lib.formats.program import DataRefused, Limits
from imagecache_lib.ingest import adopt
from imagecache_lib.ingest.generation import GIB, IDENTITIES, MIB, Generation, look
from imagecache_lib.ingest.producer import BaseRequest
from imagecache_lib.store import base_attributes, evidence
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.evictor import Evictor
from imagecache_lib.store.evidence import Unmet
from imagecache_lib.store.failures import Failure
from imagecache_lib.store.reservations import Reservation
from imagecache_lib.store.stage import SealedStage, Stage, StageGone
from imagecache_lib.system import durable
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

#: 1980-01-01, before which FAT cannot date anything. mke2fs takes 0 for "not set".
_TIME = "315532800"


class Generator:
    """Makes swap areas and empty filesystems. Safe to share between threads.

    :param evictor: asked for room.
    :param cancel: set once the process is about to end.
    """

    def __init__(
        self, cache: CacheStore, evictor: Evictor, *, cancel: model.CancelToken | None = None
    ) -> None:
        self._cache = cache
        self._evictor = evictor
        self._cancel = cancel

    def request(self, wanted: Generation) -> BaseRequest:
        """Return what is asked of a lease for a generation. There is no deadline."""
        # Its bytes are wanted as they are: there is nothing to inspect in what is made here.
        requirements = evidence.Requirements(evidence.Use.FILE)
        waiter = Waiter(self._cache.host, cancel=self._cancel)
        producer = GenerationProducer(wanted, self._cache, self._evictor, waiter)
        return BaseRequest(wanted.name, requirements, producer, waiter, publishable=wanted.publishable)


class GenerationProducer:
    """Makes one swap area or filesystem: a :class:`~imagecache_lib.ingest.producer.Producer`."""

    def __init__(self, wanted: Generation, cache: CacheStore, evictor: Evictor, waiter: Waiter) -> None:
        self._wanted = wanted
        self._cache = cache
        self._evictor = evictor
        self._waiter = waiter

    def origins(self) -> tuple[str, ...]:
        """Return nothing: it is made on this host, the same for every caller."""
        return ()

    def prepare(self) -> None:
        """Do nothing: no server is asked for it."""

    def require_prepared(self) -> None:
        """Do nothing: no server is asked for it."""

    def share(self, failure: Failure) -> None:
        """Do nothing: each caller tries for itself."""

    def refuse_impossible(self) -> None:
        """Refuse what cannot be made, or of which nothing tells how.

        :raises BackendError: it cannot be made; the cause says why.
        """
        if self._wanted.impossible is not None:
            raise self._wanted.impossible

    def authorize(self) -> None:
        """Do nothing: there is no image that the source could deny to a caller."""

    def produce(self) -> SealedStage:
        """Make it in a stage file, which is the caller's to publish or discard.

        :raises NoSpaceError, BackendError, ConfigError: it cannot be made; no file is left.
        :raises StageGone: the stage file was swept away.
        """
        stage = Stage(self._cache, self._wanted.name)
        try:
            return self._produce_in(stage)
        except BaseException as error:
            swept = False
            try:
                with contextlib.suppress(OSError):
                    swept = not stage.is_at_path()
            finally:
                stage.discard()
            if swept and isinstance(error, errors.BackendError):
                raise StageGone from error
            raise

    def _produce_in(self, stage: Stage) -> SealedStage:
        wanted = self._wanted
        stage.write_info()
        Reservation(stage, self._cache, self._evictor, self._waiter).raise_to(_room(wanted.size))
        with translated(stage.path):
            os.ftruncate(stage.fd, wanted.size)
        # Only these programs take a lock of their own, or may: what an operator's program does is not known.
        with stage.lent() if wanted.kind in (None, "ntfs") else contextlib.nullcontext():
            self._make(wanted, stage.path)
        if (unmet := self._unmet(stage.fd)) is not None:
            raise errors.BackendError(
                f"{wanted.words(stage.path)[0]} did not make what it should: {unmet.reason}",
                image=wanted.name,
                next_step="check that program, and virt_mkfs where it is configured",
            )
        stage.read_back(self._waiter)
        self._cache.host.trace(TracePoint.GENERATE_MADE)
        record = self._record(wanted, stage.fd, stage.seal(), evidence.Origin.GENERATED)
        stage.write_info(record)
        return SealedStage(stage, record, allocated=stage.allocated)

    def adopt(self, opened: OpenBase, known: evidence.Record | None) -> evidence.Record | Unmet:
        """Check a base that another program made, and write its record.

        What is generated is never wanted as an image, so that no inspection can be lacking, and ``known`` is
        always None.

        :returns: its record, or why it does not serve.
        """
        if (unmet := self._unmet(opened.fd)) is not None:
            return unmet
        with translated(opened.path):
            if not self._is_whole_copy(opened):
                return Unmet("it is not what its record and its checksums describe")
            os.fsync(opened.fd)
            durable.sync_directory(os.path.dirname(opened.path))
            base_id = base_attributes.mark(opened.fd)
            record = self._record(self._wanted, opened.fd, base_id, evidence.Origin.ADOPTED)
            self._cache.write_record(record)
        return record

    def _is_whole_copy(self, opened: OpenBase) -> bool:
        """Return False for a base that was made here, as its superblock says, and has other content.

        Half a copy has its superblock. What another program made under that name has other content too, and
        another id. A whole copy gets the id to which its checksums are bound.
        """
        record = self._cache.read_record(opened.name)
        if record is None or record.size != opened.stat.st_size:
            return True
        found, _size, _empty = look(opened.fd)
        if found is None or found.identity is None or found.identity != IDENTITIES.get(found.kind):
            return True
        differing = adopt.compare_with_sums(self._cache, opened, record, self._waiter)
        if differing == [] and base_attributes.read_id(opened.fd) == "":
            base_attributes.write_id(opened.fd, record.base_id)
        return not differing

    def unmet(self, opened: OpenBase) -> Unmet | None:
        """Return what is wrong with a base of that name, as its superblock tells, or None if it serves."""
        with translated(opened.path):
            return self._wanted.unmet_by(opened.fd)

    def _unmet(self, fd: int) -> Unmet | None:
        with translated(self._cache.layout.base(self._wanted.name)):
            found, size, empty = look(fd)
        return self._wanted.unmet(found, size, empty=empty)

    def _record(self, wanted: Generation, fd: int, base_id: str, origin: evidence.Origin) -> evidence.Record:
        with translated(self._cache.layout.base(wanted.name)):
            found = os.fstat(fd)
        return evidence.Record(
            name=wanted.name,
            image_id=None,
            base_id=base_id,
            inode=found.st_ino,
            size=found.st_size,
            origin=origin,
            source_format="raw",
            stored_format="raw",
            virtual_size=wanted.size,
        )

    def _make(self, wanted: Generation, path: str) -> None:
        config = self._cache.config
        # Administrators' programs, which a service's PATH may lack.
        environment = {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
        if wanted.publishable:
            environment |= {"SOURCE_DATE_EPOCH": _TIME, "E2FSPROGS_FAKE_TIME": _TIME}
        words = wanted.words(path)
        try:
            program.run(
                tuple(words),
                limits=Limits.of(config.convert_cpu_time_limit, config.convert_address_space_limit),
                waiter=self._waiter,
                program=os.path.basename(words[0]),
                subject=self._cache.layout.base(wanted.name),
                hidden=(path,),
                environment=environment,
            )
        except DataRefused as error:
            raise errors.BackendError(
                error.cause, image=wanted.name, next_step=f"run {words[0]} by hand to see why"
            ) from error
        except errors.ImageCacheError as error:
            error.image = wanted.name
            raise


def _room(size: int) -> int:
    """Return at most how many bytes an empty filesystem takes: a few per cent, and ext4's largest journal."""
    return min(size, size // 32 + 16 * MIB, GIB + GIB // 4)
