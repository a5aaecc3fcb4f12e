# SPDX-License-Identifier: Apache-2.0
"""Holding a base image while something is made from it.

:meth:`Leases.acquire` looks under the shared lock. What it finds and may use, it leases. Otherwise it takes
the exclusive lock, has the base made (:mod:`imagecache_lib.spawn.fill`), and goes back to the look.

A lease is a lock on a byte of the base file itself, through the lease's own descriptor
(:func:`imagecache_lib.system.holders.lease`). It is set under the shared lock of the base's name, which is
Nova's lock too, and outlives that: however long a lease lasts, no other program waits for it. What keeps a
Nova host from removing a leased base is its age (:class:`imagecache_lib.spawn.keeper.Keeper`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from imagecache_lib import errors, events, model
from imagecache_lib.ingest.producer import BaseRequest, NotPrepared
from imagecache_lib.spawn import lookup
from imagecache_lib.spawn.fill import Filler, Production
from imagecache_lib.spawn.keeper import Keeper
from imagecache_lib.spawn.lookup import Fit
from imagecache_lib.store import evidence, stage
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.evictor import Evictor
from imagecache_lib.store.stage import SealedStage
from imagecache_lib.system import holders, locks
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated

#: Seconds for which a network filesystem's client may find a name that another host took: ``acdirmax`` of
#: nfs(5) by default. FUSE filesystems, such as GlusterFS, have a second or so.
_REMEMBERED = 60.0

#: Seconds between two looks whether it has forgotten.
_LOOK_AGAIN = 0.1


@dataclasses.dataclass(frozen=True)
class Lease:
    """A base image that is held.

    :param base: what is held, its descriptor included.
    :param opened: the file in the cache, or None if the base is this request's own copy outside the cache.
    :param production: how it was made for this request, or None if it was in the cache already.
    """

    base: model.BaseImage
    opened: OpenBase | None
    production: Production | None

    @property
    def private(self) -> bool:
        """Whether it is this request's own copy, to which no disk may come to refer."""
        return self.opened is None

    def is_current(self, target: str | None = None, *, anywhere: bool = False) -> bool:
        """Whether the base's name still means this very file, so that a disk that refers to it is safe.

        :param target: absolute path of that disk, or None if none refers to it, or it is unknown where.
        :param anywhere: a disk that refers to it may be below any disk root.
        :raises NoSpaceError, BackendError: the filesystem failed.
        """
        if self.opened is None:
            return True
        if self.opened.cache is not None:
            # Before the look: whoever takes the name later reads the disks that this process makes.
            with translated(self.opened.cache.layout.hosts):
                self.opened.cache.note_roots(target, anywhere=anywhere)
        with translated(self.opened.path):
            return self.opened.is_current()


