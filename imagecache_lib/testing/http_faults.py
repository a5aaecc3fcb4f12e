# SPDX-License-Identifier: Apache-2.0
"""What web servers do wrong, for :class:`~imagecache_lib.testing.bad_server.BadServer`.

Each function returns a :data:`~imagecache_lib.testing.bad_server.Fault`. They combine:
``both(encoded("gzip"), truncated(100))``.
"""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Mapping

from imagecache_lib.testing import bad_server
from imagecache_lib.testing.bad_server import Answer, Fault, Seen


def fine() -> Fault:
    """The right answer, to let one request pass between two faults."""
    return lambda _seen, answer: answer


def both(*faults: Fault) -> Fault:
    """Several faults in one answer, in order."""

    def spoil(seen: Seen, answer: Answer) -> Answer:
        for fault in faults:
            answer = fault(seen, answer)
        return answer

    return spoil


def truncated(at: int, *, after: str = bad_server.CLOSE) -> Fault:
    """The data ends after ``at`` bytes of the body although Content-Length tells more.

    :param after: ``close``, ``reset`` or ``stall``.
    """

    def spoil(_seen: Seen, answer: Answer) -> Answer:
        length = len(answer.body) if answer.length is None else answer.length
        return dataclasses.replace(answer, body=answer.body[:at], length=length, after=after)

    return spoil


def stalled(at: int) -> Fault:
    """Nothing more comes after ``at`` bytes, and the connection stays open."""
    return truncated(at, after=bad_server.STALL)


def reset(at: int) -> Fault:
    """The connection is reset after ``at`` bytes."""
    return truncated(at, after=bad_server.RESET)


def dropped() -> Fault:
    """The connection is reset when the request has come."""
    return lambda _seen, _answer: Answer(after=bad_server.DROP)


def silent() -> Fault:
    """No answer ever comes after the headers."""
    return lambda _seen, answer: dataclasses.replace(
        answer, body=b"", length=len(answer.body), after=bad_server.STALL
    )


def slow(pause: float) -> Fault:
    """The body comes in pieces of 64 KiB with ``pause`` seconds between them."""
    return lambda _seen, answer: dataclasses.replace(answer, pause=pause)


def trickling(pause: float) -> Fault:
    """The body comes byte by byte with ``pause`` seconds between them."""
    return lambda _seen, answer: dataclasses.replace(answer, pause=pause, piece=1)


def length_told(length: int | None) -> Fault:
    """Content-Length is ``length``, which is wrong, and the body is whole.

    :param length: in bytes, or None to leave the header out: only the connection's end tells the length then.
    """
    return lambda _seen, answer: dataclasses.replace(
        answer, length=-1 if length is None else length, after=bad_server.CLOSE
    )


def cut_without_length(at: int) -> Fault:
    """The data ends after ``at`` bytes, and nothing tells that there should be more, as in HTTP/1.0."""
    return lambda _seen, answer: dataclasses.replace(
        answer, body=answer.body[:at], length=-1, after=bad_server.CLOSE
    )


def chunked() -> Fault:
    """The body comes with Transfer-Encoding: chunked, which tells no length but where the end is."""
    return lambda _seen, answer: dataclasses.replace(answer, chunked=True)


def endless() -> Fault:
    """Zeros follow the body for ever."""
    return lambda _seen, answer: dataclasses.replace(answer, length=-1, after=bad_server.ENDLESS)


def range_ignored(data: bytes) -> Fault:
    """All of the data is sent whatever range was asked for."""
    return lambda seen, _answer: bad_server.data_answer(data, seen, honour_range=False)


def range_refused(status: int = 416) -> Fault:
    """A request with a range is refused with this status; without one the answer is right."""
    return lambda seen, answer: Answer(status=status) if "Range" in seen.headers else answer


def range_told(value: str | None) -> Fault:
    """An answer to a range carries this Content-Range, or, if ``value`` is None, no Content-Range."""

    def spoil(_seen: Seen, answer: Answer) -> Answer:
        if answer.status != 206:
            return answer
        return _with(answer, {"Content-Range": value})

    return spoil


def status(code: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Fault:
    """This status and nothing of the data."""
    return lambda _seen, _answer: Answer(status=code, headers=headers or {}, body=body)


def busy(code: int = 503, *, retry_after: float | str | None = None) -> Fault:
    """429 or 503, with Retry-After as seconds or as a date."""
    return status(code, {} if retry_after is None else {"Retry-After": str(retry_after)})


def unauthorized(header: str, value: str) -> Fault:
    """401 unless the request carries this value in this header, such as a token or Basic credentials."""

    def spoil(seen: Seen, answer: Answer) -> Answer:
        if seen.headers.get(header) == value:
            return answer
        return Answer(status=401, headers={"WWW-Authenticate": 'Basic realm="images"'})

    return spoil


def redirected(url: str, code: int = 302) -> Fault:
    """A redirect to another address, absolute or relative."""
    return status(code, {"Location": url})


def encoded(coding: str) -> Fault:
    """Content-Encoding names this coding. For ``gzip`` the body is compressed, for others it is left."""

    def spoil(_seen: Seen, answer: Answer) -> Answer:
        body = gzip.compress(answer.body) if coding == "gzip" else answer.body
        return dataclasses.replace(_with(answer, {"Content-Encoding": coding}), body=body)

    return spoil


def bomb(size: int = 2**28) -> Fault:
    """A body of ``size`` zeros compressed by gzip, and said to be so. A thousandth of it crosses the wire."""
    packed = gzip.compress(bytes(size), compresslevel=9)
    return lambda _seen, _answer: Answer(headers={"Content-Encoding": "gzip"}, body=packed)


def document(content_type: str = "text/html; charset=utf-8") -> Fault:
    """A page instead of the data, with status 200, as sign-in forms and "moved" notices come."""
    page = b"<!DOCTYPE html><html><head><title>Moved</title></head><body>Gone.</body></html>\n"
    return lambda _seen, _answer: Answer(headers={"Content-Type": content_type}, body=page)


def entity_tag(tag: str | None) -> Fault:
    """Another ETag than the content has, or none: as mirrors behind one name send it."""
    return lambda _seen, answer: _with(answer, {"ETag": tag})


def header(name: str, value: str | None) -> Fault:
    """The answer has a header with this value, or, if ``value`` is None, does not have that header."""
    return lambda _seen, answer: _with(answer, {name: value})


def _with(answer: Answer, changed: Mapping[str, str | None]) -> Answer:
    kept = {name: value for name, value in answer.headers.items() if name not in changed}
    added = {name: value for name, value in changed.items() if value is not None}
    return dataclasses.replace(answer, headers={**kept, **added})
