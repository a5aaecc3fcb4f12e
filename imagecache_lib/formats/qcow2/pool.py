# SPDX-License-Identifier: Apache-2.0
"""What becomes of clusters: threads of their own inflate those that are compressed, and write all of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence

from imagecache_lib.formats.qcow2.inflate import Inflater
from imagecache_lib.system.sparse import Piece, Sink
from imagecache_lib.system.write_behind import WriteBehind

#: Clusters handed over at once hold about this much. Threads are not woken for every small one, and what lies
#: in one run on the disk is written and summed up by one call each.
_BATCH_BYTES = 2**20
#: Nor do they come from more of the stream than this, all of which a waiting batch keeps in memory.
_BATCH_SPAN = 2**20
_MAX_THREADS = 4

#: Guest offset, bytes wanted of the cluster (all but at the disk's end), compressed data.
Job = tuple[int, int, "bytes | memoryview"]


def default_threads() -> int:
    """Return how many threads inflate: the processors this process may use, at most four."""
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))


@dataclasses.dataclass(frozen=True)
class _Compressed:
    """Compressed clusters.

    :param size: bytes that each inflates to.
    """

    inflater: Inflater
    size: int
    jobs: Sequence[Job]

    def pieces(self) -> Iterable[tuple[int, Piece]]:
        clusters = self.inflater.all([data for _guest, _length, data in self.jobs], self.size)
        for (guest, length, _data), cluster in zip(self.jobs, clusters, strict=True):
            yield guest, (cluster, 0, length)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Clusters that are not compressed."""

    placed: Sequence[tuple[int, Piece]]

    def pieces(self) -> Iterable[tuple[int, Piece]]:
        return self.placed


class InflatePool:
    """Inflates clusters in any order and writes each to its place. Threads start with the first batch.

    :param sink: where clusters are written.
    :param cluster_size: bytes that each inflates to.
    """

    def __init__(self, sink: Sink, cluster_size: int, inflater: Inflater, threads: int) -> None:
        self._sink = sink
        self._cluster_size = cluster_size
        self._inflater = inflater
        self._behind = WriteBehind(sink, threads, "qcow2-decode")
        self._batch: list[Job] = []
        self._batch_limit = max(1, _BATCH_BYTES // cluster_size)
        self._span = 0

    @property
    def room(self) -> int:
        """How many more compressed clusters one batch takes, at least one."""
        return self._batch_limit - len(self._batch)

    def submit(self, jobs: Sequence[Job], passed: int) -> None:
        """Hand over compressed clusters, no more than there is room for; waits while too many are queued.

        :param passed: bytes of the stream since the clusters before.
        :raises ImageRejected: an earlier cluster does not inflate.
        :raises OSError: an earlier one could not be written.
        """
        self._span += passed
        self._batch += jobs
        if len(self._batch) >= self._batch_limit or self._span >= _BATCH_SPAN:
            self._hand_over()

    def place(self, pieces: Sequence[tuple[int, Piece]]) -> None:
        """Hand over clusters that are not compressed, up to a MiB. Waits and raises as :meth:`submit`."""
        self._behind.put(_Stored(pieces))

    def inflate_now(self, guest: int, length: int, data: bytes | memoryview) -> None:
        """Inflate and write a cluster in the calling thread. Raises as :meth:`submit`, but at once."""
        self._sink.write(self._inflater.one(data, self._cluster_size), guest, 0, length)

    def drain(self) -> None:
        """Wait until every cluster is written. Raises as :meth:`submit`."""
        if self._batch:
            self._hand_over()
        self._behind.drain()

    def close(self) -> None:
        """Stop the threads; what they have not begun is dropped."""
        self._behind.close()

    def _hand_over(self) -> None:
        batch, self._batch, self._span = self._batch, [], 0
        self._behind.put(_Compressed(self._inflater, self._cluster_size, batch))
