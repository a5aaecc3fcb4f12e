# SPDX-License-Identifier: Apache-2.0
"""Holding a base image while something is made from it: the hit, and the miss that becomes one.

:meth:`Leases.acquire` looks under the shared lock. What it finds and may use, it leases. Otherwise it takes
the exclusive lock, looks again, makes what is missing, and goes back to the look.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from imagecache_lib import errors, events, model
from imagecache_lib.ingest.producer import BaseRequest
from imagecache_lib.store import evidence, publish, stage, trash
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.evictor import Evictor
from imagecache_lib.store.evidence import Unmet
from imagecache_lib.store.stage import SealedStage, StageGone
from imagecache_lib.system import locks
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated


@dataclasses.dataclass(frozen=True)
class Production:
    """What was done so that there is a base image to lease.

    :param received: bytes that came over the wire.
    :param allocated: bytes that the new base image takes on disk. One that shares its extents takes none.
    """

    received: int = 0
    allocated: int = 0


@dataclasses.dataclass(frozen=True)
class Lease:
    """A base image that is held.

    :param base: what is held, its descriptor included.
    :param opened: the file in the cache. None: the base is this request's own copy outside the cache.
    :param production: how it was made for this request. None: it was there.
    """

    base: model.BaseImage
    opened: OpenBase | None
    production: Production | None

    @property
    def private(self) -> bool:
        """Whether it is this request's own copy, to which no disk may come to refer."""
        return self.opened is None

    def is_current(self) -> bool:
        """Whether the base's name still means this very file, so that a disk that refers to it is safe.

        :raises NoSpaceError, BackendError: the filesystem failed.
        """
        if self.opened is None:
            return True
        with translated(self.opened.path):
            return self.opened.is_current()


@dataclasses.dataclass(frozen=True)
class _Fit:
    """A base that is open and serves."""

    opened: OpenBase
    record: evidence.Record


_UNWITNESSED = Unmet("nobody witnessed how it was made", can_recheck=True)


