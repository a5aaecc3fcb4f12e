# SPDX-License-Identifier: Apache-2.0
"""Downloads that go on where an earlier one broke off: what a fetch takes over, and what it leaves.

Whatever the image becomes in the cache, what is kept are the source's own bytes: the stage file itself where
they are stored as they come, else a file beside it. The next fetch passes over them as if they came from the
source, from the first on, and asks the source for the rest only. So the digest is of the whole, and what is
inspected, too.
"""

from __future__ import annotations

import contextlib
import logging
import os

from imagecache_lib import errors, model
from imagecache_lib.store import remains
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.remains import Remains
from imagecache_lib.store.reservations import Reservation
from imagecache_lib.store.stage import Stage
from imagecache_lib.system.translate import translated

LOG = logging.getLogger(__name__)


class Resumption:
    """What one fetch takes over from one that broke off, and leaves to the next one.

    :param source: which data it is, from :func:`imagecache_lib.sources.identity.identity`; empty for data of
        which nothing is taken over or left.
    :param size: of the data in bytes.
    :param ending: as :class:`~imagecache_lib.model.Request` has it as ``resume``.
    """

    def __init__(
        self, cache: CacheStore, name: str, source: str, size: int, ending: model.CancelToken
    ) -> None:
        self._cache = cache
        self._name = name
        self._source = source
        self._size = size
        self._ending = ending
        self._held: list[Stage] = []
        with translated(cache.layout.stages):
            self._found = remains.find(cache, name, self._source)
        self._offered = self._found

    def make_room(self, reservation: Reservation) -> None:
        """Remove what is left of an earlier fetch if a base would be evicted for its sake.

        :param reservation: of what becomes the base.
        """
        if self._found is not None and not reservation.fits(self._size):
            self._found.remove()
            self._found = self._offered = None

    # -- taking over ---------------------------------------------------------------------------------

    def begin_pass(self, stage: Stage) -> Remains | None:
        """Remove what the pass before kept. Returns what the first pass begins with, and None to the others.

        :param stage: what becomes the base, which is empty again.
        """
        for held in self._held:
            if held is not stage:
                held.discard()
        self._held.clear()
        offered, self._offered = self._offered, None
        return offered

    # -- leaving -------------------------------------------------------------------------------------

    def hold(self, stage: Stage) -> None:
        """Have a stage file left should the fetch break off: the source's bytes go into it as they come."""
        if self._source:
            stage.hold(self._source)
            if stage not in self._held:
                self._held.append(stage)

    def holds(self, stage: Stage) -> bool:
        """Whether a stage file is left should the fetch break off, so that no other may discard it."""
        return stage in self._held

    def beside(self, reservation: Reservation) -> Copy | None:
        """Return a file for the source's bytes beside what is made of them, or None if they are not kept.

        They are not where that would take room from a base.

        :param reservation: of what is made of them.
        """
        if not self._source:
            return None
        stage = Stage(self._cache, self._name)
        try:
            stage.write_info()
            if reservation.of(stage).fits(self._size):
                self.hold(stage)
                return Copy(stage)
        except BaseException:
            stage.discard()
            raise
        stage.discard()
        return None

    def void(self, stage: Stage) -> None:
        """Leave nothing of what came until now, nor of what was taken over: it is not the image's data.

        :param stage: what becomes the base, which stays the caller's.
        """
        for held in self._held:
            if held is not stage:
                held.discard()
        self._held.clear()
        if self._found is not None:
            self._found.remove()
        self._found = self._offered = None

    def end(self, stage: Stage, error: BaseException | None) -> None:
        """Leave or remove all that this fetch and the one before it left.

        :param stage: what becomes the base, which is the caller's if nothing went wrong.
        :param error: what ended the fetch, or None if it is complete.
        """
        was_stopped = isinstance(error, errors.CancelledError)
        leaves = isinstance(error, errors.SourceError) or (was_stopped and self._ending.is_set())
        longest = 0
        for held in self._held:
            if leaves:
                with contextlib.suppress(OSError):
                    longest = max(longest, os.fstat(held.fd).st_size)
                held.leave()
            elif held is not stage:
                held.discard()
        if self._found is not None:
            if leaves and longest < self._found.length:
                self._found.leave()
            else:
                self._found.remove()
        if error is not None and not (leaves and self.holds(stage)):
            stage.discard()


class Copy:
    """The source's bytes, in a file beside what is made of them."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._offset = 0

    def append(self, data: bytes) -> None:
        """Take the next bytes.

        :raises NoSpaceError, BackendError: they cannot be kept.
        """
        with translated(self._stage.path), memoryview(data) as view:
            written = 0
            while written < len(view):
                written += os.pwrite(self._stage.fd, view[written:], self._offset + written)
        self._offset += len(data)
        self._stage.writeback.wrote(len(data))
