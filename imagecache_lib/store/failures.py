# SPDX-License-Identifier: Apache-2.0
"""How the last fetch of a base failed, for those who wait for it: failure is shared as success is.

Who waits says so by an empty file, ``stage/<name>.<random>.waits``. Where there is one, a fetch that fails
leaves a note, ``stage/<name>.failed``, so that threads, processes and hosts that share the cache see it. It
says nothing to a request that did not wait for that fetch: such a request fetches for itself. The last that
waits removes it. Losing either file, or reading a torn one, costs one more attempt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os

from imagecache_lib.store import layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import durable
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.maker import Maker


@dataclasses.dataclass(frozen=True)
class Failure:
    """A fetch that failed.

    :param of: a text that is the same for every fetch which would fail in the same way.
    :param is_final: the bytes were refused for good, so that no other attempt would do better.
    :param cause: the error's.
    :param next_step: likewise.
    :param id: random, and another one for each fetch.
    """

    of: str
    is_final: bool
    cause: str
    next_step: str | None = None
    id: str = dataclasses.field(default_factory=durable.new_id)


def write(cache: CacheStore, name: str, failure: Failure) -> None:
    """Tell those who wait for a base how its fetch failed, if any do, and it can be written down."""
    with contextlib.suppress(OSError):
        if _waiting(cache, name):
            data = json.dumps(dataclasses.asdict(failure)).encode()
            durable.write_file(cache.layout.failure(name), data, sync=False)


def _waiting(cache: CacheStore, name: str) -> bool:
    """Whether any request waits for a base."""
    return any(
        entry.startswith(f"{name}.") and entry.endswith(layout.WAITS)
        for entry in os.listdir(cache.layout.stages)
    )


def last(cache: CacheStore, name: str) -> Failure | None:
    """Return how the last fetch of a base failed, or None if none did or that cannot be read."""
    try:
        data = durable.read_file(cache.layout.failure(name))
        if data is None:
            return None
        failure = Failure(**json.loads(data))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (failure.of, failure.cause, failure.id)
    typed = all(type(text) is str for text in texts) and type(failure.is_final) is bool
    return failure if typed and isinstance(failure.next_step, str | None) else None


class Awaited:
    """The fetches of one base that one request has waited for."""

    def __init__(self) -> None:
        self._maker = Maker()
        self._mark: str | None = None
        self._known: str | None = None
        self._ended: set[str] = set()

    def look(self, cache: CacheStore, name: str) -> None:
        """Look how fetches end while the request waits, which it does since the first look.

        A fetch that failed before that is none that it waited for.
        """
        failure = last(cache, name)
        if self._mark is None:
            self._mark = cache.layout.waits(name, durable.new_id())
            self._known = failure.id if failure is not None else None
        elif failure is not None and failure.id != self._known:
            self._ended.add(failure.id)
        with contextlib.suppress(OSError):  # a sweep may have taken it for a crash's
            Descriptor(self._mark, os.O_WRONLY | os.O_CREAT, 0o600).close()

    def end(self, cache: CacheStore, name: str) -> None:
        """Note that the request waits no longer. A forked child notes nothing: its parent still waits."""
        if self._mark is None or not self._maker.is_here:
            return
        with contextlib.suppress(OSError):
            os.unlink(self._mark)
        with contextlib.suppress(OSError):
            if not _waiting(cache, name):
                os.unlink(cache.layout.failure(name))
        self._mark = None

    def failed(self, cache: CacheStore, name: str) -> Failure | None:
        """Return the failure that the request shares: a final one, or the second of those that may pass.

        Returns None if there is none, so that the request tries for itself.
        """
        if self._mark is None:
            return None
        self.look(cache, name)
        failure = last(cache, name)
        if failure is None or failure.id not in self._ended:
            return None
        return failure if failure.is_final or len(self._ended) > 1 else None
