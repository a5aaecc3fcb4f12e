# SPDX-License-Identifier: Apache-2.0
"""Re-reading what is cached, to find what the disk changed: slowly, the longest unchecked first.

:mod:`imagecache_lib.upkeep.stored_content` reads a base and compares it. Nothing is repaired here: a base
that is damaged is marked, so that no new request is served from it, and its eviction is the pass's.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import enum
import errno
import functools
import logging
import os
import threading
from collections.abc import Collection
from typing import Self

from imagecache_lib import errors, events, model
from imagecache_lib.store import checksums, evidence
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.system import durable, locks, threads
from imagecache_lib.system.maker import Maker
from imagecache_lib.system.priority import be_modest
from imagecache_lib.system.rate import Pace
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import EitherToken, Waiter
from imagecache_lib.upkeep import inventory
from imagecache_lib.upkeep.outcomes import BaseEvictor, Kept
from imagecache_lib.upkeep.references import LEASED
from imagecache_lib.upkeep.stored_content import Differs, StoredContent

LOG = logging.getLogger(__name__)

#: Seconds after which a caller looks at least whether it was interrupted.
_LOOK_SECONDS = 1.0


class Verdict(enum.Enum):
    """What a scrub found of a base."""

    #: What is on disk is what was written.
    SOUND = "sound"
    #: It is not, or reading it fails twice as a disk's reads fail.
    DAMAGED = "damaged"
    #: There is nothing to compare it with, or it cannot be read now.
    UNVERIFIABLE = "unverifiable"
    #: It left the cache meanwhile.
    GONE = "gone"


@dataclasses.dataclass(frozen=True)
class ScrubbedBase:
    """What was found of one base.

    :param name: its name in the cache.
    :param verdict: what was found.
    :param detail: more about it, as a clause: where it is damaged, or why that cannot be told.
    :param read: bytes that were read from disk.
    :param image_id: the image it was made from, where a record says so.
    :param stays: why a damaged base was not evicted, as a clause, or None if it was, or is not damaged.
    """

    name: str
    verdict: Verdict
    detail: str
    read: int = 0
    image_id: str | None = None
    stays: str | None = None


@dataclasses.dataclass(frozen=True)
class ScrubReport:
    """What a scrub found, in the order in which it looked: the longest unchecked first."""

    bases: tuple[ScrubbedBase, ...]

    @property
    def damaged(self) -> tuple[ScrubbedBase, ...]:
        """The bases that are damaged, evicted or not."""
        return tuple(base for base in self.bases if base.verdict is Verdict.DAMAGED)

    @property
    def read(self) -> int:
        """Bytes that were read from disk."""
        return sum(base.read for base in self.bases)


def scrub(
    cache: CacheStore,
    observers: events.Observers,
    evictor: BaseEvictor,
    *,
    rate: int | None,
    names: Collection[str] | None = None,
    cancel: model.CancelToken | None = None,
) -> ScrubReport:
    """Check the content of bases, the longest unchecked first. Returns what was found of each.

    :param rate: bytes per second to read at most, or None for no limit.
    :param names: bases to check, or None for all.
    :param cancel: once set, what was found so far is returned; the next scrub goes on where this one ended.
    """
    leaving = threading.Event()
    token = EitherToken(leaving, cancel)
    waiter = Waiter(cache.host, cancel=token)
    found = []
    with _Reader(cache, Pace(rate, waiter), leaving) as reader, contextlib.suppress(errors.CancelledError):
        for name in _in_order(cache, names):
            waiter.check()
            found.append(_scrub_one(name, cache, observers, evictor, reader, token))
        if names is None:
            _note_end(cache)
    return ScrubReport(tuple(found))


class _Reader:
    """Reads bases in a thread of its own, whose priority is lowered, and no other's.

    At a low rate one base takes hours. So a caller that is interrupted lets the thread end first.

    :raises BackendError: no thread can be started.
    """

    def __init__(self, cache: CacheStore, limit: Pace, leaving: threading.Event) -> None:
        self._maker = Maker()
        self._cache = cache
        self._limit = limit
        self._leaving = leaving
        self._thread = threads.Pool(1, "imagecache-scrub")
        self._thread.submit(be_modest)

    def __enter__(self) -> Self:
        return self

    def check(self, opened: OpenBase, record: evidence.Record) -> ScrubbedBase:
        """Compare a base with what was written, and return what was found.

        :raises CancelledError: the scrub ends.
        """
        checking = self._thread.submit(functools.partial(_check, opened, record, self._cache, self._limit))
        try:
            # A signal that comes as a wait begins is handled when that ends: so none is without end.
            while not concurrent.futures.wait([checking], timeout=_LOOK_SECONDS).done:
                pass
            return checking.result()
        except BaseException:
            # It reads from the base, which is closed next. A forked child has no such thread.
            if self._maker.is_here:
                self._leaving.set()
                concurrent.futures.wait([checking])
            raise

    def __exit__(self, *_error: object) -> None:
        self._leaving.set()
        self._thread.close(wait=True)


def _note_end(cache: CacheStore) -> None:
    """Let the time of a file say when a scrub of the whole cache last ended."""
    try:
        try:
            os.utime(cache.layout.scrubbed)
        except FileNotFoundError:
            durable.write_file(cache.layout.scrubbed, b"")
    except OSError as error:
        # What was found counts for more than when: a full filesystem must not take it away.
        LOG.warning("The time of this scrub cannot be kept in %s: %s", cache.layout.scrubbed, error.strerror)


def _in_order(cache: CacheStore, names: Collection[str] | None) -> list[str]:
    """Return the names of the bases to check, in order.

    A file of checksums was touched when it last proved its base sound.
    """

    def checked(name: str) -> float:
        try:
            return os.stat(cache.layout.sums(name)).st_mtime
        except OSError:
            return float("inf")  # what can be told least of comes last

    wanted = [entry.name for entry in inventory.take(cache).bases if names is None or entry.name in names]
    return sorted(wanted, key=checked)


def _scrub_one(
    name: str,
    cache: CacheStore,
    observers: events.Observers,
    evictor: BaseEvictor,
    reader: _Reader,
    cancel: model.CancelToken,
) -> ScrubbedBase:
    try:
        opened = cache.open_base(name)
    except errors.CacheEntryError as error:
        return ScrubbedBase(name, Verdict.UNVERIFIABLE, error.cause)
    if opened is None:
        return ScrubbedBase(name, Verdict.GONE, "it was evicted")
    with contextlib.closing(opened), translated(opened.path):
        record = cache.record_of(opened)
        if record is None:
            return ScrubbedBase(name, Verdict.UNVERIFIABLE, "it carries no record of how it was made")
        found = reader.check(opened, record)
        if found.verdict is Verdict.DAMAGED:
            return _quarantine(found, opened, cache, observers, evictor, cancel)
        if found.verdict is Verdict.SOUND and record.damaged:
            with contextlib.suppress(OSError):  # the next scrub does it
                _acquit(opened, cache)
        return found


def _check(opened: OpenBase, record: evidence.Record, cache: CacheStore, limit: Pace) -> ScrubbedBase:
    sums_path = cache.layout.sums(record.name)
    sums = _sums_of(record, sums_path)
    digest = None if record.converted else record.digest
    content = StoredContent(opened, limit)

    def scrubbed(verdict: Verdict, detail: str) -> ScrubbedBase:
        return ScrubbedBase(record.name, verdict, detail, content.read, record.image_id)

    try:
        with contextlib.closing(content):
            if sums is not None:
                compared = content.compare_with_sums(sums)
            elif digest is not None:
                compared = content.compare_with_digest(digest)
            else:
                why = "there are no checksums of it, and no digest of its very bytes"
                return scrubbed(Verdict.UNVERIFIABLE, why)
    except OSError as error:
        if error.errno != errno.EIO:
            # A server that does not answer says nothing about the data.
            return scrubbed(Verdict.UNVERIFIABLE, f"it cannot be read now: {error.strerror}")
        compared = Differs(f"it cannot be read: {error.strerror}")
    if isinstance(compared, Differs):
        return scrubbed(Verdict.DAMAGED, compared.how)
    if sums is not None:
        with contextlib.suppress(OSError):
            os.utime(sums_path)
    return scrubbed(Verdict.SOUND, compared.how)


def _sums_of(record: evidence.Record, path: str) -> checksums.Checksums | None:
    """Return the checksums of a base, or None if there are none that can be read: others are checked on."""
    try:
        data = durable.read_file(path, limit=checksums.LIMIT)
    except OSError as error:
        LOG.warning("The checksums %s cannot be read: %s", path, error.strerror)
        return None
    return checksums.parse(data, record.base_id) if data is not None else None


def _quarantine(
    found: ScrubbedBase,
    opened: OpenBase,
    cache: CacheStore,
    observers: events.Observers,
    evictor: BaseEvictor,
    cancel: model.CancelToken,
) -> ScrubbedBase:
    """Mark a damaged base, so that no new request is served from it, and evict it if nothing needs it.

    That it is damaged is told whatever fails on the way, and the others are checked all the same.

    :param cancel: once set, the process that has the base's lock is not waited for. The base is marked all
        the same.
    """
    try:
        with locks.waiting(
            cache.layout.lock(found.name),
            shared=False,
            host=cache.host,
            stall_timeout=cache.config.lock_timeout,
            watched=_UntilCancelled(cancel),
            calls_back=True,
        ) as locked:
            if not opened.is_current():
                return dataclasses.replace(found, verdict=Verdict.GONE, detail="it was evicted meanwhile")
            unmarked = _condemn(opened, cache)
            went = (
                evictor.evict_one(found.name, f"damaged on disk: {found.detail}", locked=True)
                if locked
                else Kept(LEASED)
            )
            stays = f"{went.reason}{unmarked}" if isinstance(went, Kept) else None
    except (OSError, errors.NoSpaceError, errors.BackendError) as error:
        stays = f"it cannot be removed now: {error}"
    observers(events.Damaged(found.name, found.image_id, detail=found.detail, stays=stays))
    return dataclasses.replace(found, stays=stays)


class _UntilCancelled:
    """Ends the wait for a lock once a token is set. How the lock's holder gets on cannot be told."""

    def __init__(self, cancel: model.CancelToken) -> None:
        self._cancel = cancel

    def progress(self) -> object:
        return None

    def is_done(self) -> bool:
        return self._cancel.is_set()


def _condemn(opened: OpenBase, cache: CacheStore) -> str:
    """Mark a damaged base. Returns what is wrong if it cannot be marked, to be added to why it stays."""
    record = cache.record_of(opened)
    try:
        if record is not None and not record.damaged:
            _mark(dataclasses.replace(record, damaged=True), cache)
    except OSError as error:
        return f"; it cannot be marked as damaged ({error.strerror}), and new disks may be made from it"
    return ""


def _acquit(opened: OpenBase, cache: CacheStore) -> None:
    """Take back the mark of a base that is sound after all."""
    record = cache.record_of(opened)
    if record is not None and record.damaged and opened.is_current():
        _mark(dataclasses.replace(record, damaged=False), cache)


def _mark(record: evidence.Record, cache: CacheStore) -> None:
    path = cache.layout.record(record.name)
    used = os.stat(path)
    cache.write_record(record)
    # Its time is a note of when the base was last used, which this is not.
    os.utime(path, ns=(used.st_atime_ns, used.st_mtime_ns))
