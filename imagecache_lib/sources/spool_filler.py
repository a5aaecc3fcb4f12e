# SPDX-License-Identifier: Apache-2.0
"""Filling a spool with an image's bytes: from the nearest host that has them, or from the image service.

Should a parent fail, the next one goes on at the same byte. Where the hashes of pieces are known, a piece
that a parent sent is passed on only after it matched. Before the first host has the whole image none are
known: then bytes are passed on as they come, and the digest decides at the end.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator

from imagecache_lib import errors, model
from imagecache_lib.sources import checked
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.sources.parents import Parents
from imagecache_lib.sources.route import ORIGIN, Route
from imagecache_lib.store.pieces import PIECE, Pieces
from imagecache_lib.store.spool import EARLIER, Spool
from imagecache_lib.system.rate import Pace
from imagecache_lib.system.waiter import Waiter

LOG = logging.getLogger(__name__)

#: Seconds for which a parent that failed is left alone.
_AVOIDED = 10.0

#: Seconds without a byte after which a parent is left although it waits itself: others may have more.
_HUNGRY = 20.0

#: Seconds between two questions for the hashes of pieces.
_ASK_EVERY = 5.0

#: Seconds before a parent that waits itself is asked again.
_BREATH = 0.2

#: A wait is cut into pieces of this many seconds, so that a cancelled request ends soon.
PIECE_SECONDS = 0.5


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
        self._from_origin: checked.Opened | None = None
        self._fed_at = waiter.system.monotonic()

    @property
    def doubt(self) -> errors.SourceError | None:
        """The error to raise instead of blaming the image for what its service sent, or None."""
        return None if self._from_origin is None else self._from_origin.doubt

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
                raise no_leave(self._spool.image)
            self._route.wait(version, PIECE_SECONDS)

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
                self._from_origin = chunks
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
            if not chunk:
                continue
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
            cut_piece(self._spool, piece, self._route, supplier)
            raise _FromThere("what an earlier process left is wrong", image=self._spool.image.id)
        self._accused.add(supplier)
        if len(self._accused) > 1:
            LOG.warning("The hashes of image %s are not believed any more", self._spool.image.id)
            self._spool.learn(None)
            self._route.forgive(self._accused)
            self._avoided.clear()
            raise _WrongHashes("the hashes of its pieces are wrong", image=self._spool.image.id)
        cut_piece(self._spool, piece, self._route, supplier)
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


def cut_piece(spool: Spool, piece: int, route: Route, supplier: str | None = None) -> None:
    """Throw a wrong piece away, with what came behind it, and tell who sent it."""
    found = spool.supplier_of(piece * PIECE) if supplier is None else supplier
    if spool.have > piece * PIECE:
        spool.cut(piece * PIECE)
    if found and found != EARLIER:
        LOG.warning("Host %s passed on a wrong piece, %d, of image %s", found, piece, spool.image.id)
        route.blame(found)


def no_leave(image: model.Image) -> errors.SourceError:
    """Return the error of an image that no host passes on and that may not be asked of the image service."""
    return errors.SourceError(
        "none of the hosts that it should come from passes it on, and there is no leave to ask the image "
        "service",
        image=image.id,
        next_step="look at these hosts' agents, and resume the job",
    )
