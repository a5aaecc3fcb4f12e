# SPDX-License-Identifier: Apache-2.0
"""Holding a base image while something is made from it: the hit, and the miss that becomes one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from imagecache_lib import errors, events, evidence, model, store, trash
from imagecache_lib.spawn import adopt, ingest, locks, publish
from imagecache_lib.spawn import stage as stages
from imagecache_lib.spawn.call import Call

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

    opened: store.OpenBase
    record: evidence.Record


@dataclasses.dataclass(frozen=True)
class _Unfit:
    """A base that is there and does not serve.

    :param checkable: nothing speaks against it but that nobody checked it.
    """

    reason: str
    checkable: bool


_UNWITNESSED = "nobody witnessed how it was made"


class Leases:
    """Gets base images for calls. Safe to share between threads.

    :param evict_unfit: removes a base of that name the ordinary way if nothing refers to it; True if it is
        gone.
    """

    def __init__(
        self,
        cache: store.CacheStore,
        ingester: ingest.Ingest,
        observers: events.Observers,
        *,
        evict_unfit: Callable[[str, str], bool],
    ) -> None:
        self._cache = cache
        self._ingest = ingester
        self._observers = observers
        self._evict_unfit = evict_unfit

    @contextlib.contextmanager
    def hold(self, call: Call, use: evidence.Use, *, bypass: bool = True) -> Iterator[Lease]:
        """Hold the call's base image for the body, fetching it first if need be.

        :param bypass: whether a private copy will do where the base in the cache does not fit and is in use.
        :raises BackendError: it would not, and this is the case.
        :raises: whatever the ingest raises.
        """
        fetched = False
        for _turn in range(_MOST_TURNS):
            call.check()
            with self._locked(call, shared=True):
                self._cache.host.trace("lease:shared")
                verdict = self._look(call, use)
                if isinstance(verdict, _Fit):
                    with contextlib.closing(verdict.opened):
                        yield self._lease(call, verdict, fetched)
                    return
            own = self._bring(call, use, bypass=bypass)
            if own is not None:
                try:
                    yield _private(call, own)
                finally:
                    own.stage.discard()
                return
            fetched = True
        raise errors.BackendError(
            "its base image vanished again and again while it was wanted",
            image=call.image_id,
            path=self._cache.layout.base(call.name),
            next_step="find out what removes files from the cache",
        )

    # -- the hit -------------------------------------------------------------------------------------

    def _look(self, call: Call, use: evidence.Use) -> _Fit | _Unfit | None:
        """Return what is in the cache for this call. None: nothing."""
        opened = self._cache.open_base(call.name)
        if opened is None:
            return None
        try:
            record = self._cache.record_of(opened) or publish.finish(self._cache, opened)
            reason = _UNWITNESSED if record is None else self._shortfall(record, call, use)
        except BaseException:
            opened.close()
            raise
        if record is not None and reason is None:
            return _Fit(opened, record)
        opened.close()
        return _Unfit(reason or _UNWITNESSED, checkable=record is None)

    def _shortfall(self, record: evidence.Record, call: Call, use: evidence.Use) -> str | None:
        return evidence.shortfall(
            record,
            use,
            stored_format=call.stored_format,
            trusted_certs=call.trusted_certs,
            inspect=not self._cache.config.disable_deep_image_inspection,
        )

    def _lease(self, call: Call, fit: _Fit, fetched: bool) -> Lease:
        opened, record = fit.opened, fit.record
        self._cache.note_use(opened)
        if not fetched:
            self._observers(events.Hit(call.name, call.image_id))

        def confirm() -> None:
            if not opened.is_current():
                raise BaseVanished(opened.path)

        base = model.BaseImage(
            image_id=call.image_id,
            name=opened.name,
            path=opened.path,
            format=record.stored_format,
            virtual_size=record.virtual_size,
            digest=record.digest if record.digest_checked else None,
            fd=opened.fd,
        )
        return Lease(base, private=False, fetched=fetched, confirm=confirm)

    # -- the miss ------------------------------------------------------------------------------------

    def _bring(self, call: Call, use: evidence.Use, *, bypass: bool) -> ingest.Ingested | None:
        """Do what makes the next look a hit. Returns a private copy where that cannot be."""
        with self._locked(call, shared=False):
            self._cache.host.trace("lease:exclusive")
            verdict = self._look(call, use)
            if isinstance(verdict, _Fit):
                verdict.opened.close()
                return None
            if verdict is None and self._restore(call):
                return None
            reason = verdict.reason if verdict is not None else "it is not in the cache"
            if verdict is not None and verdict.checkable:
                unfit = self._adopt(call, use)
                if unfit is None:
                    return None
                reason = unfit
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
                return self._ingest.run(call, use)
            self._fetch(call, use)
            return None

    def _restore(self, call: Call) -> bool:
        """Link back what lies in the trash: it is the same image, and overlays may refer to it."""
        return any(trash.restore(self._cache, thrown) for thrown in trash.find(self._cache, call.name))

    def _adopt(self, call: Call, use: evidence.Use) -> str | None:
        """Check what nobody witnessed. None: it serves, or it is gone; otherwise why it does not."""
        opened = self._cache.open_base(call.name)
        if opened is None:
            return None
        with contextlib.closing(opened):
            record, reason = adopt.adopt(self._cache, opened, call, use)
        if record is None:
            return reason
        self._observers(events.Adopted(call.name, call.image_id))
        return self._shortfall(record, call, use)

    def _fetch(self, call: Call, use: evidence.Use) -> None:
        while True:
            ingested = self._ingest.run(call, use)
            try:
                if publish.publish(ingested, self._cache):
                    self._observers(events.Published(call.name, call.image_id))
                return
            except ingest.StageGone:
                continue

    # -- locks ---------------------------------------------------------------------------------------

    def _locked(self, call: Call, *, shared: bool) -> contextlib.AbstractContextManager[bool]:
        return locks.waiting(
            self._cache.layout.lock(call.name),
            shared=shared,
            host=self._cache.host,
            patience=self._cache.config.lock_timeout,
            check=call.check,
            progress=lambda: stages.progress(self._cache, call.name),
        )


def _private(call: Call, own: ingest.Ingested) -> Lease:
    record = own.record
    base = model.BaseImage(
        image_id=call.image_id,
        name=call.name,
        path=own.stage.path,
        format=record.stored_format,
        virtual_size=record.virtual_size,
        digest=record.digest,
        fd=own.stage.fd,
    )
    return Lease(base, private=True, fetched=True, confirm=lambda: None)
