# SPDX-License-Identifier: Apache-2.0
"""What an HTTP answer means to an image source: its status, its headers, its range, its data.

RFC 9110: validators and If-Range in section 13, ranges in 14, statuses in 15.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import re
from collections.abc import Iterator, Mapping

import requests
import urllib3.exceptions

from imagecache_lib import errors, model
from imagecache_lib.sources import exchange
from imagecache_lib.sources.interface import CannotResume, NotPermitted, SourceBusy, SourceRefused

#: Most bytes that one read takes. read1 returns what has arrived, so that a slow server does not keep a
#: request's deadline from being looked at.
CHUNK = 2**20

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
        return SourceRefused(
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
        return SourceBusy(
            where, image=image_id, next_step="try again later", retry_after=_retry_after(response.headers)
        )
    return SourceRefused(f"an unexpected answer: {where}", image=image_id, next_step="check the source's URL")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return Retry-After in seconds. A date is taken relative to the server's own clock (Date)."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", value, re.ASCII):
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
        now = email.utils.parsedate_to_datetime(headers.get("Date", ""))
        return max(0.0, (then - now).total_seconds())
    except (ValueError, TypeError):
        return None


def strong_etag(headers: Mapping[str, str]) -> str | None:
    """Return the entity tag if it is a strong one: two answers that share it are equal byte for byte."""
    value = headers.get("ETag", "").strip()
    return value if _STRONG_ETAG.fullmatch(value) else None


def content_length(headers: Mapping[str, str]) -> int | None:
    """Return Content-Length. None: it is not told, or is the length of something encoded."""
    value = headers.get("Content-Length", "").strip()
    if _encoding(headers) is not None or not re.fullmatch(r"\d{1,19}", value, re.ASCII):
        return None
    return int(value)


def parse_content_range(value: str) -> tuple[int, int, int | None] | None:
    """Return first byte, last byte and whole length (None: untold) of a Content-Range, if it makes sense."""
    match = _CONTENT_RANGE.fullmatch(value.strip())
    if match is None:
        return None
    first, last = int(match[1]), int(match[2])
    whole = None if match[3] == "*" else int(match[3])
    if first > last or (whole is not None and last >= whole):
        return None
    return first, last, whole


def _encoding(headers: Mapping[str, str]) -> str | None:
    value = headers.get("Content-Encoding", "").strip().lower()
    return None if value in ("", "identity") else value


@contextlib.contextmanager
def data(
    web: exchange.Web,
    url: str,
    headers: Mapping[str, str],
    image: model.Image,
    offset: int,
    *,
    validator: str | None = None,
) -> Iterator[Iterator[bytes]]:
    """Get an image's data from an offset: what :meth:`ImageSource.open` promises, over HTTP.

    :param validator: the strong entity tag under which the image was described.
    """
    asked = {**headers, "Accept-Encoding": "identity"}
    if offset > 0:
        asked["Range"] = f"bytes={offset}-"
        if validator is not None:
            asked["If-Range"] = validator
    with exchange.exchange(web, "GET", url, asked, image_id=image.id) as response:
        if offset > 0:
            _check_resumed(response, image, offset, validator)
        else:
            _check_started(response, image, validator)
        encoding = _encoding(response.headers)
        if encoding is not None:
            raise SourceRefused(
                f"{exchange.shown(url)} sends the data as {encoding[:40]!r} although it must not be encoded",
                image=image.id,
                next_step="turn compression off on the server or its proxy",
            )
        yield body(response, image.id)


def _check_started(response: requests.Response, image: model.Image, validator: str | None) -> None:
    if response.status_code != 200:
        raise refusal(response, image.id)
    tag = strong_etag(response.headers)
    if image.digest is None and None not in (tag, validator) and tag != validator:
        # With a digest the content speaks for itself: mirrors behind one name may differ in their tags.
        raise SourceRefused(
            "the content changed after the image was described", image=image.id, next_step="ask again"
        )


def _check_resumed(
    response: requests.Response, image: model.Image, offset: int, validator: str | None
) -> None:
    status = response.status_code
    if status == 200:
        raise CannotResume("the server ignores the range asked for, or the content changed", image=image.id)
    if status in (412, 416):
        raise CannotResume(f"the content is no longer what it was (HTTP {status})", image=image.id)
    if status != 206:
        raise refusal(response, image.id)
    tag = strong_etag(response.headers)
    if None not in (tag, validator) and tag != validator:
        raise CannotResume("the content changed: its entity tag is another", image=image.id)
    # No Content-Range is also what a multipart/byteranges answer has.
    part = parse_content_range(response.headers.get("Content-Range", ""))
    if part is None or part[0] != offset:
        raise CannotResume("the server sends another range than was asked for", image=image.id)
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
