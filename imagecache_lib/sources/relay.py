# SPDX-License-Identifier: Apache-2.0
"""Images that other hosts pass on while they receive them: one download from the image service for many.

What the image is, and whether this host may have it, is asked of its own image service with its own rights;
size and digest come from there. The bytes come from a *parent*, which is a host that receives the same image,
and go into a spool (:mod:`imagecache_lib.store.spool`), from which the next hosts read while it grows. Should
a parent fail, the next one goes on at the same byte. The image service itself is asked only with leave, which
is given to few hosts at a time.

Where the hashes of pieces are known, a piece that a parent sent is passed on only after it matched. Before
the first host has the whole image none are known: then bytes are passed on as they come, and the digest
decides at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import threading
from collections.abc import Iterator

from imagecache_lib import errors, model
from imagecache_lib.sources import checked
from imagecache_lib.sources.identity import identity
from imagecache_lib.sources.interface import CannotResume, ImageSource
from imagecache_lib.sources.parents import Parents
from imagecache_lib.sources.route import ORIGIN, Route
from imagecache_lib.store.pieces import PIECE, Pieces
from imagecache_lib.store.spool import EARLIER, Spool, SpoolReader, Spools
from imagecache_lib.system import threads
from imagecache_lib.system.rate import Pace
from imagecache_lib.system.waiter import Waiter

LOG = logging.getLogger(__name__)

#: How the error of an image ends that is not what its digest says although hosts passed it on as that.
NOT_THE_IMAGE = "passed on is not the image"

#: Bytes that are read from the spool at a time.
_CHUNK = 2**20

#: Seconds for which a parent that failed is left alone.
_AVOIDED = 10.0

#: Seconds without a byte after which a parent is left although it waits itself: others may have more.
_HUNGRY = 20.0

#: Seconds between two questions for the hashes of pieces.
_ASK_EVERY = 5.0

#: Seconds without a byte after which an attempt fails. Its caller tries again, or gives up.
_STARVED = 60.0

#: Seconds before a parent that waits itself is asked again.
_BREATH = 0.2

#: A wait is cut into pieces of this many seconds, so that a cancelled request ends soon.
_PIECE_SECONDS = 0.5


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
        with spool.reading() as reader, self._filling(spool):
            self._cuts = reader.cuts
            yield _Relayed(spool, reader, offset, self._waiter)

    def _wait_for_leave(self, image: model.Image) -> None:
        began = self._waiter.system.monotonic()
        while not self._route.origin:
            version = self._route.version
            self._route.follows(None, wants_origin=True)
            self._waiter.check()
            if self._waiter.system.monotonic() - began > self._starved:
                raise _no_leave(image)
            self._route.wait(version, _PIECE_SECONDS)
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
                _cut(spool, wrong, self._route)
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
    def _filling(self, spool: Spool) -> Iterator[None]:
        """Have the spool filled by a thread during the body."""
        if spool.is_complete:
            yield
            return
        spool.fail(None)
        stop = threading.Event()
        waiter = dataclasses.replace(self._waiter, cancel=_Either(stop, self._waiter.cancel))
        filler = Filler(
            spool, self._origin, self._route, self._parents, waiter, rate=self._rate, starved=self._starved
        )
        thread = threading.Thread(target=filler.run, name="imagecache-relay", daemon=True)
        threads.start(thread)
        try:
            yield
        finally:
            stop.set()
            thread.join()


@dataclasses.dataclass(frozen=True)
class _Either:
    stop: threading.Event
    cancel: model.CancelToken | None

    def is_set(self) -> bool:
        return self.stop.is_set() or (self.cancel is not None and self.cancel.is_set())


class _Relayed:
    """The bytes of a spool as they come: the iterator that :meth:`ImageSource.open` promises."""

    def __init__(self, spool: Spool, reader: SpoolReader, offset: int, waiter: Waiter) -> None:
        self._spool = spool
        self._reader = reader
        self._offset = offset
        self._waiter = waiter

    @property
    def doubt(self) -> errors.SourceError | None:
        """What is wrong if the data is: hosts passed it on, and the image is not to blame."""
        if self._spool.suppliers() <= {ORIGIN}:
            return None
        return errors.SourceError(f"what {_names(self._spool)} {NOT_THE_IMAGE}", image=self._spool.image.id)

    def __iter__(self) -> _Relayed:
        return self

    def __next__(self) -> bytes:
        if self._offset >= self._spool.size:
            raise StopIteration
        while not (data := self._reader.read(self._offset, _CHUNK, _PIECE_SECONDS)):
            self._waiter.check()
        self._offset += len(data)
        return data


class Filler:
    """Fills one spool, whoever sends the bytes. Runs in a thread of its own."""

    def __init__(
        self,
        spool: Spool,
        origin: ImageSource,
        route: Route,
        parents: Parents,
        waiter: Waiter,
        *,
        rate: int | None,
        starved: float,
    ) -> None:
        self._spool = spool
        self._origin = origin
        self._route = route
        self._parents = parents
        self._waiter = waiter
        self._system = waiter.system
        self._pace = Pace(rate, waiter)
        self._starved = starved
        self._avoided: dict[str, float] = {}
        self._asked_at: dict[str, float] = {}
        self._accused: set[str] = set()
        self._fed_at = waiter.system.monotonic()

    def run(self) -> None:
        """Fill the spool. What stops that is told to the spool's readers."""
        try:
            while not (self._spool.is_complete or self._spool.is_closed):
                self._waiter.check()
                self._take(self._next())
        except errors.ImageCacheError as error:
            self._spool.fail(error)
        except Exception as error:  # a source's defect must not leave readers waiting
            LOG.exception("Relaying image %s failed", self._spool.image.id)
            self._spool.fail(errors.SourceError(f"the relay failed with {type(error).__name__}"))
        finally:
            self._route.follows(None)

    # -- whom to ask ---------------------------------------------------------------------------------

    def _next(self) -> str:
        """Return whom to ask now, and wait as long as there is none.

        :raises SourceError: there was none for too long.
        """
        while True:
            version = self._route.version
            parent = self._first()
            if parent is not None:
                return parent
            self._route.follows(None, wants_origin=True)
            self._waiter.check()
            if self._system.monotonic() - self._fed_at > self._starved:
                raise _no_leave(self._spool.image)
            self._route.wait(version, _PIECE_SECONDS)

    def _first(self) -> str | None:
        """Return the nearest of those who may be asked now, or None if there is none."""
        now = self._system.monotonic()
        for parent in self._route.parents:
            if parent != self._system.name and self._avoided.get(parent, now) <= now:
                return parent
        return ORIGIN if self._route.origin else None

    def _take(self, supplier: str) -> None:
        """Take bytes from one supplier until all are there, it fails, or the route leads elsewhere."""
        self._route.follows(supplier)
        if supplier == ORIGIN:
            with checked.Opened(self._origin, self._spool.image, self._spool.have) as chunks:
                self._feed(chunks, supplier)
            if not self._spool.is_complete and self._first() == ORIGIN:
                raise errors.SourceError("the data ended too early", image=self._spool.image.id)
            return
        try:
            self._ask_for_pieces(supplier)
            with self._parents.data(supplier, self._spool.image, self._spool.have) as body:
                self._feed(body, supplier)
        except (_WrongHashes, _FromThere):
            return
        except (errors.SourceError, errors.ImageNotFound) as error:
            # A parent that has no more than this host waits for its own: no reason to leave it.
            has = self._parents.has(supplier, self._spool.image)
            is_hungry = self._system.monotonic() - self._fed_at > _HUNGRY
            if has is None or has > self._spool.have or is_hungry or isinstance(error, _WrongPiece):
                self._avoid(supplier, error)
            else:
                self._route.wait(self._route.version, _BREATH)

    def _avoid(self, parent: str, error: errors.ImageCacheError) -> None:
        LOG.info("Host %s does not pass image %s on: %s", parent, self._spool.image.id, error)
        self._avoided[parent] = self._system.monotonic() + _AVOIDED

    # -- taking bytes --------------------------------------------------------------------------------

    def _feed(self, chunks: Iterator[bytes] | checked.Opened, supplier: str) -> None:
        version, held = self._route.version, bytearray()
        for chunk in chunks:
            self._waiter.check()
            self._fed_at = self._system.monotonic()
            if len(chunk) + len(held) > self._spool.size - self._spool.have:
                raise errors.SourceError("more bytes come than the image has", image=self._spool.image.id)
            if self._spool.known is None:
                self._spool.append(bytes(held) + chunk, supplier)
                held.clear()
            else:
                held += chunk
                self._pass_on(held, supplier)
            self._pace.took(len(chunk))
            if supplier != ORIGIN:
                self._ask_for_pieces(supplier)
            if self._spool.is_complete:
                return
            if version != self._route.version:
                version = self._route.version
                if self._first() != supplier:
                    return

    def _pass_on(self, held: bytearray, supplier: str) -> None:
        """Move the pieces that are complete from what is held to the spool, once they matched.

        :raises _WrongPiece: one does not match.
        """
        known, spool = self._spool.known, self._spool
        assert known is not None
        while held:
            piece, filled = divmod(spool.have, PIECE)
            wanted = min(PIECE - filled, spool.size - spool.have)
            if len(held) < wanted:
                return
            if filled:
                # The piece was begun before the hashes were known. It is compared once it is complete.
                spool.append(bytes(held[:wanted]), supplier)
                if spool.learn(known) is not None:
                    began = spool.supplier_of(piece * PIECE)
                    self._distrust(EARLIER if began == EARLIER else supplier, piece)
            elif hashlib.sha256(held[:wanted]).digest() != known.of(piece):
                self._distrust(supplier, piece)
            else:
                spool.append(bytes(held[:wanted]), supplier)
            del held[:wanted]

    def _distrust(self, supplier: str, piece: int) -> None:
        """Leave a supplier whose piece does not match. Two that contradict the hashes are believed.

        :raises _WrongPiece, _WrongHashes, _FromThere: always.
        """
        if supplier == EARLIER:
            _cut(self._spool, piece, self._route, supplier)
            raise _FromThere("what an earlier process left is wrong", image=self._spool.image.id)
        self._accused.add(supplier)
        if len(self._accused) > 1:
            LOG.warning("The hashes of image %s are not believed any more", self._spool.image.id)
            self._spool.learn(None)
            self._route.forgive(self._accused)
            self._avoided.clear()
            raise _WrongHashes("the hashes of its pieces are wrong", image=self._spool.image.id)
        _cut(self._spool, piece, self._route, supplier)
        raise _WrongPiece(
            f"piece {piece} that {supplier or 'the image service'} sent is wrong", image=self._spool.image.id
        )

    def _ask_for_pieces(self, parent: str) -> None:
        """Ask a parent for the hashes of pieces, now and then, as long as they are not known.

        :raises _WrongPiece: what is there does not match them.
        """
        now = self._system.monotonic()
        if self._spool.known is not None or len(self._accused) > 1:
            return
        if now - self._asked_at.get(parent, now - _ASK_EVERY) < _ASK_EVERY:
            return
        self._asked_at[parent] = now
        known: Pieces | None = self._parents.pieces(parent, self._spool.image)
        wrong = None if known is None else self._spool.learn(known)
        if wrong is not None:
            self._distrust(self._spool.supplier_of(wrong * PIECE) or ORIGIN, wrong)


