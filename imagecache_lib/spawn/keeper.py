# SPDX-License-Identifier: Apache-2.0
"""Keeping a leased base image young for as long as the lease lasts."""

from __future__ import annotations

import queue
from types import TracebackType
from typing import Self

from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.system import threads

#: How many times a base is touched in the time after which Nova's pass removes an unused one.
_TOUCHES = 4

#: Seconds between two touches, at least.
_SHORTEST = 0.5


class Keeper:
    """Touches a base at intervals, for the length of a ``with`` statement.

    Nova's pass knows nothing of leases. It removes what no instance uses and was not touched for its minimum
    age, which this host has from the same configuration. A minimum age of nothing cannot be met: there the
    lease says at its end that the base is gone.

    The lease's body is the caller's own code, which may compute or wait for as long as it likes: hence a
    thread. It ends with the lease.
    """

    def __init__(self, cache: CacheStore, base: OpenBase) -> None:
        config = cache.config
        youngest = min(
            config.remove_unused_original_minimum_age_seconds,
            config.remove_unused_resized_minimum_age_seconds,
        )
        self._cache = cache
        self._base = base
        self._interval = max(youngest / _TOUCHES, _SHORTEST)
        # Unlike an event it may be used by the garbage collector in the middle of the thread's own wait.
        self._over: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        # The thread knows nothing of this object, so that it ends with the last reference to it: of a lease
        # that was interrupted as it began, too.
        what = self._cache, self._base, self._over, self._interval
        self._thread = threads.start(_keep, *what, name=f"lease-{self._base.name[:8]}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.put(None)
        threads.join(self._thread)

    def __del__(self) -> None:
        self._over.put(None)


def _keep(cache: CacheStore, base: OpenBase, over: queue.SimpleQueue[None], interval: float) -> None:
    while True:
        try:
            return over.get(timeout=interval)
        except queue.Empty:
            cache.touch(base)
