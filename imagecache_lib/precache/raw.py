# SPDX-License-Identifier: Apache-2.0
"""Images as their source sent them, for the hosts behind this one, while they arrive here.

Two resources for each image that this host relays or has, under the image id in unpadded base64url. Both
take GET and HEAD, and want the peers' token::

    /v1/raw/<id>            the source's bytes, as they come; one byte range, open at its end
    /v1/raw/<id>/pieces     hashes of the pieces (imagecache_lib.store.pieces), 404 until they are known

The entity tag is the digest of the whole as ``algorithm:hex``, and ``Imagecache-Have`` says how many bytes
are there when the answer begins. An answer that cannot be completed breaks off before its length. An image
that this host is about to receive is waited for.

What is in the cache as it came is served from there, without a spool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType

from imagecache_lib import errors, manager, model
from imagecache_lib.sources.parents import HAVE
from imagecache_lib.store.spool import Spool, SpoolReader, Spools

_RANGE = re.compile(r"bytes=(\d{1,19})-")
_CHUNK = 256 * 1024

#: Hosts that are served at a time: the next one, and those that lost theirs.
_MOST = 8

#: Seconds to wait for an image that is expected, and for its next byte. The other side asks anew.
_SPOOL_SECONDS = 4.0
_BYTE_SECONDS = 30.0

_RETRY_AFTER = 1


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request.

    :param range: of the bytes, as the header has it; empty for all.
    :param body: whether the answer is to have one.
    """

    image_id: str
    range: str
    body: bool


class Answer:
    """An answer. A context manager; the chunks are to be taken within.

    :ivar status: HTTP's.
    :ivar headers: of the answer.
    """

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = dict(headers)
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def chunks(self) -> Iterator[bytes]:
        """Yield the body as it comes.

        :raises SpoolCut: the rest does not come.
        """
        yield from ()


class _Bytes(Answer):
    def __init__(self, data: bytes, *, body: bool) -> None:
        super().__init__(200, {"Content-Type": "application/octet-stream", "Content-Length": str(len(data))})
        self._data = data if body else b""

    def chunks(self) -> Iterator[bytes]:
        if self._data:
            yield self._data


class _Data(Answer):
    """Bytes of an image from an offset on."""

    def __init__(
        self, reader: SpoolReader | _BaseReader, image: model.Image, have: int, asked: Asked
    ) -> None:
        assert image.size is not None
        self._reader = reader
        self._size = image.size
        found = _RANGE.fullmatch(asked.range)
        self._offset = int(found[1]) if found is not None else 0
        headers = {"ETag": f'"{image.digest}"', HAVE: str(have), "Accept-Ranges": "bytes"}
        if self._offset >= self._size:
            super().__init__(
                416, {**headers, "Content-Range": f"bytes */{self._size}", "Content-Length": "0"}
            )
            self._offset = self._size
            return
        if found is not None:
            headers["Content-Range"] = f"bytes {self._offset}-{self._size - 1}/{self._size}"
        headers["Content-Type"] = "application/octet-stream"
        headers["Content-Length"] = str(self._size - self._offset)
        super().__init__(206 if found is not None else 200, headers)
        if not asked.body:
            self._offset = self._size

    def held_by(self, closing: contextlib.ExitStack) -> Answer:
        """Let go of what a stack holds when the answer ends."""
        self._closing.push(closing)
        return self

    def chunks(self) -> Iterator[bytes]:
        while self._offset < self._size:
            data = self._reader.read(self._offset, _CHUNK, _BYTE_SECONDS)
            if not data:
                raise errors.SourceError("no more bytes came for a while")
            self._offset += len(data)
            yield data


class _BaseReader:
    """Reads a base that is stored as it came."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, offset: int, most: int, _seconds: float) -> bytes:
        return os.pread(self._fd, most, offset)


class RawImages:
    """What one host passes on. Safe to share between threads.

    :param cache: the host's image cache.
    :param spools: what is being received.
    """

    def __init__(self, cache: manager.ImageCacheManager, spools: Spools) -> None:
        self._cache = cache
        self._spools = spools
        self._slots = threading.BoundedSemaphore(_MOST)

    def data(self, asked: Asked) -> Answer:
        """Answer a request for an image's bytes."""
        with contextlib.ExitStack() as stack:
            if asked.body:
                if not self._slots.acquire(blocking=False):
                    return _busy()
                stack.callback(self._slots.release)
            spool = self._spools.find(asked.image_id, seconds=_SPOOL_SECONDS if asked.body else 0.0)
            answer: _Data | None = None
            if spool is not None:
                answer = self._of_spool(stack, spool, asked)
            if answer is None:
                answer = self._of_base(stack, asked)
            if answer is not None:
                return answer.held_by(stack.pop_all())
        if self._spools.is_expected(asked.image_id):
            return _busy() if asked.body else Answer(200, {HAVE: "0", "Content-Length": "0"})
        return Answer(404, {"Content-Length": "0"})

    def _of_spool(self, stack: contextlib.ExitStack, spool: Spool, asked: Asked) -> _Data | None:
        try:
            reader = stack.enter_context(spool.reading())
        except errors.SourceError:
            return None  # it was closed meanwhile
        return _Data(reader, spool.image, spool.have, asked)

    def _of_base(self, stack: contextlib.ExitStack, asked: Asked) -> _Data | None:
        """Answer from the cache, or return None if the cache has not the source's own bytes."""
        try:
            base = stack.enter_context(self._cache.lease_cached(asked.image_id))
        except errors.ImageCacheError:
            return None
        known = self._spools.pieces_of_base(asked.image_id)
        assert base.fd is not None  # a leased base is open
        size = os.fstat(base.fd).st_size
        # The hashes say how much data the source sent: a footer that was cut off is missed here.
        if base.digest is None or base.source_format != base.format or known is None or known.size != size:
            return None
        image = model.Image(asked.image_id, size=size, digest=base.digest)
        return _Data(_BaseReader(base.fd), image, size, asked)

    def pieces(self, asked: Asked) -> Answer:
        """Answer a request for the hashes of an image's pieces."""
        spool = self._spools.find(asked.image_id)
        known = spool.known if spool is not None else None
        if known is None:
            known = self._spools.pieces_of_base(asked.image_id)
        return (
            Answer(404, {"Content-Length": "0"})
            if known is None
            else _Bytes(known.to_bytes(), body=asked.body)
        )


def _busy() -> Answer:
    return Answer(503, {"Retry-After": str(_RETRY_AFTER), "Content-Length": "0"})
