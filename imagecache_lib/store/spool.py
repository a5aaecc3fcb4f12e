# SPDX-License-Identifier: Apache-2.0
"""An image's bytes as its source sent them, kept while they arrive, for other hosts to read meanwhile.

A spool is a stage file (:mod:`imagecache_lib.store.stage`): owned by this process, reserved before its first
byte, counted with everything in flight, and swept like any other should the process die, unless the next one
takes it over (:mod:`imagecache_lib.store.remains`). It never becomes a base.

One thread fills a spool, in order; any number read it. When what came turns out to be wrong, the spool is cut
back to what is right, and those who read beyond that are told so.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
from collections.abc import Collection, Iterator

from imagecache_lib import errors, model
from imagecache_lib.store import layout, remains
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.evictor import Evictor
from imagecache_lib.store.pieces import PIECE, Hasher, Pieces
from imagecache_lib.store.remains import Remains
from imagecache_lib.store.reservations import Reservation
from imagecache_lib.store.stage import Stage
from imagecache_lib.system.host import System
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

#: Stands for who sent the bytes that an earlier process of this host left.
EARLIER = "(an earlier process)"


class SpoolCut(errors.SourceError):
    """The bytes that were being read are wrong, or no longer kept: begin again, at an earlier byte."""


class Spool:
    """The bytes of one image.

    :ivar image: as its own image service describes it, with size and digest.
    :ivar readers: how many read it now.
    :ivar read_at: when reading began or ended last, by the monotonic clock.
    :param stage: the file, which has room for the whole image.
    """

    def __init__(self, image: model.Image, stage: Stage, host: System) -> None:
        assert image.size is not None and image.digest is not None  # others are not spooled
        self.image = image
        self.size = image.size
        self.digest = image.digest
        self._stage = stage
        self._host = host
        self.readers = 0
        self.read_at = host.monotonic()
        self._changed = threading.Condition()
        self._have = 0
        self._cuts = 0
        self._lowest_cut = self.size
        self._closed = False
        self._error: errors.ImageCacheError | None = None
        self._hasher = Hasher()
        self._known: Pieces | None = None
        #: From which byte on which host sent them, in order.
        self._suppliers: list[tuple[int, str]] = []

    @property
    def have(self) -> int:
        """How many bytes are there, from the first on."""
        return self._have

    @property
    def is_complete(self) -> bool:
        return self._have == self.size

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def cuts(self) -> int:
        """How often bytes turned out to be wrong. A reader compares it with what it was when it began."""
        return self._cuts

    @property
    def allocated(self) -> int:
        """Bytes that the spool takes on disk now."""
        return 0 if self._closed else self._stage.allocated

    @property
    def known(self) -> Pieces | None:
        """The hashes that the pieces must have, or None as long as they are not known."""
        return self._known

    def good_below(self, cuts: int) -> int:
        """Return below which byte nothing changed since there were so many cuts."""
        with self._changed:
            return self.size if cuts == self._cuts else self._lowest_cut

    # -- filling -------------------------------------------------------------------------------------

    def append(self, data: bytes, supplier: str) -> None:
        """Take the next bytes.

        :param supplier: who sent them.
        :raises NoSpaceError, BackendError: they cannot be kept.
        :raises SpoolCut: the spool is closed.
        """
        self._hasher.update(data)
        with self._changed:
            if self._closed:
                raise SpoolCut("the image is no longer passed on", image=self.image.id)
            with translated(self._stage.path), memoryview(data) as view:
                written = 0
                while written < len(view):
                    written += os.pwrite(self._stage.fd, view[written:], self._have + written)
            if not self._suppliers or self._suppliers[-1][1] != supplier:
                self._suppliers.append((self._have, supplier))
            self._have += len(data)
            self._error = None
            self._changed.notify_all()

    def cut(self, offset: int) -> None:
        """Throw away what lies behind an offset, which is a multiple of a piece's size."""
        with self._changed:
            self._cuts += 1
            self._lowest_cut = offset if self._cuts == 1 else min(self._lowest_cut, offset)
            # Behind the end there is nothing: the piece that is coming goes on.
            if offset < self._have:
                self._have = offset
                self._hasher.cut(offset // PIECE)
                self._suppliers = [each for each in self._suppliers if each[0] < offset]
            self._changed.notify_all()

    def fail(self, error: errors.ImageCacheError | None) -> None:
        """Tell readers why no more bytes come for now, or with None that they may come again."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def supplier_of(self, offset: int) -> str | None:
        """Return who sent the byte at an offset, or None if it is not there."""
        at = bisect.bisect_right(self._suppliers, offset, key=lambda each: each[0]) - 1
        return self._suppliers[at][1] if at >= 0 and offset < self._have else None

    def suppliers(self) -> frozenset[str]:
        """Return everyone who sent bytes that are there."""
        return frozenset(name for _offset, name in self._suppliers)

    def restore(self, left: Remains, waiter: Waiter) -> None:
        """Take what an earlier process left in the stage file for the first bytes.

        :raises CancelledError, LockTimeoutError: the caller no longer waits.
        """
        have = 0
        for chunk in left.chunks():
            waiter.check()
            if have + len(chunk) > self.size:
                break
            self._hasher.update(chunk)
            have += len(chunk)
        with self._changed:
            self._suppliers = [(0, EARLIER)] if have else []
            self._have = have

    # -- right or wrong ------------------------------------------------------------------------------

    def learn(self, known: Pieces | None) -> int | None:
        """Take the hashes that the pieces must have; with None, no longer compare with any.

        Returns the number of the first piece that is there and wrong, or None if none is.
        """
        if known is not None and (known.digest, known.size) != (self.digest, self.size):
            return None
        self._known = known
        return None if known is None else self._hasher.first_difference(known)

    def prove(self) -> None:
        """Take the own hashes for right: the digest of the whole was compared, and is right."""
        if self.is_complete:
            self._known = Pieces(self.digest, self.size, self._hasher.all())

    # -- reading -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self) -> Iterator[SpoolReader]:
        """Yield a reader, which goes on reading what was there even if the spool is closed meanwhile.

        :raises SpoolCut: the spool is closed already.
        """
        with self._changed:
            if self._closed:
                raise SpoolCut("the image is no longer passed on", image=self.image.id)
            self._stage.touch()
            fd = os.dup(self._stage.fd)
            cuts = self._cuts
            self._count_reader(1)
        try:
            yield SpoolReader(self, fd, cuts)
        finally:
            os.close(fd)
            with self._changed:
                self._count_reader(-1)

    def _count_reader(self, change: int) -> None:
        self.readers += change
        self.read_at = self._host.monotonic()

    def wait(self, offset: int, cuts: int, seconds: float) -> int:
        """Wait until the byte at an offset is there. Returns how many bytes are there, from the first on.

        :param cuts: how many there had been when reading began.
        :raises SpoolCut: bytes that were read are wrong, or the spool was closed before the byte came.
        :raises ImageCacheError: why no more bytes come for now.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._settled(offset, cuts), seconds)
            if self._cuts != cuts:
                raise SpoolCut("bytes that were passed on are wrong", image=self.image.id)
            if self._have <= offset:
                if self._closed:
                    raise SpoolCut("the image is no longer passed on", image=self.image.id)
                if self._error is not None:
                    raise self._error
            return self._have

    def _settled(self, offset: int, cuts: int) -> bool:
        return self._have > offset or self._closed or self._error is not None or self._cuts != cuts

    def close(self, *, leave: bool = False) -> None:
        """Remove the spool.

        :param leave: leave what is there of an image that is not complete, for the next process.
        """
        with self._changed:
            if not self._closed:
                self._closed = True
                if leave and not self.is_complete:
                    self._stage.leave()
                else:
                    self._stage.discard()
                self._changed.notify_all()