class Leases:
    """Gets base images for requests. Safe to share between threads.

    :param evictor: removes what is in the way of a base that serves.
    """

    def __init__(self, cache: CacheStore, evictor: Evictor) -> None:
        self._cache = cache
        self._evictor = evictor

    @contextlib.contextmanager
    def acquire(self, request: BaseRequest, *, bypass: bool = True) -> Iterator[Lease]:
        """Lease a base image for the body, making it first if need be.

        :param bypass: whether a private copy will do where the base in the cache does not serve and cannot
            be replaced.
        :raises BackendError: it would not do, and this is the case.
        :raises: whatever the request's producer raises.
        """
        with request.named(), contextlib.ExitStack() as stack:
            yield self._acquire(stack, request, bypass=bypass)

    @contextlib.contextmanager
    def acquire_cached(self, request: BaseRequest) -> Iterator[Lease]:
        """Lease a base image for the body if it is there and serves. Nothing is made, or evicted.

        :raises ImageNotFound: it is not there, or does not serve.
        """
        with request.named(), contextlib.ExitStack() as stack:
            stack.enter_context(self._locked(request, shared=True))
            found = self._look(request)
            if not isinstance(found, _Fit):
                reason = found.reason if found is not None else "it is not in the cache"
                raise errors.ImageNotFound(reason, image=request.image_id, next_step="cache it first")
            stack.callback(found.opened.close)
            yield self._lease(request, found, None)

    @contextlib.contextmanager
    def acquire_private_copy(self, request: BaseRequest) -> Iterator[Lease]:
        """Make a copy for the body alone, past the cache.

        :raises: whatever the request's producer raises.
        """
        with request.named(), contextlib.ExitStack() as stack:
            yield self._private(stack, request, self._produce(request))

    def _produce(self, request: BaseRequest) -> SealedStage:
        """Make a base image in a stage file, over again should that be swept away."""
        while True:
            request.waiter.check()
            try:
                return request.producer.produce()
            except StageGone:
                request.retries.spend(
                    errors.BackendError(
                        "its file in flight was removed again and again",
                        image=request.label,
                        next_step="find out what removes files from the cache's stage directory",
                    )
                )

    def serves(self, request: BaseRequest) -> bool:
        """Whether a base is there that serves, or would once it is checked."""
        found = self._look(request)
        if isinstance(found, _Fit):
            found.opened.close()
            return True
        return found is not None and found.can_recheck

    def _acquire(self, stack: contextlib.ExitStack, request: BaseRequest, *, bypass: bool) -> Lease:
        """Return a lease that lasts until the stack is closed."""
        production: Production | None = None
        filled = False
        while True:
            request.waiter.check()
            with contextlib.ExitStack() as locked:
                locked.enter_context(self._locked(request, shared=True))
                self._cache.host.trace(TracePoint.LEASE_SHARED)
                found = self._look(request)
                if isinstance(found, _Fit):
                    locked.callback(found.opened.close)
                    stack.enter_context(locked.pop_all())
                    return self._lease(request, found, production)
            if filled:
                request.retries.spend(self._vanished(request))
            made = self._fill(request, bypass=bypass)
            if isinstance(made, SealedStage):
                return self._private(stack, request, made)
            production = made or production
            filled = True

    # -- the hit -------------------------------------------------------------------------------------

    def _look(self, request: BaseRequest) -> _Fit | Unmet | None:
        """Return what is in the cache for a request. None: nothing."""
        opened = self._cache.open_base(request.name)
        if opened is None:
            return None
        with contextlib.ExitStack() as stack:
            stack.callback(opened.close)
            with translated(opened.path):
                record = self._cache.record_of(opened) or publish.finish(self._cache, opened)
            if record is None:
                return _UNWITNESSED
            unmet = evidence.unmet(record, request.requirements)
            if unmet is not None:
                return unmet
            stack.pop_all()  # it stays open
            return _Fit(opened, record)

    def _is_there(self, request: BaseRequest) -> bool:
        """Whether somebody else made what this request waits to make. Cheap, and repairs nothing."""
        with translated(self._cache.layout.base(request.name)):
            record = self._cache.evidence_of(request.name)
        return record is not None and evidence.unmet(record, request.requirements) is None

    def _lease(self, request: BaseRequest, fit: _Fit, production: Production | None) -> Lease:
        self._cache.note_use(fit.opened)
        if production is None:
            self._cache.observers(events.Hit(request.name, request.label))
        record = fit.record
        base = _base_image(request, record, fit.opened.path, fit.opened.fd)
        if not record.digest_checked:
            base = dataclasses.replace(base, digest=None)
        return Lease(base, fit.opened, production)

    # -- the miss ------------------------------------------------------------------------------------

    def _fill(self, request: BaseRequest, *, bypass: bool) -> SealedStage | Production | None:
        """Do what makes the next look a hit.

        Returns what was made for that, None if nothing had to be made; or a private copy, where there cannot
        be a hit.
        """
        with self._locked(request, shared=False, stop_waiting_if=lambda: self._is_there(request)) as locked:
            self._cache.host.trace(TracePoint.LEASE_EXCLUSIVE)
            found = self._look(request)
            if isinstance(found, _Fit):
                found.opened.close()
                return None
            if found is None and self._restore(request):
                return None
            reason = found.reason if found is not None else "it is not in the cache"
            if found is not None and found.can_recheck:
                unmet = self._adopt(request)
                if unmet is None:
                    return None
                reason = unmet.reason
            # Before anything is evicted to make way for it.
            request.producer.refuse_impossible()
            self._cache.observers(events.Miss(request.name, request.label, reason=reason))
            if found is None or self._evict(request, reason, locked=locked):
                return self._publish(request)
            if not bypass:
                raise errors.BackendError(
                    f"its base image does not serve and cannot be replaced while it is in use: {reason}",
                    image=request.label,
                    path=self._cache.layout.base(request.name),
                    next_step="wait until nothing refers to it",
                )
            self._cache.observers(events.Bypassed(request.name, request.label, reason=reason))
            return self._produce(request)

    def _restore(self, request: BaseRequest) -> bool:
        """Link back what lies in the trash: it is the same image, and overlays may refer to it."""
        with translated(self._cache.layout.base(request.name)):
            return any(trash.restore(self._cache, thrown) for thrown in trash.find(self._cache, request.name))

    def _adopt(self, request: BaseRequest) -> Unmet | None:
        """Check what nobody witnessed. Returns why it does not serve; None if it serves, or is gone."""
        opened = self._cache.open_base(request.name)
        if opened is None:
            return None
        with contextlib.closing(opened):
            with translated(opened.path):
                known = self._cache.record_of(opened)
            record = request.producer.adopt(opened, known)
        if isinstance(record, Unmet):
            return record
        if known is None:
            self._cache.observers(events.Adopted(request.name, request.label))
        return evidence.unmet(record, request.requirements)

    def _evict(self, request: BaseRequest, reason: str, *, locked: bool) -> bool:
        """Evict what does not serve. Who waited for the lock in vain leaves it: a base is leased then."""
        return locked and self._evictor.evict_unfit(request.name, reason)

    def _publish(self, request: BaseRequest) -> Production | None:
        """Make a base image and give it its name. Returns None if somebody else's has the name."""
        while True:
            sealed = self._produce(request)
            try:
                if not publish.publish(sealed, self._cache):
                    return None
            except StageGone:
                request.retries.spend(self._vanished(request))
                continue
            self._cache.observers(events.Published(request.name, request.label))
            return Production(sealed.received, sealed.allocated)

    def _private(self, stack: contextlib.ExitStack, request: BaseRequest, sealed: SealedStage) -> Lease:
        """Return a lease on a copy of the request's own, which goes with the stack."""
        stack.callback(sealed.stage.discard)
        base = _base_image(request, sealed.record, sealed.stage.path, sealed.stage.fd)
        return Lease(base, None, Production(sealed.received, sealed.allocated))

    # -- locks ---------------------------------------------------------------------------------------

    def _locked(
        self, request: BaseRequest, *, shared: bool, stop_waiting_if: Callable[[], bool] = lambda: False
    ) -> contextlib.AbstractContextManager[bool]:
        return locks.waiting(
            self._cache.layout.lock(request.name),
            shared=shared,
            host=self._cache.host,
            stall_timeout=self._cache.config.lock_timeout,
            waiter=request.waiter,
            progress=lambda: self._progress(request),
            stop_waiting_if=stop_waiting_if,
        )

    def _progress(self, request: BaseRequest) -> object:
        """Return something that changes while anybody gets on with making the base."""
        with contextlib.suppress(OSError):
            return stage.progress(self._cache, request.name)
        return None

    def _vanished(self, request: BaseRequest) -> errors.BackendError:
        return errors.BackendError(
            "its base image vanished again and again while it was wanted",
            image=request.label,
            path=self._cache.layout.base(request.name),
            next_step="find out what removes files from the cache",
        )


def _base_image(request: BaseRequest, record: evidence.Record, path: str, fd: int) -> model.BaseImage:
    return model.BaseImage(
        image_id=request.label,
        name=request.name,
        path=path,
        format=record.stored_format,
        virtual_size=record.virtual_size,
        digest=record.digest,
        source_format=record.source_format,
        fd=fd,
    )
