# SPDX-License-Identifier: Apache-2.0
"""What an HTTP answer means to an image source: its status, its headers, its range, its data.

RFC 9110: validators and If-Range in section 13, ranges in 14, statuses in 15.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import requests
import urllib3.exceptions

from imagecache_lib import errors, model
from imagecache_lib.formats import foreign
from imagecache_lib.sources import exchange, retry_after
from imagecache_lib.sources.interface import (
    CannotResume,
    NotPermitted,
    SourceBusy,
    SourceMisconfigured,
    SourceRefused,
    Unauthorized,
)

#: Most bytes that one read takes. read1 returns what has arrived, so that a slow server does not keep a
#: request's deadline from being looked at.
CHUNK = 2**20
#: Key in :attr:`Image.properties` of the strong entity tag of the data.
ETAG = "etag"

#: Codings that change bytes (RFC 9110, section 8.4.1, and the registry that it opens). Others, such as the
#: ``aws-chunked`` that object stores keep from an upload, describe how the data once travelled.
_CHANGING_CODINGS = frozenset(
    {
        "br",
        "bzip2",
        "compress",
        "dcb",
        "dcz",
        "deflate",
        "gzip",
        "x-bzip2",
        "x-compress",
        "x-gzip",
        "xz",
        "zstd",
    }
)
#: Of Transfer-Encoding.
_TRANSFER_CODINGS = frozenset({"", "identity", "chunked"})
#: What one codec is called in Content-Encoding, by its name in :attr:`Image.compression`.
_CODINGS_OF = {
    "gzip": {"gzip", "x-gzip"},
    "bzip2": {"bzip2", "x-bzip2"},
    "xz": {"xz"},
    "zstd": {"zstd"},
}
#: Media types of documents: an error page, a sign-in form, a listing. text/plain is none of them, since some
#: servers say it of every file whose name they do not know.
_DOCUMENT = re.compile(
    r"text/(?!plain$).*|application/(json|xml|javascript|xhtml\+xml)|.*\+(json|xml)", re.IGNORECASE
)
#: Statuses that refuse a range where the whole may still be had. Glance answers 400 where its store cannot
#: read from an offset.
RANGE_REFUSED = frozenset({204, 400, 412, 416, 501})

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')
_TRANSPORT_ERRORS = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
)


def refusal(response: requests.Response, image_id: str) -> errors.ImageCacheError:
    """Return the error that an answer without what was asked for amounts to."""
    status = response.status_code
    where = f"{exchange.shown(response.url)} answers HTTP {status}"
    if status in (404, 410):
        return errors.ImageNotFound(
            f"no such image: {where}", image=image_id, next_step="check the id, and who may see it"
        )
    if status in (401, 407):
        return Unauthorized(
            f"the token or credentials are missing, expired or wrong: {where}",
            image=image_id,
            next_step="give the source a valid token",
        )
    if status in (403, 451):
        return NotPermitted(
            f"no permission to get the image: {where}",
            image=image_id,
            next_step="have its owner share it, or use credentials that may read it",
        )
    if status == 204:
        return errors.ImageRejected(
            f"the image has no data: {where}", image=image_id, next_step="upload its data"
        )
    if status in (408, 425, 429) or status >= 500:
        seconds, then = retry_after.read(response.headers)
        return SourceBusy(
            where, image=image_id, next_step="try again later", retry_after=seconds, retry_at=then
        )
    return SourceMisconfigured(
        f"an unexpected answer: {where}", image=image_id, next_step="check the source's URL"
    )


def strong_etag(headers: Mapping[str, str]) -> str | None:
    """Return the entity tag, or None if it is not strong. Two answers that share one have equal bytes."""
    value = headers.get("ETag", "").strip()
    return value if _STRONG_ETAG.fullmatch(value) else None


def content_length(headers: Mapping[str, str]) -> int | None:
    """Return Content-Length in bytes, or None if it is missing or is the length of encoded data.

    With a Transfer-Encoding it counts for nothing: RFC 9112, section 6.3.
    """
    told = {value.strip() for value in headers.get("Content-Length", "").split(",")}  # perhaps said twice
    if _changing_codings(headers) or "Transfer-Encoding" in headers or len(told) != 1:
        return None
    (value,) = told
    return int(value) if re.fullmatch(r"\d{1,18}", value, re.ASCII) else None


def parse_content_range(value: str) -> tuple[int, int, int | None] | None:
    """Return the first byte, last byte and whole length of a Content-Range, or None if it makes no sense.

    The whole length is None if the server does not tell it.
    """
    match = _CONTENT_RANGE.fullmatch(value.strip())
    if match is None:
        return None
    first, last = int(match[1]), int(match[2])
    whole = None if match[3] == "*" else int(match[3])
    if first > last or (whole is not None and last >= whole):
        return None
    return first, last, whole


def _changing_codings(headers: Mapping[str, str]) -> set[str]:
    listed = {coding.strip().lower() for coding in headers.get("Content-Encoding", "").split(",")}
    return listed & _CHANGING_CODINGS


class Body:
    """The data of an answer, in chunks as they arrive: the iterator that :meth:`ImageSource.open` promises.

    :ivar image: the description, as this answer corrects it.
    :ivar doubt: what is wrong with the answer, if the data turns out not to be the image's.
    :param at_start: whether the data begins with the image's first byte, so that it can be a document.
    """

    def __init__(
        self,
        response: requests.Response,
        image: model.Image,
        doubt: SourceRefused | None = None,
        *,
        at_start: bool = False,
    ) -> None:
        self.image = image
        self.doubt: errors.SourceError | None = doubt
        self._looked = not at_start
        self._where = exchange.shown(response.url)
        self._delimited = _is_delimited(response)
        self._chunks = body(response, image.id)

    def __iter__(self) -> Body:
        return self

    def __next__(self) -> bytes:
        try:
            chunk = next(self._chunks)
        except StopIteration:
            if self.image.size is None and not self._delimited and self.doubt is None:
                self.doubt = errors.SourceError(
                    "the data is not the image's, and may have been cut off: its length is not told",
                    image=self.image.id,
                )
            raise
        if not self._looked:
            self._looked = True
            self.doubt = self.doubt or self._document(chunk)
        return chunk

    def _document(self, start: bytes) -> SourceRefused | None:
        """Return the doubt about data that begins as a document does, or None."""
        found = foreign.document(start[: foreign.LOOKED_AT])
        if found is None:
            return None
        return SourceRefused(
            f"{self._where} sends {found.what} and no disk", image=self.image.id, next_step=found.next_step
        )


def _is_delimited(response: requests.Response) -> bool:
    """Return whether the data ends by itself, not by the end of the connection (RFC 9112, section 6.3)."""
    chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
    return chunked or "Content-Length" in response.headers


@contextlib.contextmanager
def data(
    web: exchange.Web,
    url: str,
    headers: Mapping[str, str],
    image: model.Image,
    offset: int,
    *,
    size_is_known: bool = True,
) -> Iterator[Body]:
    """Get an image's data from an offset: what :meth:`ImageSource.open` promises, over HTTP.

    An answer from the first byte brings its own entity tag, which replaces the one of the description:
    servers behind one name may differ in theirs. An answer from another offset must have the tag of the first
    one.

    :param image: its property :data:`ETAG` is the strong entity tag that a resumed transfer insists on.
    :param size_is_known: ``image.size`` does not come from a HEAD answer, so that the answer's length does
        not replace it.
    """
    asked = {**headers, "Accept-Encoding": "identity"}
    validator = image.properties.get(ETAG)
    if offset > 0:
        asked["Range"] = f"bytes={offset}-"
        if validator is not None:
            asked["If-Range"] = validator
    with exchange.exchange(web, "GET", url, asked, image_id=image.id) as response:
        if offset > 0:
            _check_resumed(response, image, offset, validator)
        elif response.status_code != 200:
            raise refusal(response, image.id)
        doubt = _contradiction(response, image)
        if doubt is not None and image.digest is None:
            raise doubt
        described = image if offset > 0 else _corrected(image, response, size_is_known)
        yield Body(response, described, doubt, at_start=offset == 0)


def _corrected(image: model.Image, response: requests.Response, size_is_known: bool) -> model.Image:
    tag = strong_etag(response.headers)
    properties = {key: value for key, value in image.properties.items() if key != ETAG}
    if tag is not None:
        properties[ETAG] = tag
    length = content_length(response.headers)
    return dataclasses.replace(
        image,
        size=image.size if size_is_known or length is None else length,
        properties=MappingProxyType(properties),
    )


def _contradiction(response: requests.Response, image: model.Image) -> SourceRefused | None:
    """Return what the answer's headers say against its data. Where there is a digest, the bytes decide."""
    where = exchange.shown(response.url)
    codings = _changing_codings(response.headers) - _CODINGS_OF.get(image.compression or "", set())
    if codings:
        return SourceRefused(
            f"{where} sends the data as {sorted(codings)[0]!r} although it must not be encoded",
            image=image.id,
            next_step="turn compression off on the server or its proxy",
        )
    transfer = response.headers.get("Transfer-Encoding", "").strip().lower()
    if transfer not in _TRANSFER_CODINGS:
        # http.client undoes no other, nor several.
        return SourceRefused(
            f"{where} sends the data in the transfer coding {transfer[:60]!r}, which was not asked for",
            image=image.id,
            next_step="correct the server or its proxy",
        )
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
    if _DOCUMENT.fullmatch(kind):
        return SourceRefused(
            f"{where} sends a document of the type {kind[:60]} and no disk",
            image=image.id,
            next_step="correct the address or the server; if the document is the image, state its digest",
        )
    return None


