# SPDX-License-Identifier: Apache-2.0
"""Images that other hosts pass on while they receive them: one download from the image service for many.

What the image is, and whether this host may have it, is asked of its own image service with its own rights;
size and digest come from there. The bytes come from a *parent*, which is a host that receives the same image,
and go into a spool (:mod:`imagecache_lib.store.spool`), from which the next hosts read while it grows. The
image service itself is asked only with leave, which is given to few hosts at a time.

Here is the image source that reads from the spool; :mod:`imagecache_lib.sources.spool_filler` fills it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import threading
from collections.abc import Iterator

from imagecache_lib import errors, model
from imagecache_lib.sources.identity import identity
from imagecache_lib.sources.interface import CannotResume, ImageSource
from imagecache_lib.sources.parents import Parents
from imagecache_lib.sources.route import ORIGIN, Route
from imagecache_lib.sources.spool_filler import PIECE_SECONDS, Filler, cut_piece, no_leave
from imagecache_lib.store.spool import EARLIER, Spool, SpoolReader, Spools
from imagecache_lib.system import threads
from imagecache_lib.system.waiter import Waiter

LOG = logging.getLogger(__name__)

#: How the error of an image ends that is not what its digest says although hosts passed it on as that.
NOT_THE_IMAGE = "passed on is not the image"

#: Bytes that are read from the spool at a time.
_CHUNK = 2**20

#: Seconds without a byte after which an attempt fails. Its caller tries again, or gives up.
_STARVED = 60.0


class RelaySource(ImageSource):
    """The images of another source, whose bytes come from hosts that have them before this one.

    Images without a digest come from the other source itself, with its leave.

    :param origin: this host's own image service.
    :param route: whom to ask.
    :param parents: how to reach them.
    :param spools: where bytes are kept for the hosts behind this one.
    :param waiter: who waits for the image.
    :param rate: bytes per second to take at most, or None for no limit.
    :param starved: seconds without a byte after which an attempt fails.
    """

    def __init__(
        self,
        origin: ImageSource,
        route: Route,
        parents: Parents,
        spools: Spools,
        waiter: Waiter,
        *,
        rate: int | None = None,
        starved: float = _STARVED,
    ) -> None:
        self._origin = origin
        self._route = route
        self._parents = parents
        self._spools = spools
        self._waiter = waiter
        self._rate = rate
        self._starved = starved
        self._cuts: int | None = None

    def describe(self, image_id: str) -> model.Image:
        return self._origin.describe(image_id)

    def known_digest(self, image_id: str) -> model.Digest | None:
        return self._origin.known_digest(image_id)

    def vouches_for_digest(self, image: model.Image) -> bool:
        return self._origin.vouches_for_digest(image)

    def copy_to_store(self, image: model.Image, store: str) -> None:
        self._origin.copy_to_store(image, store)

    def can_resume(self, image: model.Image) -> bool:
        return self._origin.can_resume(image)

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        if image.digest is None or image.size is None or image.converted_from is not None:
            self._spools.settle(image.id)
            self._wait_for_leave(image)
            with self._origin.open(image, offset) as chunks:
                yield chunks
            return
        spool = self._spools.open(image, self._waiter, source=identity(image))
        if offset == 0:
            self._check_whole(spool)
        elif self._cuts is None or offset > spool.good_below(self._cuts):
            raise CannotResume("bytes that were passed on are wrong", image=image.id)
        with spool.reading() as reader, self._filling(spool) as filler:
            self._cuts = reader.cuts
            yield _Relayed(spool, reader, offset, self._waiter, filler)

    def _wait_for_leave(self, image: model.Image) -> None:
        began = self._waiter.system.monotonic()
        while not self._route.origin:
            version = self._route.version
            self._route.follows(None, wants_origin=True)
            self._waiter.check()
            if self._waiter.system.monotonic() - began > self._starved:
                raise no_leave(image)
            self._route.wait(version, PIECE_SECONDS)
        self._route.follows(ORIGIN)

    def _check_whole(self, spool: Spool) -> None:
        """Throw away what is wrong of a complete spool: its content was given out before, and did not do."""
        if not spool.is_complete or _digest_of(spool, self._waiter) == spool.digest.value.lower():
            return
        others = spool.suppliers() - {ORIGIN, EARLIER}
        for parent in others:
            known = self._parents.pieces(parent, spool.image)
            wrong = spool.learn(known)
            if wrong is not None:
                cut_piece(spool, wrong, self._route)
                return
        LOG.warning(
            "Image %s, passed on by %s, is not what its digest says: it is fetched once more",
            spool.image.id,
            _names(spool),
        )
        if others:
            self._route.mismatched()
        spool.learn(None)
        spool.cut(0)

    @contextlib.contextmanager
    def _filling(self, spool: Spool) -> Iterator[Filler | None]:
        """Have the spool filled by a thread during the body. Yields what fills it, or None if it is full."""
        if spool.is_complete:
            yield None
            return
        spool.fail(None)
        stop = threading.Event()
        waiter = dataclasses.replace(self._waiter, cancel=_Either(stop, self._waiter.cancel))
        filler = Filler(
            spool, self._origin, self._route, self._parents, waiter, rate=self._rate, starved=self._starved
        )
        thread = threads.start(filler.run, name="imagecache-relay")
        try:
            yield filler
        finally:
            stop.set()
            threads.join(thread)


@dataclasses.dataclass(frozen=True)
class _Either:
    stop: threading.Event
    cancel: model.CancelToken | None

    def is_set(self) -> bool:
        return self.stop.is_set() or (self.cancel is not None and self.cancel.is_set())


class _Relayed:
    """The bytes of a spool as they come: the iterator that :meth:`ImageSource.open` promises."""

    def __init__(
        self, spool: Spool, reader: SpoolReader, offset: int, waiter: Waiter, filler: Filler | None
    ) -> None:
        self._spool = spool
        self._reader = reader
        self._offset = offset
        self._waiter = waiter
        self._filler = filler

    @property
    def doubt(self) -> errors.SourceError | None:
        """What is wrong if the data is: hosts passed it on, or a server of the image service is to blame."""
        if self._spool.suppliers() <= {ORIGIN}:
            return None if self._filler is None else self._filler.doubt
        return errors.SourceError(f"what {_names(self._spool)} {NOT_THE_IMAGE}", image=self._spool.image.id)

    def __iter__(self) -> _Relayed:
        return self

    def __next__(self) -> bytes:
        if self._offset >= self._spool.size:
            raise StopIteration
        while not (data := self._reader.read(self._offset, _CHUNK, PIECE_SECONDS)):
            self._waiter.check()
        self._offset += len(data)
        return data


def _digest_of(spool: Spool, waiter: Waiter) -> str:
    state, offset = hashlib.new(spool.digest.algorithm, usedforsecurity=False), 0
    with spool.reading() as reader:
        while offset < spool.size:
            waiter.check()
            data = reader.read(offset, _CHUNK, PIECE_SECONDS)
            state.update(data)
            offset += len(data)
    return state.hexdigest()


def _names(spool: Spool) -> str:
    said = {ORIGIN: "the image service", EARLIER: "an earlier process of this host"}
    return ", ".join(sorted(said.get(name, f"host {name}") for name in spool.suppliers()))
