# SPDX-License-Identifier: Apache-2.0
"""Digests of data in flight, computed beside the transfer: hashing releases the interpreter lock."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable

from imagecache_lib import errors, model

#: How many chunks may wait to be hashed. The transfer waits for the hash beyond that.
_WAITING = 8

_STRONG_ENOUGH = frozenset(hashlib.algorithms_guaranteed)


class Aside:
    """Hands chunks to something slow, in order, on a thread of its own.

    :param consume: must not raise.
    """

    def __init__(self, consume: Callable[[bytes], object], name: str) -> None:
        self._consume = consume
        self._queue: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            self._consume(chunk)

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk, which must not change afterwards."""
        self._queue.put(chunk)

    def close(self) -> None:
        """Wait until everything is consumed, and end the thread. Harmless when it has ended."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None


class StreamDigest:
    """Hashes chunks on a thread of its own.

    :param expected: what the source says. None: nothing is computed, as there is nothing to compare with.
    :raises ImageRejected: the algorithm is unknown here.
    """

    def __init__(self, expected: model.Digest | None) -> None:
        self._expected = expected
        self._aside: Aside | None = None
        if expected is None:
            return
        if expected.algorithm not in _STRONG_ENOUGH or expected.algorithm.startswith("shake"):
            raise errors.ImageRejected(
                f"its digest's algorithm {expected.algorithm!r} is not known here",
                next_step="have the image service use sha512",
            )
        # md5 is what old images have; it detects damage, which is what it is used for here.
        self._hash = hashlib.new(expected.algorithm, usedforsecurity=False)
        self._aside = Aside(self._hash.update, "imagecache-digest")

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk, which must not change afterwards."""
        if self._aside is not None:
            self._aside.feed(chunk)

    def close(self) -> None:
        """End the thread. Harmless when it has ended."""
        if self._aside is not None:
            self._aside.close()

    def mismatch(self) -> str | None:
        """Return how the data differs from what was promised, as a clause; None if it does not."""
        self.close()
        if self._expected is None:
            return None
        found = self._hash.hexdigest()
        if found == self._expected.value.lower():
            return None
        return f"its {self._expected.algorithm} is {found}, promised was {self._expected.value}"