class SpoolReader:
    """Reads one spool. Used by one thread."""

    def __init__(self, spool: Spool, fd: int, cuts: int) -> None:
        self._spool = spool
        self._fd = fd
        self.cuts = cuts

    def read(self, offset: int, most: int, seconds: float) -> bytes:
        """Return at most so many bytes from an offset, or none if none came within so many seconds.

        :raises: as :meth:`Spool.wait`.
        """
        have = self._spool.wait(offset, self.cuts, seconds)
        if have <= offset:
            return b""
        data = os.pread(self._fd, min(most, have - offset), offset)
        self._spool.wait(offset, self.cuts, 0.0)  # a cut meanwhile may have let other bytes be written there
        return data


class Spools:
    """The spools of one host, one for each image at most. Safe to share between threads.

    :param evictor: asked for room.
    """

    def __init__(self, cache: CacheStore, evictor: Evictor) -> None:
        self._cache = cache
        self._evictor = evictor
        self._changed = threading.Condition()
        self._spools: dict[str, Spool] = {}
        self._expected: set[str] = set()

    def open(self, image: model.Image, waiter: Waiter, *, source: str = "") -> Spool:
        """Return the spool of an image, a new one if need be. One thread per image calls this.

        A new one begins with what an earlier process left of the same data.

        :param source: which data that is, as :class:`~imagecache_lib.store.stage.StageInfo` has it.
        :raises NoSpaceError: there is no room for the whole image.
        :raises CancelledError, LockTimeoutError: the caller no longer waits.
        """
        found = self.find(image.id)
        if found is not None and (found.size, found.digest) == (image.size, image.digest):
            return found
        if found is not None:
            found.close()
        name = layout.base_name(image.id)
        with translated(self._cache.layout.stages):
            left = remains.find(self._cache, name, source)
        stage = Stage(self._cache, name, taken=None if left is None else (left.id, left.owner))
        try:
            stage.hold(source)
            Reservation(stage, self._cache, self._evictor, waiter).raise_to(image.size or 0)
            made = Spool(image, stage, self._cache.host)
            if left is not None:
                made.restore(left, waiter)
        except BaseException:
            stage.discard()
            raise
        with self._changed:
            self._spools[image.id] = made
            self._changed.notify_all()
        return made

    def find(self, image_id: str, *, seconds: float = 0.0) -> Spool | None:
        """Return the spool of an image, or None if there is none.

        :param seconds: how long to wait for one that is expected.
        """

        def is_settled() -> bool:
            return image_id in self._spools or image_id not in self._expected

        with self._changed:
            self._changed.wait_for(is_settled, seconds)
            found = self._spools.get(image_id)
        return None if found is None or found.is_closed else found

    def is_expected(self, image_id: str) -> bool:
        """Return whether this host is about to receive an image."""
        return image_id in self._expected

    def expect(self, image_ids: Collection[str]) -> None:
        """Let those who ask for these images wait for their spools."""
        with self._changed:
            self._expected.update(image_ids)

    def settle(self, image_id: str) -> None:
        """Let nobody wait any more for the spool of an image that ended on this host."""
        with self._changed:
            self._expected.discard(image_id)
            self._changed.notify_all()

    def release(self, image_ids: Collection[str]) -> None:
        """Remove the spools of images."""
        for image_id in image_ids:
            self.settle(image_id)
            with self._changed:
                found = self._spools.pop(image_id, None)
            if found is not None:
                found.close()

    def close(self) -> None:
        """Remove all spools of images that are complete, and leave the others for the next process."""
        for spool in list(self._spools.values()):
            spool.close(leave=True)
        self.release(list(self._spools))

    def pieces_of_base(self, image_id: str) -> Pieces | None:
        """Return the hashes that are kept beside the base of an image, or None if there are none."""
        with contextlib.suppress(errors.CacheEntryError, errors.ImageRejected):
            record = self._cache.evidence_of(layout.base_name(image_id))
            return None if record is None else self._cache.pieces_of(record)
        return None
