# SPDX-License-Identifier: Apache-2.0
"""Digests of data in flight, and of its pieces, computed beside the transfer: hashing releases the
interpreter lock."""

from __future__ import annotations

import hashlib
import re

from imagecache_lib import errors, model
from imagecache_lib.ingest.aside import Aside, Ignoring
from imagecache_lib.ingest.stream import Consumer
from imagecache_lib.store.pieces import Hasher, Pieces
from imagecache_lib.system.waiter import Waiter


def checking(image: model.Image, waiter: Waiter, *, hash_pieces: bool) -> Consumer[Pieces | None]:
    """Return a consumer that compares the digest of an image's data with the one that the source states.

    At the end it returns the hashes of the data's pieces, or None if they are not wanted or no digest vouches
    for them: the source states none, for which the consumer does nothing, or that of another cache's
    conversion.

    :param waiter: the caller, which may stop waiting.
    :param hash_pieces: whether the hashes of the pieces are wanted.
    :raises ImageRejected: the algorithm is unknown here, or the value is none of it.
    """
    if image.digest is None:
        return Ignoring(None)
    return StreamDigest(image.digest, waiter, hash_pieces=hash_pieces and image.converted_from is None)


class _Hashes:
    """The hash of the whole, and the hashes of its pieces if they are asked for."""

    def __init__(self, algorithm: str, *, hash_pieces: bool) -> None:
        # md5 is what old images have; it detects damage, which is what it is used for here.
        self.whole = hashlib.new(algorithm, usedforsecurity=False)
        self.pieces = Hasher() if hash_pieces else None

    def update(self, data: bytes) -> None:
        self.whole.update(data)
        if self.pieces is not None:
            self.pieces.update(data)


class StreamDigest:
    """Hashes chunks on a thread of its own.

    :param expected: what the source says.
    :param waiter: the caller, which may stop waiting.
    :param hash_pieces: whether to hash the pieces of the data, too.
    :raises ImageRejected: the algorithm is unknown here, or the value is none of it.
    """

    def __init__(self, expected: model.Digest, waiter: Waiter, *, hash_pieces: bool = False) -> None:
        self._expected = expected
        if not expected.hex_length:
            raise errors.ImageRejected(
                f"its digest's algorithm {expected.algorithm!r} is not known here",
                next_step="have the image service use sha512",
            )
        if not re.fullmatch(f"[0-9a-f]{{{expected.hex_length}}}", expected.value):
            raise errors.ImageRejected(
                f"its digest {expected.value[:140]!r} is no {expected.algorithm} in hex",
                next_step="correct the digest where it is stated",
            )
        self._hashes = _Hashes(expected.algorithm, hash_pieces=hash_pieces)
        self._aside = Aside(self._hashes, "imagecache-digest", waiter)

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk, which must not change afterwards."""
        self._aside.feed(chunk)

    def finish(self) -> Pieces | None:
        """Compare the digest of the data with the expected one. Call after the last chunk.

        Returns the hashes of the data's pieces, which the digest now vouches for, or None if they were not
        asked for.

        :raises ImageRejected: the data differs from what was promised.
        """
        self._aside.finish()
        found = self._hashes.whole.hexdigest()
        if found != self._expected.value.lower():
            raise errors.ImageRejected(
                f"its {self._expected.algorithm} is {found}, promised was {self._expected.value}",
                next_step="have its owner upload a good image under a new id",
            )
        pieces = self._hashes.pieces
        return None if pieces is None else Pieces(self._expected, pieces.size, pieces.all())

    def close(self) -> None:
        """End the thread."""
        self._aside.close()
