# SPDX-License-Identifier: Apache-2.0
"""Digests of data in flight, computed beside the transfer: hashing releases the interpreter lock."""

from __future__ import annotations

import hashlib

from imagecache_lib import errors, model
from imagecache_lib.ingest.aside import Aside, Ignoring
from imagecache_lib.ingest.stream import Consumer
from imagecache_lib.system.waiter import Waiter

_STRONG_ENOUGH = frozenset(hashlib.algorithms_guaranteed)


def checking(expected: model.Digest | None, waiter: Waiter) -> Consumer[None]:
    """Return a consumer that compares an image's digest with the expected one.

    :param expected: what the source says, or None if it says nothing; then the consumer does nothing.
    :param waiter: the caller, which may stop waiting.
    :raises ImageRejected: the algorithm is unknown here.
    """
    return Ignoring(None) if expected is None else StreamDigest(expected, waiter)


class StreamDigest:
    """Hashes chunks on a thread of its own.

    :param expected: what the source says.
    :param waiter: the caller, which may stop waiting.
    :raises ImageRejected: the algorithm is unknown here.
    """

    def __init__(self, expected: model.Digest, waiter: Waiter) -> None:
        self._expected = expected
        if expected.algorithm not in _STRONG_ENOUGH or expected.algorithm.startswith("shake"):
            raise errors.ImageRejected(
                f"its digest's algorithm {expected.algorithm!r} is not known here",
                next_step="have the image service use sha512",
            )
        # md5 is what old images have; it detects damage, which is what it is used for here.
        self._hash = hashlib.new(expected.algorithm, usedforsecurity=False)
        self._aside = Aside(self._hash, "imagecache-digest", waiter)

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk, which must not change afterwards."""
        self._aside.feed(chunk)

    def finish(self) -> None:
        """Compare the digest of the data with the expected one. Call after the last chunk.

        :raises ImageRejected: the data differs from what was promised.
        """
        self._aside.finish()
        found = self._hash.hexdigest()
        if found != self._expected.value.lower():
            raise errors.ImageRejected(
                f"its {self._expected.algorithm} is {found}, promised was {self._expected.value}",
                next_step="have its owner upload a good image under a new id",
            )

    def close(self) -> None:
        """End the thread."""
        self._aside.close()