class _WrongPiece(errors.SourceError):
    """A piece does not match its hash."""


class _WrongHashes(errors.SourceError):
    """The hashes themselves are wrong."""


class _FromThere(errors.SourceError):
    """Bytes were thrown away that no supplier is to blame for: they are asked for anew."""


def _cut(spool: Spool, piece: int, route: Route, supplier: str | None = None) -> None:
    """Throw a wrong piece away, with what came behind it, and tell who sent it."""
    found = spool.supplier_of(piece * PIECE) if supplier is None else supplier
    if spool.have > piece * PIECE:
        spool.cut(piece * PIECE)
    if found and found != EARLIER:
        LOG.warning("Host %s passed on a wrong piece, %d, of image %s", found, piece, spool.image.id)
        route.blame(found)


def _digest_of(spool: Spool, waiter: Waiter) -> str:
    state, offset = hashlib.new(spool.digest.algorithm, usedforsecurity=False), 0
    with spool.reading() as reader:
        while offset < spool.size:
            waiter.check()
            data = reader.read(offset, _CHUNK, _PIECE_SECONDS)
            state.update(data)
            offset += len(data)
    return state.hexdigest()


def _names(spool: Spool) -> str:
    said = {ORIGIN: "the image service", EARLIER: "an earlier process of this host"}
    return ", ".join(sorted(said.get(name, f"host {name}") for name in spool.suppliers()))


def _no_leave(image: model.Image) -> errors.SourceError:
    return errors.SourceError(
        "none of the hosts that it should come from passes it on, and there is no leave to ask the image "
        "service",
        image=image.id,
        next_step="look at these hosts' agents, and resume the job",
    )
