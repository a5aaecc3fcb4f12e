# SPDX-License-Identifier: Apache-2.0
"""Holding a base image while something is made from it: the hit, and the miss that becomes one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from imagecache_lib import errors, events, model
from imagecache_lib.store import evidence, publish, stage, trash
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.store.stage import SealedStage, StageGone
from imagecache_lib.system import locks
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated

#: How often a base may vanish between its publication and its use before something must be wrong.
_MOST_TURNS = 20


class BaseVanished(Exception):
    """The base left the cache while something was made from it: throw that away and begin again."""


@dataclasses.dataclass(frozen=True)
class Lease:
    """A base image that is held.

    :param base: what is held, its descriptor included.
    :param private: it is this request's own copy, outside the cache: nothing may come to refer to it.
    :param fetched: it was brought for this request.
    :param confirm: raises :class:`BaseVanished` if the name no longer means this file.
    """

    base: model.BaseImage
    private: bool
    fetched: bool
    confirm: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class _Fit:
    """A base that is open and serves."""

    opened: OpenBase
    record: evidence.Record


@dataclasses.dataclass(frozen=True)
class _Unfit:
    """A base that is there and does not serve.

    :param checkable: nothing speaks against it but that nobody checked it, or not under today's rules.
    """

    reason: str
    checkable: bool


_UNWITNESSED = "nobody witnessed how it was made"


class Wanted(Protocol):
    """What a lease has to know of what is wanted: a call's image, or what is generated."""

    @property
    def name(self) -> str:
        """The base's name in the cache."""

    @property
    def image_id(self) -> str:
        """What messages call it."""

    @property
    def stored_format(self) -> str | None:
        """The format that the base must have. None: any."""

    @property
    def trusted_certs(self) -> tuple[str, ...] | None:
        """Certificates of which one must have verified it. None: not demanded."""

    @property
    def demands_signature(self) -> bool:
        """Whether its signature must have been verified."""

    def check(self) -> None:
        """Raise if the caller no longer waits."""

    def named(self) -> contextlib.AbstractContextManager[None]:
        """Let every error of the body say what it is about."""


W = TypeVar("W", bound=Wanted)
_W_contra = TypeVar("_W_contra", bound=Wanted, contravariant=True)


class Bringer(Protocol[_W_contra]):
    """Brings what a lease misses."""

    def refuse_impossible(self, wanted: _W_contra, /) -> None:
        """Raise if :meth:`run` could only fail."""

    def run(self, wanted: _W_contra, use: evidence.Use, /) -> SealedStage:
        """Bring it into a stage file, which is the caller's to publish or discard."""

    def adopt(
        self, opened: OpenBase, known: evidence.Record | None, wanted: _W_contra, use: evidence.Use, /
    ) -> tuple[evidence.Record | None, str]:
        """Check what is there. Returns its record, or None and the reason why it does not serve.

        :param known: its record, which lacks an inspection under today's rules. None: somebody else made it.
        """