class Leases:
    """Leases base images to requests. Safe to share between threads.

    :param evictor: removes what is in the way of a base that serves.
    """

    def __init__(self, cache: CacheStore, evictor: Evictor) -> None:
        self._cache = cache
        self._filler = Filler(cache, evictor)

    @contextlib.contextmanager
    def acquire(self, request: BaseRequest, *, bypass: bool = True, lasting: bool = False) -> Iterator[Lease]:
        """Lease a base image for the body, making it first if need be. Yields the :class:`Lease`.

        :param bypass: whether a private copy will do where the base in the cache does not serve and cannot
            be replaced.
        :param lasting: whether the body may last longer than it takes to make an overlay.
        :raises BackendError: a private copy will not do, and nothing else is possible.
        :raises: whatever the request's producer raises.
        """
        with request.named(), contextlib.ExitStack() as stack:
            lease = self._acquire(stack, request, bypass=bypass)
            if lease.production is None:
                request.producer.authorize()
            if lasting and lease.opened is not None:
                stack.enter_context(Keeper(self._cache, lease.opened))
            yield lease

    @contextlib.contextmanager
    def acquire_cached(self, request: BaseRequest) -> Iterator[Lease]:
        """Lease a base image for the body if it is there and serves. Nothing is made, or evicted.

        Yields the :class:`Lease`.

        :raises ImageNotFound: the base is not in the cache, or does not serve.
        """
        with request.named(), contextlib.ExitStack() as stack:
            try:
                found = self._hold(stack, request)
            finally:
                request.awaited.end(self._cache, request.name)
            if not isinstance(found, Fit):
                reason = found.reason if found is not None else "it is not in the cache"
                raise errors.ImageNotFound(reason, image=request.image_id, next_step="cache it first")
            stack.enter_context(Keeper(self._cache, found.opened))
            yield self._lease(request, found, None)

    @contextlib.contextmanager
    def acquire_private_copy(self, request: BaseRequest) -> Iterator[Lease]:
        """Make a copy for the body alone, past the cache. Yields the :class:`Lease` on it.

        :raises: whatever the request's producer raises.
        """
        with request.named(), contextlib.ExitStack() as stack:
            yield self._private(stack, request, self._filler.produce_unlocked(request))

    def serves(self, request: BaseRequest) -> bool:
        """Whether a base is there that serves, or would once it is checked."""
        found = lookup.look(self._cache, request)
        if isinstance(found, Fit):
            found.opened.close()
            return True
        return found is not None and found.can_recheck

    def _acquire(self, stack: contextlib.ExitStack, request: BaseRequest, *, bypass: bool) -> Lease:
        """Return a lease that lasts until the stack is closed."""
        try:
            return self._waited_for(stack, request, bypass=bypass)
        finally:
            request.awaited.end(self._cache, request.name)

    def _waited_for(self, stack: contextlib.ExitStack, request: BaseRequest, *, bypass: bool) -> Lease:
        production: Production | None = None
        filled = has_begun = False
        while True:
            request.waiter.check()
            with contextlib.ExitStack() as held:
                found = self._hold(held, request)
                if isinstance(found, Fit):
                    stack.enter_context(held.pop_all())
                    return self._lease(request, found, production)
            if _stands_aside(found, request):
                made = self._filler.go_around(request, found, bypass=bypass)
                return self._private(stack, request, made)
            if filled:
                request.retries.spend(self._vanished(request))
            if found is None:
                self._filler.prepare(request)
            try:
                filling = self._fill(request, bypass=bypass, has_begun=has_begun)
            except NotPrepared as why:
                has_begun = has_begun or why.has_begun
                self._filler.prepare(request, why)
                continue
            if isinstance(filling, SealedStage):
                return self._private(stack, request, filling)
            production = filling or production
            filled = True

    def _hold(self, stack: contextlib.ExitStack, request: BaseRequest) -> Fit | evidence.Unmet | None:
        """Look under the shared lock, and lease what serves until the stack is closed.

        A base that another host has taken, and that only this host's kernel still finds, is none. Until the
        kernel forgets it, nothing can be made under its name here either: so that is waited for.
        """
        system = self._cache.host
        until = system.monotonic() + _REMEMBERED
        while True:
            with self._locked(request, shared=True), contextlib.ExitStack() as held:
                system.trace(TracePoint.LEASE_SHARED)
                # First: from then on no other host unlinks what is found, if an operator forgot this one.
                with translated(self._cache.layout.hosts):
                    self._cache.ensure_member()
                found = lookup.look(self._cache, request)
                if not isinstance(found, Fit):
                    return found
                held.callback(found.opened.close)
                with translated(found.opened.path):
                    remembered = found.opened.is_only_remembered()
                if not remembered:
                    held.callback(holders.lease(found.opened.fd, system))
                    self._cache.touch(found.opened)
                    stack.enter_context(held.pop_all())
                    return found
            request.waiter.check()
            if system.monotonic() > until:
                raise self._vanished(request)
            system.sleep(_LOOK_AGAIN)

    def _fill(
        self, request: BaseRequest, *, bypass: bool, has_begun: bool
    ) -> SealedStage | Production | None:
        """Do under the exclusive lock what makes the next look a hit, or make a private copy."""
        with self._locked(request, shared=False) as locked:
            self._cache.host.trace(TracePoint.LEASE_EXCLUSIVE)
            return self._filler.fill(request, bypass=bypass, locked=locked, has_begun=has_begun)

    def _lease(self, request: BaseRequest, fit: Fit, production: Production | None) -> Lease:
        """Return the lease on a base image in the cache."""
        if production is None:
            self._cache.observers(events.Hit(request.name, request.label))
        base = _base_image(request, fit.record, fit.opened.path, fit.opened.fd)
        if not fit.record.digest_checked:
            base = dataclasses.replace(base, digest=None)
        return Lease(base, fit.opened, production)

    def _private(self, stack: contextlib.ExitStack, request: BaseRequest, sealed: SealedStage) -> Lease:
        """Return a lease on a copy of the request's own, which goes with the stack."""
        stack.callback(sealed.stage.discard)
        # It will never be published: evictors must not wait for that.
        with contextlib.suppress(errors.ImageCacheError):
            sealed.stage.write_info()
        base = _base_image(request, sealed.record, sealed.stage.path, sealed.stage.fd)
        return Lease(base, None, Production(sealed.received, sealed.allocated))

    # -- locks ---------------------------------------------------------------------------------------

    def _locked(self, request: BaseRequest, *, shared: bool) -> contextlib.AbstractContextManager[bool]:
        return locks.waiting(
            self._cache.layout.lock(request.name),
            shared=shared,
            host=self._cache.host,
            stall_timeout=self._cache.config.lock_timeout,
            waiter=request.waiter,
            watched=_BeingMade(self._cache, request, wanted=not shared),
            calls_back=True,
        )

    def _vanished(self, request: BaseRequest) -> errors.BackendError:
        return errors.BackendError(
            "its base image vanished again and again while it was wanted",
            image=request.label,
            path=self._cache.layout.base(request.name),
            next_step="find out what removes files from the cache",
        )


