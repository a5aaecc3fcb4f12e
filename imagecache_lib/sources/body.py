# SPDX-License-Identifier: Apache-2.0
"""The data of an HTTP answer as they arrive, and whether they are whole.

RFC 9112, section 6.3, says what ends a body.
"""

from __future__ import annotations

import http.client
import itertools
from collections.abc import Iterator

import requests
import urllib3.exceptions

from imagecache_lib import errors, model
from imagecache_lib.formats import foreign
from imagecache_lib.sources import connection, exchange
from imagecache_lib.sources.interface import SourceRefused

#: Most bytes that one read takes. read1 returns what has arrived, so that a slow server does not keep a
#: request's deadline from being looked at.
CHUNK = 2**20
#: What to do about data of which a server tells two lengths.
STATE_IT = "try again later; if that is all of it, state its size or digest"
#: The Transfer-Encoding that http.client undoes, if it is all that the header has.
CHUNKED = "chunked"
_TRANSPORT_ERRORS = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
)


class Body:
    """The data of an answer, in chunks as they arrive: the iterator that :meth:`ImageSource.open` promises.

    :ivar image: the description, as this answer corrects it.
    :ivar doubt: what is wrong with the answer, if the data turns out not to be the image's.
    :ivar hinted: whether ``image.size`` is what the server told before, and this answer tells no length.
    :param offset: which byte of the image the data begins with. At the first one it can be a document.
    :param until: number of bytes of the image that must be here when the data ends, or they were cut off; or
        None if nothing tells.
    :param exact: more bytes than that are none of the image either.
    :param stated: number of bytes that the image has as an operator states it, or None.
    :param told: number of bytes that the server told before it sent the data, or None.
    """

    def __init__(
        self,
        response: requests.Response,
        image: model.Image,
        doubt: errors.SourceError | None = None,
        *,
        offset: int | None = None,
        until: int | None = None,
        exact: bool = False,
        stated: int | None = None,
        told: int | None = None,
        hinted: bool = False,
    ) -> None:
        self.image = image
        self.hinted = hinted
        self.doubt: errors.SourceError | None = doubt
        self._looked = offset != 0
        self._reached = offset or 0
        self._until = until
        self._exact = exact
        self._stated = stated
        self._told = told
        self._response = response
        self._where = exchange.shown(response.url)
        self._delimited = is_delimited(response)
        self._chunks = read(response, image.id)

    def __iter__(self) -> Body:
        return self

    def look(self) -> None:
        """Read the first chunk ahead, so that a document raises its :attr:`doubt` before a byte is taken.

        :raises SourceError: it broke off, or nothing came.
        """
        if not self._looked:
            self._looked = True
            first = list(itertools.islice(self._chunks, 1))
            self._chunks = itertools.chain(first, self._chunks)
            self.doubt = self.doubt or self._document(first[0] if first else b"")

    def __next__(self) -> bytes:
        self.look()
        try:
            chunk = next(self._chunks)
        except StopIteration:
            self._check_end()
            raise
        self._reached += len(chunk)
        if self._stated is not None and self._reached > self._stated and self.doubt is None:
            self.doubt = other_length(self._where, self.image.id, "more bytes", self._stated)
        return chunk

    def _check_end(self) -> None:
        if self._until is not None and self._reached < self._until:
            raise cut_off(self._where, self.image.id, self._reached, self._until)
        if self._until is not None and self._exact and self._reached > self._until:
            raise errors.SourceError(
                f"{self._where} sends {self._reached} bytes, and told {self._until} with a part of them",
                image=self.image.id,
                next_step=STATE_IT,
            )
        if not self._delimited and self._is_unknown() and connection.was_cut_off(self._response):
            # RFC 9112, section 9.8: such an answer is only complete if TLS was ended.
            raise errors.SourceError(
                f"{self._where} told no length, and the connection was not ended but broke off: the data may"
                " have been cut off",
                image=self.image.id,
                next_step=STATE_IT,
            )
        if self.doubt is None:
            self.doubt = two_lengths(self._where, self.image.id, self._reached, self._told)
        if (self.hinted or self.image.size is None) and not self._delimited and self.doubt is None:
            self.doubt = errors.SourceError(
                "the data is not the image's, and may have been cut off: its length is not told",
                image=self.image.id,
            )

    def _is_unknown(self) -> bool:
        """Return whether nothing tells how long the data is, nor what it is."""
        lengths = (self.image.size, self._until, self._told)
        return self.image.digest is None and not any(length is not None for length in lengths)

    def _document(self, start: bytes) -> SourceRefused | None:
        """Return the doubt about data that begins as a document does, or None."""
        found = foreign.document(start[: foreign.LOOKED_AT])
        if found is None:
            return None
        return SourceRefused(
            f"{self._where} sends {found.what} and no disk", image=self.image.id, next_step=found.next_step
        )


def is_delimited(response: requests.Response) -> bool:
    """Return whether the data ends by itself, not by the end of the connection."""
    chunked = response.headers.get("Transfer-Encoding", "").lower() == CHUNKED
    return chunked or "Content-Length" in response.headers


def cut_off(where: str, image_id: str, sends: int, told: int) -> errors.SourceError:
    """Return the error that fewer bytes than were told amount to, where nothing shows that they are all.

    :param where: the address, without what is secret in it.
    :param sends: number of bytes that come.
    :param told: number of bytes that the server told before.
    """
    return errors.SourceError(
        f"the data ended after {sends} bytes and may have been cut off: {where} told {told} before",
        image=image_id,
        next_step=STATE_IT,
    )


def other_length(where: str, image_id: str, sends: str, stated: int) -> errors.SourceError:
    """Return the error that a length which is not the stated one amounts to.

    :param where: the address, without what is secret in it.
    :param sends: what the server sends, followed by "than" and the stated length.
    :param stated: length in bytes.
    """
    return errors.SourceError(
        f"{where} sends {sends} than the {stated} bytes that are stated of the image",
        image=image_id,
        next_step="correct the size or the address where they are stated",
    )


def two_lengths(where: str, image_id: str, sends: int, told: int | None) -> errors.SourceError | None:
    """Return the doubt about data whose length the server told differently before, or None.

    :param where: the address, without what is secret in it.
    :param sends: length of the data in bytes.
    :param told: the length in bytes that the server told before, or None if it told none.
    """
    if told in (None, sends):
        return None
    return errors.SourceError(
        f"the data is not the image's, and may have been cut off: {where} sends {sends} bytes, and told"
        f" {told} before",
        image=image_id,
    )


def read(response: requests.Response, image_id: str) -> Iterator[bytes]:
    """Yield the body as it arrives. urllib3 raises when it ends before its Content-Length.

    :raises SourceError: it broke off, or nothing came for the read timeout.
    """
    while True:
        try:
            chunk = response.raw.read1(CHUNK, decode_content=False)
        except _TRANSPORT_ERRORS as error:
            raise exchange.failure(error, response.url, image_id) from None
        if not chunk:
            return
        yield chunk