def _check_resumed(
    response: requests.Response, image: model.Image, offset: int, validator: str | None
) -> None:
    status = response.status_code
    if status == 200:
        raise CannotResume("the server ignores the range asked for, or the content changed", image=image.id)
    if status in RANGE_REFUSED:
        raise CannotResume(f"the server refuses to go on from an offset (HTTP {status})", image=image.id)
    if status != 206:
        raise refusal(response, image.id)
    tag = strong_etag(response.headers)
    if None not in (tag, validator) and tag != validator:
        raise CannotResume("the content changed: its entity tag is another", image=image.id)
    if image.digest is None and tag is None:
        # RFC 9110, section 15.3.7: the tag that If-Range named must be here. Nothing else tells a change.
        raise CannotResume("the server does not say that the content is the same", image=image.id)
    # No Content-Range is also what a multipart/byteranges answer has.
    part = parse_content_range(response.headers.get("Content-Range", ""))
    if part is None or part[0] != offset:
        raise CannotResume("the server sends another range than was asked for", image=image.id)
    length = content_length(response.headers)
    if length not in (None, part[1] - part[0] + 1):
        raise CannotResume("the server sends another number of bytes than it says", image=image.id)
    if part[2] is not None and image.size is not None and part[2] != image.size:
        raise CannotResume(f"the content changed: it has {part[2]} bytes, not {image.size}", image=image.id)


def body(response: requests.Response, image_id: str) -> Iterator[bytes]:
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