class _BeingMade:
    """A base image that another process may be making.

    :param wanted: the request would make it, and waits in vain once another process has.
    """

    def __init__(self, cache: CacheStore, request: BaseRequest, *, wanted: bool) -> None:
        self._cache = cache
        self._request = request
        self._wanted = wanted
        self._told: stage.Fetcher | None = None

    def progress(self) -> object:
        """Return something that changes while any process gets on with making the base."""
        self._request.awaited.look(self._cache, self._request.name)
        self._tell()
        with contextlib.suppress(OSError):
            return stage.progress(self._cache, self._request.name)
        return None

    def _tell(self) -> None:
        """Tell observers who makes the base, as often as that gets on."""
        found = None
        with contextlib.suppress(OSError):
            found = stage.fetcher(self._cache, self._request.name)
        if found is not None and found != self._told:
            self._told = found
            self._cache.observers(
                events.Waiting(
                    self._request.name,
                    self._request.label,
                    host=found.host,
                    pid=found.pid,
                    received=found.received,
                    total=found.total,
                )
            )

    def is_done(self) -> bool:
        """Whether the lock is not needed any more.

        Either a base that serves is there, or it is made from other sources than the caller's, of which
        nothing tells when they end.
        """
        if self._wanted and lookup.is_there(self._cache, self._request):
            return True
        return self._is_made_from_elsewhere()

    def _is_made_from_elsewhere(self) -> bool:
        own = self._request.producer.origins()
        if not own:
            return False
        with contextlib.suppress(OSError):
            found = stage.origins(self._cache, self._request.name)
            return bool(found) and "" not in found and found.isdisjoint(own)
        return False


def _stands_aside(found: evidence.Unmet | None, request: BaseRequest) -> bool:
    """Whether a request gets a copy of its own, without evicting or publishing anything."""
    return found.sound if found is not None else not request.publishable


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
