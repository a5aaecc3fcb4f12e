# SPDX-License-Identifier: Apache-2.0
"""What an HTTP answer means to an image source: its status, its headers, its range. Its data are
:mod:`imagecache_lib.sources.body`'s.

RFC 9110: validators and If-Range in section 13, ranges in 14, statuses in 15.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.errors
import email.message
import enum
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import requests

from imagecache_lib import errors, model
from imagecache_lib.sources import exchange, retry_after, unanswered
from imagecache_lib.sources.body import (
    CHUNKED,
    STATE_IT,
    Body,
    cut_off,
    is_delimited,
    other_length,
    two_lengths,
)
from imagecache_lib.sources.interface import (
    CannotResume,
    NotPermitted,
    SourceBusy,
    SourceMisconfigured,
    SourceRefused,
    Unauthorized,
)

#: Key in :attr:`Image.properties` of the strong entity tag of the data.
ETAG = "etag"
#: Key in :attr:`Image.properties` of the length in bytes that a server told before it sent the data.
HINTED_SIZE = "hinted_size"

#: Codings that change bytes (RFC 9110, section 8.4.1, and the registry that it opens). Others, such as the
#: ``aws-chunked`` that object stores keep from an upload, describe how the data once travelled.
_CHANGING_CODINGS = frozenset(
    {
        "aes128gcm",
        "br",
        "bzip2",
        "compress",
        "dcb",
        "dcz",
        "deflate",
        "exi",
        "gzip",
        "lz4",
        "lzma",
        "pack200-gzip",
        "x-bzip2",
        "x-compress",
        "x-gzip",
        "x-lzma",
        "x-xz",
        "xz",
        "zstd",
    }
)
#: Of Transfer-Encoding, those that change nothing.
_NO_TRANSFER_CODINGS = frozenset({"", "identity"})
#: What the parser of headers notes where it passed over a line.
_LINES_PASSED_OVER = (
    email.errors.FirstHeaderLineIsContinuationDefect,
    email.errors.InvalidHeaderDefect,
    email.errors.MisplacedEnvelopeHeaderDefect,
)
#: What one codec is called in Content-Encoding, by its name in :attr:`Image.compression`.
_CODINGS_OF = {
    "gzip": {"gzip", "x-gzip"},
    "bzip2": {"bzip2", "x-bzip2"},
    "xz": {"xz", "x-xz"},
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
#: Statuses of an answer with all of the data. 203 is 200 of which a proxy changed something: RFC 9110,
#: section 15.3.4.
WHOLE = frozenset({200, 203})
#: Server errors that are the same if one asks again: what was asked for, the version of HTTP, and a network
#: that wants its users to sign in (RFC 6585, section 6).
_FOR_GOOD = frozenset({501, 505, 511})

_DIGITS = re.compile(r"\d{1,18}", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
#: An empty one is allowed, and says of no content that it is another.
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]+"')


class SizeIs(enum.Enum):
    """What the size in an image's description is worth beside what the answer with the data tells."""

    #: The service that has the data knows it of the image.
    DESCRIBED = enum.auto()
    #: An operator states it: a server that sends another number of bytes sends something else.
    STATED = enum.auto()
    #: The server told it before it sent the data, or it is not known: the answer with the data decides.
    HINTED = enum.auto()


def hinted_size(image: model.Image) -> int | None:
    """Return the length in bytes that a server told before it sent the data, or None if it told none.

    Other services may have a property of this name: what is no length tells none.
    """
    told = image.properties.get(HINTED_SIZE)
    return int(told) if isinstance(told, str) and _DIGITS.fullmatch(told) else None


def sure_size(image: model.Image) -> int | None:
    """Return the length in bytes of an image as described, or None if it is not known or only a hint."""
    return image.size if hinted_size(image) is None else None