class Leases(Generic[W]):
    """Gets base images for calls. Safe to share between threads.

    :param evict_unfit: removes a base of that name the ordinary way if nothing refers to it; True if it is
        gone.
    """

    def __init__(
        self,
        cache: CacheStore,
        bringer: Bringer[W],
        observers: events.Observers,
        *,
        evict_unfit: Callable[[str, str], bool],
    ) -> None:
        self._cache = cache
        self._bringer = bringer
        self._observers = observers
        self._evict_unfit = evict_unfit

    @contextlib.contextmanager
    def hold_cached(self, call: W, use: evidence.Use) -> Iterator[Lease]:
        """Hold the call's base image for the body if it is there and serves. Nothing is brought, or evicted.

        :raises ImageNotFound: it is not.
        """
        with call.named(), contextlib.ExitStack() as stack:
            stack.enter_context(self._locked(call, shared=True))
            verdict = self._look(call, use)
            if not isinstance(verdict, _Fit):
                reason = verdict.reason if verdict is not None else "it is not in the cache"
                raise errors.ImageNotFound(reason, image=call.image_id, next_step="cache it first")
            stack.callback(verdict.opened.close)
            yield self._lease(call, verdict, fetched=False)

    @contextlib.contextmanager
    def hold(self, call: W, use: evidence.Use, *, bypass: bool = True) -> Iterator[Lease]:
        """Hold the call's base image for the body, fetching it first if need be.

        :param bypass: whether a private copy will do where the base in the cache does not fit and is in use.
        :raises BackendError: it would not, and this is the case.
        :raises: whatever the ingest raises.
        """
        with call.named(), contextlib.ExitStack() as stack:
            yield self._get(stack, call, use, bypass=bypass)

    @contextlib.contextmanager
    def private(self, call: W, use: evidence.Use) -> Iterator[Lease]:
        """Bring a copy for the body alone, past the cache.

        :raises: whatever bringing it raises.
        """
        brought = self._bringer.run(call, use)
        try:
            yield _private(call, brought)
        finally:
            brought.stage.discard()

    def _get(self, stack: contextlib.ExitStack, call: W, use: evidence.Use, *, bypass: bool) -> Lease:
        """Return a lease that lasts until the stack is closed."""
        fetched = False
        for _turn in range(_MOST_TURNS):
            call.check()
            with contextlib.ExitStack() as locked:
                locked.enter_context(self._locked(call, shared=True))
                self._cache.host.trace(TracePoint.LEASE_SHARED)
                verdict = self._look(call, use)
                if isinstance(verdict, _Fit):
                    locked.callback(verdict.opened.close)
                    stack.enter_context(locked.pop_all())
                    return self._lease(call, verdict, fetched)
            brought = self._bring(call, use, bypass=bypass)
            if isinstance(brought, SealedStage):
                stack.callback(brought.stage.discard)
                return _private(call, brought)
            fetched = fetched or brought
        raise errors.BackendError(
            "its base image vanished again and again while it was wanted",
            image=call.image_id,
            path=self._cache.layout.base(call.name),
            next_step="find out what removes files from the cache",
        )

    def has(self, call: W, use: evidence.Use) -> bool:
        """Whether a base is there that serves, or that nothing speaks against but that nobody checked it."""
        verdict = self._look(call, use)
        if isinstance(verdict, _Fit):
            verdict.opened.close()
            return True
        return verdict is not None and verdict.checkable

    # -- the hit -------------------------------------------------------------------------------------

    def _look(self, call: W, use: evidence.Use) -> _Fit | _Unfit | None:
        """Return what is in the cache for this call. None: nothing."""
        opened = self._cache.open_base(call.name)
        if opened is None:
            return None
        with contextlib.ExitStack() as stack:
            stack.callback(opened.close)
            with translated(opened.path):
                record = self._cache.record_of(opened) or publish.finish(self._cache, opened)
            if record is None:
                return _Unfit(_UNWITNESSED, checkable=True)
            reason = self._shortfall(record, call, use)
            if reason is not None:
                renewed = dataclasses.replace(record, inspected=evidence.INSPECTION_RULES)
                can_recheck = record.inspectable and self._shortfall(renewed, call, use) is None
                return _Unfit(reason, checkable=can_recheck)
            stack.pop_all()  # it stays open
            return _Fit(opened, record)

    def _is_there(self, call: W, use: evidence.Use) -> bool:
        """Whether somebody else brought what this call waits to bring. Cheap, and repairs nothing."""
        record = self._cache.evidence_of(call.name)
        return record is not None and self._shortfall(record, call, use) is None

    def _shortfall(self, record: evidence.Record, call: W, use: evidence.Use) -> str | None:
        return evidence.shortfall(
            record,
            use,
            stored_format=call.stored_format,
            signed=call.demands_signature,
            trusted_certs=call.trusted_certs,
            inspect=not self._cache.config.disable_deep_image_inspection,
        )

    def _lease(self, call: W, fit: _Fit, fetched: bool) -> Lease:
        opened, record = fit.opened, fit.record
        self._cache.touch(opened)
        if not fetched:
            self._observers(events.Hit(call.name, call.image_id))

        def confirm() -> None:
            with translated(opened.path):
                current = opened.is_current()
            if not current:
                raise BaseVanished(opened.path)

        base = model.BaseImage(
            image_id=call.image_id,
            name=opened.name,
            path=opened.path,
            format=record.stored_format,
            virtual_size=record.virtual_size,
            digest=record.digest if record.digest_checked else None,
            source_format=record.source_format,
            fd=opened.fd,
        )
        return Lease(base, private=False, fetched=fetched, confirm=confirm)

    # -- the miss ------------------------------------------------------------------------------------

    def _bring(self, call: W, use: evidence.Use, *, bypass: bool) -> SealedStage | bool:
        """Do what makes the next look a hit.

        :returns: whether it was fetched for that; or a private copy, where there cannot be a hit.
        """
        with self._locked(call, shared=False, moot=lambda: self._is_there(call, use)):
            self._cache.host.trace(TracePoint.LEASE_EXCLUSIVE)
            verdict = self._look(call, use)
            if isinstance(verdict, _Fit):
                verdict.opened.close()
                return False
            if verdict is None and self._restore(call):
                return False
            reason = verdict.reason if verdict is not None else "it is not in the cache"
            if verdict is not None and verdict.checkable:
                unfit = self._adopt(call, use)
                if unfit is None:
                    return False
                reason = unfit
            # Before anything is evicted to make way for it.
            self._bringer.refuse_impossible(call)
            self._observers(events.Miss(call.name, call.image_id, reason=reason))
            if verdict is not None and not self._evict_unfit(call.name, reason):
                if not bypass:
                    raise errors.BackendError(
                        f"its base image does not serve and cannot be replaced while it is in use: {reason}",
                        image=call.image_id,
                        path=self._cache.layout.base(call.name),
                        next_step="wait until nothing refers to it",
                    )
                self._observers(events.Bypassed(call.name, call.image_id, reason=reason))
                return self._bringer.run(call, use)
            return self._fetch(call, use)

    def _restore(self, call: W) -> bool:
        """Link back what lies in the trash: it is the same image, and overlays may refer to it."""
        with translated(self._cache.layout.base(call.name)):
            return any(trash.restore(self._cache, entry) for entry in trash.find(self._cache, call.name))

    def _adopt(self, call: W, use: evidence.Use) -> str | None:
        """Check what nobody witnessed. None: it serves, or it is gone; otherwise why it does not."""
        opened = self._cache.open_base(call.name)
        if opened is None:
            return None
        with contextlib.closing(opened):
            with translated(opened.path):
                known = self._cache.record_of(opened)
            record, reason = self._bringer.adopt(opened, known, call, use)
        if record is None:
            return reason
        if known is None:
            self._observers(events.Adopted(call.name, call.image_id))
        return self._shortfall(record, call, use)

    def _fetch(self, call: W, use: evidence.Use) -> bool:
        """Fetch and publish. False: somebody else published first."""
        while True:
            ingested = self._bringer.run(call, use)
            try:
                published = publish.publish(ingested, self._cache)
                if published:
                    self._observers(events.Published(call.name, call.image_id))
                return published
            except StageGone:
                continue

    # -- locks ---------------------------------------------------------------------------------------

    def _locked(
        self, call: W, *, shared: bool, moot: Callable[[], bool] = lambda: False
    ) -> contextlib.AbstractContextManager[bool]:
        return locks.waiting(
            self._cache.layout.lock(call.name),
            shared=shared,
            host=self._cache.host,
            patience=self._cache.config.lock_timeout,
            check=call.check,
            progress=lambda: stage.progress(self._cache, call.name),
            moot=moot,
        )


def _private(call: Wanted, own: SealedStage) -> Lease:
    record = own.record
    base = model.BaseImage(
        image_id=call.image_id,
        name=call.name,
        path=own.stage.path,
        format=record.stored_format,
        virtual_size=record.virtual_size,
        digest=record.digest,
        source_format=record.source_format,
        fd=own.stage.fd,
    )
    return Lease(base, private=True, fetched=True, confirm=lambda: None)
