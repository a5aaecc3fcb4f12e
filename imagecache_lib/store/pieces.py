# SPDX-License-Identifier: Apache-2.0
"""Hashes of the pieces of an image's data as its source sent it: what tells at once that a piece is wrong.

The digest of the whole tells so only after the last byte. Hosts that pass an image on while it arrives
compare each piece with these hashes. The hashes are taken of the source's bytes, before anything is decoded,
in the pass that computes the digest, and are believed only because that digest turned out to be right: they
are written when it has. They are of no image but the one with this digest and this size.

On disk (``records/<name>.pieces``, all numbers little-endian)::

    8 bytes   magic, version included
    32 bytes  random id of the base, as text; zero bytes where hashes travel between hosts
    u64       size of the source's data in bytes
    u32       bytes of a piece; the last one may be shorter
    u16       bytes of the following text
    text      the digest, as algorithm:hex
    32 bytes  SHA-256 of each piece, in order
    32 bytes  SHA-256 of all the above
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct

from imagecache_lib import model

#: Bytes of a piece.
PIECE = 256 * 1024

#: As much of a file of hashes as is read, in bytes: that of 2 TiB of data has not more.
LIMIT = 2**28 + 2**16

_MAGIC = b"imgpcs\0\1"
_HEADER = struct.Struct("<8s32sQIH")
_HASH = hashlib.sha256().digest_size


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The hashes of one image's pieces.

    :param digest: of the whole data.
    :param size: of the whole data, in bytes.
    :param hashes: SHA-256 of each piece, one behind the other.
    """

    digest: model.Digest
    size: int
    hashes: bytes = dataclasses.field(repr=False)

    def __len__(self) -> int:
        """Return the number of pieces."""
        return len(self.hashes) // _HASH

    def of(self, piece: int) -> bytes:
        """Return the SHA-256 that a piece must have."""
        return self.hashes[piece * _HASH : (piece + 1) * _HASH]

    def to_bytes(self, base_id: str = "") -> bytes:
        """Return the hashes as they are stored.

        :param base_id: the random id of the base that they are bound to, or an empty one for the way to
            another host.
        """
        text = str(self.digest).encode()
        data = _HEADER.pack(_MAGIC, base_id.encode(), self.size, PIECE, len(text)) + text + self.hashes
        return data + hashlib.sha256(data).digest()


def parse(data: bytes, base_id: str = "") -> Pieces | None:
    """Return the hashes in ``data``, or None if ``data`` is torn, unknown, or bound to another base.

    :param base_id: as :meth:`Pieces.to_bytes` was given it.
    """
    content, own_hash = data[:-_HASH], data[-_HASH:]
    if len(content) < _HEADER.size or own_hash != hashlib.sha256(content).digest():
        return None
    magic, bound_to, size, piece, length = _HEADER.unpack_from(content)
    text, hashes = content[_HEADER.size :][:length], content[_HEADER.size + length :]
    bound = (magic, bound_to.rstrip(b"\0"), piece) == (_MAGIC, base_id.encode(), PIECE)
    if not bound or len(hashes) != count(size) * _HASH:
        return None
    algorithm, _, value = text.decode("ascii", "replace").partition(":")
    return Pieces(model.Digest(algorithm, value), size, hashes)


def count(size: int) -> int:
    """Return how many pieces so many bytes have."""
    return -(-size // PIECE)


class Hasher:
    """Hashes data that comes in order, in chunks of any length."""

    def __init__(self) -> None:
        self._hashes = bytearray()
        self._current = hashlib.sha256()
        self._filled = 0

    @property
    def size(self) -> int:
        """How many bytes came."""
        return len(self) * PIECE + self._filled

    def __len__(self) -> int:
        """Return the number of pieces that are complete."""
        return len(self._hashes) // _HASH

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        with memoryview(data) as view:
            position = 0
            while position < len(view):
                end = min(len(view), position + PIECE - self._filled)
                self._current.update(view[position:end])
                self._filled += end - position
                position = end
                if self._filled == PIECE:
                    self._hashes += self._current.digest()
                    self._current, self._filled = hashlib.sha256(), 0

    def cut(self, count: int) -> None:
        """Forget all but the first so many pieces."""
        del self._hashes[count * _HASH :]
        self._current, self._filled = hashlib.sha256(), 0

    def all(self) -> bytes:
        """Return the SHA-256 of each piece, the last and shorter one included, one behind the other."""
        return bytes(self._hashes) + (self._current.digest() if self._filled else b"")

    def first_difference(self, known: Pieces) -> int | None:
        """Return the number of the first complete piece that differs from known hashes, or None if none does.

        A last piece that is shorter than others counts once all of ``known.size`` bytes came.
        """
        mine = self.all() if self.size == known.size else bytes(self._hashes)
        if known.hashes.startswith(mine):
            return None
        return next(
            (
                piece
                for piece in range(len(mine) // _HASH)
                if mine[piece * _HASH : (piece + 1) * _HASH] != known.of(piece)
            ),
            None,
        )
