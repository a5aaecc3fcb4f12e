# SPDX-License-Identifier: Apache-2.0
"""Threads that inflate clusters and write them, fed through a bounded queue."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator

from imagecache_lib.formats.qcow2.inflate import Inflate
from imagecache_lib.system.sparse import Piece, Sink

#: Clusters handed over at once hold about this much. Threads are not woken for every small one, and what lies
#: in one run on the disk is written and summed up by one call each.
_BATCH_BYTES = 2**20
#: Nor do they come from more of the stream than this, all of which a waiting batch keeps in memory.
_BATCH_SPAN = 2**20
_QUEUED_BATCHES_PER_THREAD = 2
_MAX_THREADS = 4

#: Guest offset, bytes wanted of the cluster (all but at the disk's end), compressed data.
Job = tuple[int, int, "bytes | memoryview"]


def default_threads() -> int:
    """Return how many threads inflate: the processors this process may use, at most four."""
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))


class InflatePool:
    """Inflates clusters in any order and writes each to its place. Threads start with the first batch.

    :param sink: where clusters are written.
    :param cluster_size: bytes that each inflates to.
    """

    def __init__(self, sink: Sink, cluster_size: int, inflate: Inflate, threads: int) -> None:
        self._sink = sink
        self._cluster_size = cluster_size
        self._inflate = inflate
        self._wanted_threads = threads
        self._threads: list[threading.Thread] = []
        self._queue: queue.Queue[list[Job] | None] = queue.Queue(threads * _QUEUED_BATCHES_PER_THREAD)
        self._batch: list[Job] = []
        self._batch_limit = max(1, _BATCH_BYTES // cluster_size)
        self._span = 0
        self._error: BaseException | None = None

    def submit(self, guest: int, length: int, data: bytes | memoryview, passed: int) -> None:
        """Hand over a cluster; waits while too many are queued.

        :param passed: bytes of the stream since the cluster before.
        :raises ImageRejected: an earlier cluster does not inflate.
        :raises OSError: an earlier one could not be written.
        """
        self._span += passed
        self._batch.append((guest, length, data))
        if len(self._batch) >= self._batch_limit or self._span >= _BATCH_SPAN:
            self._hand_over()

    def inflate_now(self, guest: int, length: int, data: bytes | memoryview) -> None:
        """Inflate and write a cluster in the calling thread. Raises as :meth:`submit`, but at once."""
        self._sink.write(self._inflate(data, self._cluster_size), guest, 0, length)

    def drain(self) -> None:
        """Wait until every cluster is written. Raises as :meth:`submit`."""
        if self._batch:
            self._hand_over()
        self._stop()
        self._raise_error()

    def close(self) -> None:
        """Stop the threads; what they have not begun is dropped."""
        self._error = self._error or RuntimeError("closed")
        self._stop()

    def _hand_over(self) -> None:
        self._raise_error()
        if not self._threads:
            for _ in range(self._wanted_threads):
                thread = threading.Thread(target=self._work, name="qcow2-inflate", daemon=True)
                thread.start()
                self._threads.append(thread)
        self._queue.put(self._batch)
        self._batch, self._span = [], 0

    def _stop(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                self._sink.write_pieces(self._inflated(batch))
            except BaseException as error:
                # Raised again in the thread that feeds.
                self._error = error
            del batch

    def _inflated(self, batch: list[Job]) -> Iterator[tuple[int, Piece]]:
        for guest, length, data in batch:
            # After an error the queue is only emptied, so that no writer waits on it for ever.
            if self._error is not None:
                return
            yield guest, (self._inflate(data, self._cluster_size), 0, length)