def refusal(response: requests.Response, image_id: str, *, of_data: bool = True) -> errors.ImageCacheError:
    """Return the error that an answer without what was asked for amounts to.

    :param of_data: whether the image's data was asked for, or what the service knows of it otherwise.
    """
    status = response.status_code
    where = f"{exchange.shown(response.url)} answers HTTP {status}"
    if status in (404, 410):
        return errors.ImageNotFound(
            f"no such image: {where}", image=image_id, next_step="check the id, and who may see it"
        )
    if status == 407:
        return Unauthorized(
            f"a proxy asks for credentials: {where}", image=image_id, next_step=unanswered.PROXY
        )
    if status == 401:
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
    if status == 204 and of_data:
        return errors.ImageRejected(
            f"the image has no data: {where}", image=image_id, next_step="upload its data"
        )
    if status in (408, 425, 429) or (status >= 500 and status not in _FOR_GOOD):
        seconds, then = retry_after.read(response.headers)
        return SourceBusy(
            where, image=image_id, next_step="try again later", retry_after=seconds, retry_at=then
        )
    if status == 206:
        return SourceMisconfigured(
            f"a part of the data where all of it was asked for: {where}",
            image=image_id,
            next_step="correct the server or what lies before it",
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
    return int(value) if _DIGITS.fullmatch(value) else None


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
    listed = {
        coding.partition(";")[0].strip().lower() for coding in headers.get("Content-Encoding", "").split(",")
    }
    return {coding.partition(";")[0].strip() for coding in listed} & _CHANGING_CODINGS


def _lost_lines(response: requests.Response) -> bool:
    """Return whether the headers were not read as a whole. The rest may have told a length, or a coding.

    http.client has them parsed as those of a mail. At a line without a name the parser takes all that follows
    for the mail's text.
    """
    answer = getattr(response.raw, "_original_response", None)
    parsed = getattr(answer, "msg", None)
    if not isinstance(parsed, email.message.Message):
        return False
    text = parsed.get_payload()
    passed_over = any(isinstance(defect, _LINES_PASSED_OVER) for defect in parsed.defects)
    return passed_over or (isinstance(text, str) and bool(text))


@contextlib.contextmanager
def data(
    web: exchange.Web,
    url: str,
    headers: Mapping[str, str],
    image: model.Image,
    offset: int,
    *,
    size_is: SizeIs = SizeIs.DESCRIBED,
    confirmed: bool = False,
) -> Iterator[Body]:
    """Get an image's data from an offset: what :meth:`ImageSource.open` promises, over HTTP.

    An answer from the first byte brings its own entity tag, which replaces the one of the description:
    servers behind one name may differ in theirs. An answer from another offset must have the tag of the first
    one.

    :param image: its property :data:`ETAG` is the strong entity tag that a resumed transfer insists on, and
        :data:`HINTED_SIZE` what the server told before.
    :param size_is: what ``image.size`` is worth. The length of the answer from the first byte takes the place
        of a hint; if the answer states no length, what arrives decides.
    :param confirmed: an answer with a part of the data told :data:`HINTED_SIZE`, and no digest decides.
    """
    asked = {**headers, "Accept-Encoding": "identity"}
    validator = image.properties.get(ETAG)
    if offset > 0:
        asked["Range"] = f"bytes={offset}-"
        if validator is not None:
            asked["If-Range"] = validator
    with exchange.exchange(web, "GET", url, asked, image_id=image.id) as response:
        if offset > 0:
            until: int | None = _check_resumed(response, image, offset, validator)
        elif response.status_code not in WHOLE:
            raise refusal(response, image.id)
        else:
            until = _undelimited(response, image, size_is)
            _require_told(response, image, until, exact=confirmed)
        doubt: errors.SourceError | None = _contradiction(response, image)
        if doubt is not None and image.digest is None:
            raise doubt
        stated = image.size if size_is is SizeIs.STATED else None
        hinted = False
        if offset == 0:
            doubt = doubt or _two_lengths(response, image, stated)
            if size_is is SizeIs.DESCRIBED:
                doubt = doubt or _not_as_described(response, image)
            length = content_length(response.headers) if size_is is SizeIs.HINTED else image.size
            hinted = length is None and image.size is not None
            image = _corrected(image, response, length)
        told = hinted_size(image)
        yield Body(
            response,
            image,
            doubt,
            offset=offset,
            until=until,
            exact=confirmed and offset == 0,
            stated=stated,
            told=told,
            hinted=hinted,
        )


def _corrected(image: model.Image, response: requests.Response, length: int | None) -> model.Image:
    tag = strong_etag(response.headers)
    properties = {key: value for key, value in image.properties.items() if key != ETAG}
    if tag is not None:
        properties[ETAG] = tag
    return dataclasses.replace(
        image, size=image.size if length is None else length, properties=MappingProxyType(properties)
    )


def _undelimited(response: requests.Response, image: model.Image, size_is: SizeIs) -> int | None:
    """Return how many bytes must come for data of which nothing else tells whether it was cut off, or None.

    Where no digest is known, and the end of the connection is all that ends the data, or it has shown already
    that another length was told before, fewer bytes than that are not taken for the whole image. More are:
    the server told too few.
    """
    told = hinted_size(image)
    in_doubt = size_is is SizeIs.HINTED and image.size != told
    if image.digest is not None or (is_delimited(response) and not in_doubt):
        return None
    return told


def _require_told(response: requests.Response, image: model.Image, told: int | None, *, exact: bool) -> None:
    """Refuse an answer whose length contradicts what was told before, where nothing else decides.

    :param told: number of bytes that must come, or None if nothing tells.
    :param exact: more are none of the image either: an answer with a part of the data told it.
    :raises SourceError: the answer is shorter, or it is longer than it may be.
    """
    length, where = content_length(response.headers), exchange.shown(response.url)
    if length is None or told is None or length == told:
        return
    if exact:
        raise errors.SourceError(
            f"{where} tells {length} bytes with the data, and {told} bytes with a part of it",
            image=image.id,
            next_step=STATE_IT,
        )
    if length < told:
        raise cut_off(where, image.id, length, told)


def _two_lengths(
    response: requests.Response, image: model.Image, stated: int | None
) -> errors.SourceError | None:
    """Return the doubt about an answer whose length the server told differently before, or None.

    :param stated: number of bytes that the image has as an operator states it, or None.
    :raises SourceError: the answer is longer or shorter than that.
    """
    length = content_length(response.headers)
    if length is None:
        return None
    where = exchange.shown(response.url)
    if stated is not None and length != stated:
        sends = f"{length} bytes, which is {'more' if length > stated else 'less'}"
        raise other_length(where, image.id, sends, stated)
    return two_lengths(where, image.id, length, hinted_size(image))


def _not_as_described(response: requests.Response, image: model.Image) -> errors.SourceError | None:
    """Return the doubt about an answer of another length than the image has by its service, or None."""
    length = content_length(response.headers)
    if None in (length, image.size) or length == image.size:
        return None
    return errors.SourceError(
        f"{exchange.shown(response.url)} sends {length} bytes, and the image has {image.size}",
        image=image.id,
        next_step="find out what answers there instead of the image service",
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
    if response.status_code == 203:
        return SourceRefused(
            f"{where} answers HTTP 203: a proxy changed what it sends",
            image=image.id,
            next_step="go round the proxy, or state the image's digest",
        )
    if _lost_lines(response):
        return SourceRefused(
            f"{where}: {unanswered.NO_HEADERS}, so that what they say of the data is not known",
            image=image.id,
            next_step="correct the server or its proxy, or state the image's digest",
        )
    transfer = response.headers.get("Transfer-Encoding", "").lower()
    if transfer != CHUNKED and transfer.strip(" \t") not in _NO_TRANSFER_CODINGS:
        # http.client undoes no other, nor several.
        return SourceRefused(
            f"{where} sends the data in the transfer coding {transfer[:60]!r}, which was not asked for",
            image=image.id,
            next_step="correct the server or its proxy",
        )
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
    if _DOCUMENT.fullmatch(kind):
        # Where a digest is stated, this is told only if the data is not what it is of.
        unless = "; if the document is the image, state its digest" if image.digest is None else ""
        return SourceRefused(
            f"{where} sends a document of the type {kind[:60]} and no disk",
            image=image.id,
            next_step=f"correct the address or the server{unless}",
        )
    return None


def _check_resumed(
    response: requests.Response, image: model.Image, offset: int, validator: str | None
) -> int:
    """Make sure that an answer goes on at an offset. Returns how many bytes of the image are here at its end.

    :raises CannotResume: it does not, or does not show that its content is the same.
    """
    status = response.status_code
    if status in WHOLE:
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
    if part[2] is None and image.size is None and image.digest is None:
        raise CannotResume("the server does not say how many bytes there are", image=image.id)
    return part[1] + 1 if part[2] is None else part[2]
