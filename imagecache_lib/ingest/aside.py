# SPDX-License-Identifier: Apache-2.0
"""Consumers beside a transfer: a slow one on a thread of its own, or one that does nothing."""

from __future__ import annotations

import queue
from typing import Generic, Protocol, TypeVar

from imagecache_lib import errors
from imagecache_lib.system import threads
from imagecache_lib.system.maker import Maker
from imagecache_lib.system.waiter import Waiter

#: How many chunks may wait. The transfer waits for the consumer beyond that.
_WAITING = 8

#: Seconds between two looks whether the caller still waits.
_LOOK_EVERY = 0.25

#: Seconds that an abandoned consumer is waited for; it ends after the chunk that it is at.
_LINGER = 5.0

_Result = TypeVar("_Result")


class Updated(Protocol):
    """What sums bytes up: a hash of hashlib, a verifier of cryptography."""

    def update(self, data: bytes, /) -> object:
        """Take the next bytes."""


class Aside:
    """Hands chunks to a slow consumer, in order, on a thread of its own.

    No method waits without a limit, and a signal that raises at any point wedges nothing: chunks, and the
    slots that bound their number, travel through ``queue.SimpleQueue``, whose operations are atomic.

    :param updated: takes the chunks. :meth:`feed` or :meth:`finish` raises what it raises.
    :param waiter: the caller, which may stop waiting.
    """

    def __init__(self, updated: Updated, name: str, waiter: Waiter) -> None:
        self._maker = Maker()
        self._updated = updated
        self._waiter = waiter
        self._name = name
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _slot in range(_WAITING):
            self._slots.put(None)
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._abandoned = False
        self._over = False
        threads.start(self._run, name=name)

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk, which must not change afterwards.

        :raises BackendError: the consumer failed.
        """
        self._wait_for(self._slots)
        self._require_sound()
        self._chunks.put(chunk)

    def finish(self) -> None:
        """Wait until everything is consumed, and end the thread.

        :raises BackendError: the consumer failed.
        """
        if not self._over:
            self._chunks.put(None)
            self._wait_for(self._ended)
            self._over = True
        self._require_sound()

    def close(self) -> None:
        """End the thread, whatever is left to consume."""
        if self._over or not self._maker.is_here:
            return  # a forked child has no such thread
        self._over = self._abandoned = True
        self._chunks.put(None)
        try:
            self._ended.get(timeout=_LINGER)
        except queue.Empty:
            return  # it is a daemon, and holds nothing that another thread waits for

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            if self._error is None and not self._abandoned:
                try:
                    self._updated.update(chunk)
                except BaseException as error:
                    self._error = error
            self._slots.put(None)
        self._ended.put(None)

    def _wait_for(self, what: queue.SimpleQueue[None]) -> None:
        while True:
            try:
                return what.get(timeout=_LOOK_EVERY)
            except queue.Empty:
                self._waiter.check()

    def _require_sound(self) -> None:
        if isinstance(self._error, errors.ImageCacheError):
            raise self._error
        if self._error is not None:
            raise errors.BackendError(
                f"{self._name} failed with {type(self._error).__name__}: {self._error}"
            ) from self._error


class Ignoring(Generic[_Result]):
    """A :class:`~imagecache_lib.ingest.stream.Consumer` that does nothing with its chunks.

    :param result: what :meth:`finish` returns.
    """

    def __init__(self, result: _Result) -> None:
        self._result = result

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk and do nothing with it."""

    def finish(self) -> _Result:
        """Return the result that was given."""
        return self._result

    def close(self) -> None:
        """Do nothing."""
