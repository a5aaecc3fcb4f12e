# SPDX-License-Identifier: Apache-2.0
"""A miss: doing, under the exclusive lock of a base, what makes the next look for it a hit."""

from __future__ import annotations

import contextlib
import dataclasses
import enum

from imagecache_lib import errors, events
from imagecache_lib.ingest.producer import BaseRequest, NotPrepared
from imagecache_lib.spawn import proof
from imagecache_lib.spawn.lookup import Fit, is_there, judge, look
from imagecache_lib.store import evidence, publish, trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.evictor import Evictor
from imagecache_lib.store.evidence import Unmet
from imagecache_lib.store.stage import SealedStage, StageGone
from imagecache_lib.system.translate import translated


@dataclasses.dataclass(frozen=True)
class Production:
    """What was done so that there is a base image to lease.

    :param received: bytes that came over the wire.
    :param allocated: bytes that the new base image takes on disk. One that shares its extents takes none.
    """

    received: int = 0
    allocated: int = 0


class _Trash(enum.Enum):
    """What the trash had."""

    NOTHING = enum.auto()
    RESTORED = enum.auto()


class Filler:
    """Fills the cache. Safe to share between threads.

    :param evictor: removes what is in the way of a base that serves.
    """

    def __init__(self, cache: CacheStore, evictor: Evictor) -> None:
        self._cache = cache
        self._evictor = evictor

    def fill(
        self, request: BaseRequest, *, bypass: bool, locked: bool, has_begun: bool = False
    ) -> SealedStage | Production | None:
        """Do what makes the next look a hit.

        Returns what was made for that, or None if nothing had to be made; or a private copy, where there
        cannot be a hit.

        :param bypass: whether a private copy will do.
        :param locked: whether the base's exclusive lock is held. Without it nothing is evicted: the process
            that holds it may be leasing a base that does not serve this request.
        :param has_begun: whether this goes on with what was begun and told of before another source had to
            be asked.
        :raises BackendError: a private copy will not do, and nothing else is possible.
        :raises NotPrepared: a source has to be asked first, with no lock held: :meth:`prepare`.
        :raises: whatever the request's producer raises.
        """
        found = look(self._cache, request)
        if isinstance(found, Fit):
            found.opened.close()
            return None
        if found is None:
            restored = self._restore(request)
            if restored is _Trash.RESTORED:
                return None
            unmet, evictable = restored if isinstance(restored, Unmet) else None, False
        else:
            self._share_failure(request, final=False)  # adoption asks the source, too
            checkable = found.can_recheck or found.can_compare
            unmet, evictable = (self._adopt(request) if checkable else found), locked
            if unmet is None:
                return None
        # Before anything is evicted to make way for it.
        request.producer.refuse_impossible()
        request.producer.require_prepared()
        self._share_failure(request, final=True)
        reason = unmet.reason if unmet is not None else "it is not in the cache"
        if not has_begun:
            self._cache.observers(events.Miss(request.name, request.label, reason=reason))
        if unmet is None or (evictable and self._evictor.evict_unfit(request.name, reason)):
            return self._publish(request)
        if evictable and proof.is_possible(self._cache, request):
            return self._prove(request, reason, bypass=bypass)
        if not bypass:
            raise self._in_the_way(request, reason)
        if not has_begun:
            self._cache.observers(events.Bypassed(request.name, request.label, reason=reason))
        return self.produce(request)

    def _in_the_way(self, request: BaseRequest, reason: str) -> errors.BaseInUseError:
        return errors.BaseInUseError(
            f"its base image does not serve and cannot be replaced while it is in use: {reason}",
            image=request.label,
            path=self._cache.layout.base(request.name),
            next_step="wait until nothing refers to it",
        )

    def _prove(self, request: BaseRequest, reason: str, *, bypass: bool) -> SealedStage | Production:
        """Make a private copy, which proves the base if both hold the same bytes.

        Returns what that took, or the private copy, if they do not.
        """
        copy = self.produce(request)
        try:
            if proof.prove(self._cache, request, copy):
                copy.stage.discard()
                self._cache.observers(events.Adopted(request.name, request.label))
                return Production(copy.received)
            if not bypass:
                raise self._in_the_way(request, reason)
            self._cache.observers(events.Bypassed(request.name, request.label, reason=reason))
        except BaseException:
            copy.stage.discard()
            raise
        return copy

    def _share_failure(self, request: BaseRequest, *, final: bool) -> None:
        """Fail as a fetch failed that the request waited for, if it would fail itself.

        :param final: whether a refusal of the bytes counts, too.
        """
        failure = request.awaited.failed(self._cache, request.name)
        if failure is not None and (final or not failure.is_final):
            request.producer.share(failure)

    def prepare(self, request: BaseRequest, why: NotPrepared | None = None) -> None:
        """Ask the source about a base that it has to come from, before the exclusive lock is taken.

        A source that does not answer is waited for by its own callers only, each for itself.

        :param why: raised by :meth:`fill`: what is there does not serve as it is. Unless a fetch was begun,
            it may serve though the source has the image no more.
        :raises: as :meth:`Producer.prepare`, unless another process has made the base meanwhile.
        """
        with translated(self._cache.layout.base(request.name)):
            if why is None and trash.find(self._cache, request.name):
                return  # what lies there may serve without the source
        try:
            request.producer.prepare()
        except errors.ImageCacheError as error:
            is_gone = why is not None and not why.has_begun and isinstance(error, errors.ImageNotFound)
            if not is_gone and not is_there(self._cache, request):
                self._cache.observers(events.FetchFailed.of(request.name, request.label, error))
                raise

    def go_around(self, request: BaseRequest, unmet: Unmet | None, *, bypass: bool) -> SealedStage:
        """Make a private copy, where a sound base of the name serves others, or nothing may have the name.

        :param unmet: why the base does not serve, or None if there is no base.
        :param bypass: whether a private copy will do.
        :raises BackendError: it will not do.
        :raises: whatever the request's producer raises.
        """
        if unmet is not None and not bypass:
            raise errors.BackendError(
                f"the base of that name does not serve, and serves others: {unmet.reason}",
                image=request.label,
                path=self._cache.layout.base(request.name),
                next_step="flatten the disk where it was made, and move it again",
            )
        request.producer.refuse_impossible()
        if unmet is not None:
            self._cache.observers(events.Bypassed(request.name, request.label, reason=unmet.reason))
        return self.produce_unlocked(request)

    def produce_unlocked(self, request: BaseRequest) -> SealedStage:
        """Make a base image in a stage file, with no lock held, and ask the sources whenever that is needed.

        :raises: whatever the request's producer raises.
        """
        while True:
            try:
                return self.produce(request)
            except NotPrepared:
                try:
                    request.producer.prepare()
                except errors.ImageCacheError as error:
                    self._cache.observers(events.FetchFailed.of(request.name, request.label, error))
                    raise

    def produce(self, request: BaseRequest) -> SealedStage:
        """Make a base image in a stage file, over again should that be swept away. No source is asked.

        :raises NotPrepared: one has to be asked first, with no lock held.
        :raises: whatever the request's producer raises.
        """
        while True:
            request.waiter.check()
            try:
                return request.producer.produce()
            except StageGone:
                request.retries.spend(_swept(request))
                self._cache.start()  # the whole cache may have been removed
            except errors.ImageCacheError as error:
                self._cache.observers(events.FetchFailed.of(request.name, request.label, error))
                raise

    def _restore(self, request: BaseRequest) -> _Trash | Unmet:
        """Link back what lies in the trash: it is the same image, and overlays may refer to it.

        What lies there and does not serve stays, until all who share the cache said whether they need it:
        linked back, it would only be evicted again, and they would have to be asked again.
        """
        found: _Trash | Unmet = _Trash.NOTHING
        with translated(self._cache.layout.base(request.name)):
            for entry in trash.find(self._cache, request.name):
                judged = judge(self._cache, trash.open_entry(entry), request)
                if isinstance(judged, Fit):
                    judged.opened.close()
                if isinstance(judged, Unmet) and not judged.can_recheck:
                    found = judged
                elif trash.restore(self._cache, entry):
                    why = "a disk was asked for while it was in the trash"
                    self._cache.observers(events.Restored(request.name, request.label, reason=why))
                    return _Trash.RESTORED
        return found

    def _adopt(self, request: BaseRequest) -> Unmet | None:
        """Check a base whose record is missing, or lacks an inspection or the digest that is demanded.

        Returns why the base does not serve, or None if it serves or is gone.
        """
        with translated(self._cache.layout.base(request.name)):
            opened = self._cache.open_base(request.name)
        if opened is None:
            return None
        with contextlib.closing(opened):
            with translated(opened.path):
                known = self._cache.record_of(opened)
            record = request.producer.adopt(opened, known)
        if isinstance(record, Unmet):
            return record
        if known is None and not record.damaged:
            self._cache.observers(events.Adopted(request.name, request.label))
        return evidence.unmet(record, request.requirements)

    def _publish(self, request: BaseRequest) -> Production | None:
        """Make a base image and give it its name. Returns None if another process's base has the name."""
        while True:
            sealed = self.produce(request)
            try:
                if not publish.publish(sealed, self._cache):
                    return None
            except StageGone:
                request.retries.spend(_swept(request))
                self._cache.start()
                continue
            self._cache.observers(events.Published(request.name, request.label))
            return Production(sealed.received, sealed.allocated)


def _swept(request: BaseRequest) -> errors.BackendError:
    return errors.BackendError(
        "its file in flight was removed again and again",
        image=request.label,
        next_step="find out what removes files from the cache's stage directory",
    )
