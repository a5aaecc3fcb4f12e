# SPDX-License-Identifier: Apache-2.0
"""Threads that write what another thread hands over, fed through a bounded queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.system import threads
from imagecache_lib.system.sparse import Piece, Sink

#: Batches for each thread that wait or are being written. Who hands over more waits.
_BATCHES_PER_THREAD = 3


class Batch(Protocol):
    """What is handed over at once: about a MiB, so that threads are not woken for less."""

    def pieces(self) -> Iterable[tuple[int, Piece]]:
        """Return what to write, each at an offset of the disk. Called once, by the thread that writes."""


class WriteBehind:
    """Writes batches in any order. Threads start with the first of them.

    Chunks travel through ``queue.SimpleQueue``, as do the slots that bound their number: its operations need
    no code of the interpreter's, which all threads have to wait for each other to run.

    :param sink: where the batches are written.
    :param threads: number of threads.
    :param name: of each thread.
    """

    def __init__(self, sink: Sink, threads: int, name: str) -> None:
        self._sink = sink
        self._wanted_threads = threads
        self._name = name
        self._threads: list[threading.Thread] = []
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _slot in range(threads * _BATCHES_PER_THREAD):
            self._slots.put(None)
        self._error: BaseException | None = None

    def put(self, batch: Batch) -> None:
        """Hand over a batch; waits while too many are on their way. Nothing in it may change afterwards.

        :raises: what an earlier batch failed with: OSError where it could not be written.
        """
        self._raise_error()
        if not self._threads:
            for _ in range(self._wanted_threads):
                try:
                    self._threads.append(threads.start(self._work, name=self._name))
                except errors.BackendError:
                    if not self._threads:
                        raise
                    break  # fewer do as well
        self._slots.get()
        self._batches.put(batch)

    def drain(self) -> None:
        """Wait until every batch is written. Raises as :meth:`put`."""
        self._stop()
        self._raise_error()

    def close(self) -> None:
        """Stop the threads; what they have not begun is dropped. Nothing is written after that."""
        self._error = self._error or RuntimeError("closed")
        self._stop()

    def _stop(self) -> None:
        for _ in self._threads:
            self._batches.put(None)
        for thread in self._threads:
            threads.join(thread)
        self._threads = []

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None:
            # After an error the queue is only emptied, so that nobody waits for a slot for ever.
            if self._error is None:
                try:
                    self._sink.write_pieces(batch.pieces())
                except BaseException as error:
                    # Raised again in the thread that hands over.
                    self._error = error
            del batch
            self._slots.put(None)
