# SPDX-License-Identifier: Apache-2.0
"""What web servers do wrong, for :class:`~imagecache_lib.testing.bad_server.BadServer`.

Each function returns a :data:`~imagecache_lib.testing.bad_server.Fault`. They combine:
``both(encoded("gzip"), truncated(100))``.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
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


def slow_head(pause: float) -> Fault:
    """Status line and headers come byte by byte with ``pause`` seconds between them."""
    return lambda _seen, answer: dataclasses.replace(answer, head_pause=pause)


def headers_without_end(pause: float = 0.0) -> Fault:
    """Header follows header for ever, byte by byte with ``pause`` seconds between, or without a pause."""
    endless = (("X-More", str(number)) for number in itertools.count())
    return lambda _seen, answer: dataclasses.replace(answer, more_headers=endless, head_pause=pause)


def many_headers(count: int = 1000, length: int = 100) -> Fault:
    """There are ``count`` headers more, with ``length`` characters each."""
    headers = [(f"X-{number}", "x" * length) for number in range(count)]
    return lambda _seen, answer: dataclasses.replace(answer, more_headers=headers)


def interim(*statuses: int) -> Fault:
    """Interim answers come first, such as 100 (Continue) and 103 (Early Hints)."""
    return lambda _seen, answer: dataclasses.replace(answer, interim=statuses)


def interim_without_end(code: int = 100) -> Fault:
    """Interim answers come, and never the final one."""
    return lambda _seen, answer: dataclasses.replace(answer, interim=itertools.repeat(code))


def chunk_size_told(size: str) -> Fault:
    """The body is chunked, and this is said of the size of each chunk."""
    return lambda _seen, answer: dataclasses.replace(answer, chunked=True, chunk_size=size)


def trailers(*names: str) -> Fault:
    """The body is chunked, and headers with these names follow its last chunk."""
    headers = [(name, "x") for name in names]
    return lambda _seen, answer: dataclasses.replace(answer, chunked=True, trailers=headers)


def trailers_without_end(pause: float = 0.0) -> Fault:
    """The body is chunked, and headers follow its last chunk for ever.

    :param pause: seconds between the bytes of them.
    """

    def spoil(_seen: Seen, answer: Answer) -> Answer:
        endless = (("X-More", str(number)) for number in itertools.count())
        whole = max(1, len(answer.body))  # no pause within the body
        return dataclasses.replace(answer, chunked=True, trailers=endless, pause=pause, piece=whole)

    return spoil


def http_1_0(*, with_length: bool = True) -> Fault:
    """An answer of HTTP/1.0, with or without the length of its body, and the end of the connection."""

    def spoil(_seen: Seen, answer: Answer) -> Answer:
        length = None if with_length else -1
        return dataclasses.replace(answer, version="HTTP/1.0", length=length, chunked=False)

    return spoil


def multipart_range() -> Fault:
    """An answer to a range comes as multipart/byteranges, as only one to several ranges may."""

    def spoil(_seen: Seen, answer: Answer) -> Answer:
        if answer.status != 206:
            return answer
        part = f"Content-Range: {answer.headers.get('Content-Range', '')}\r\n\r\n".encode("latin-1")
        body = b"--part\r\n" + part + answer.body + b"\r\n--part--\r\n"
        changed = _with(
            answer, {"Content-Range": None, "Content-Type": "multipart/byteranges; boundary=part"}
        )
        return dataclasses.replace(changed, body=body)

    return spoil


def partial_unasked() -> Fault:
    """The first half of the data with 206, although no range was asked for."""

    def spoil(seen: Seen, answer: Answer) -> Answer:
        if "Range" in seen.headers or not answer.body:
            return answer
        half = len(answer.body) // 2
        told = f"bytes 0-{half - 1}/{len(answer.body)}"
        changed = _with(answer, {"Content-Range": told})
        return dataclasses.replace(changed, status=206, body=answer.body[:half])

    return spoil


def redirected_on(code: int = 302) -> Fault:
    """A redirect to the same path with another query each time."""

    def spoil(seen: Seen, _answer: Answer) -> Answer:
        path, _, number = seen.path.partition("?")
        return Answer(status=code, headers={"Location": f"{path}?{int(number or 0) + 1}"})

    return spoil


def _with(answer: Answer, changed: Mapping[str, str | None]) -> Answer:
    kept = {name: value for name, value in answer.headers.items() if name not in changed}
    added = {name: value for name, value in changed.items() if value is not None}
    return dataclasses.replace(answer, headers={**kept, **added})
