# SPDX-License-Identifier: Apache-2.0
"""Every way in which HEAD, GET, a table and a digest can tell the length of an image, and whose fault it is.

HEAD is a hint. The length of the answer that brings the data decides, and where it tells none, what arrives.
Where HEAD told another one and no digest decides, an answer with a part of the data must tell the same.
What an operator states in a table contradicts the server, and not the image; whole data with another digest
than the stated one are not the image.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import itertools
import random
from collections.abc import Iterator

import pytest

from imagecache_lib import errors, model
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.sources.interface import SourceRefused
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import Answer, BadServer, Fault, Seen
from tests.unit import test_http_servers

DATA = random.Random(12).randbytes(150_000)
GOOD = len(DATA)
SHORT, LONG = GOOD - 512, GOOD + 512
DIGEST = model.Digest("sha256", hashlib.sha256(DATA).hexdigest())
WRONG = model.Digest("sha256", "0" * 64)
MOST = 2**22

fetch = functools.partial(test_http_servers.fetch, max_size=MOST)


class Outcome(enum.Enum):
    SERVED = "the data are served"
    SERVED_AS_TOLD = "what the answer with the data tells is served"
    SOURCE = "the source is at fault"
    IMAGE = "the image is at fault"


def outcome(source: HttpSource) -> Outcome:
    try:
        data = fetch(source)
    except errors.SourceError:
        return Outcome.SOURCE
    except errors.ImageRejected:
        return Outcome.IMAGE
    if data == DATA:
        return Outcome.SERVED
    assert data == DATA[:SHORT]
    return Outcome.SERVED_AS_TOLD


HEADS = ("right", "short", "long", "missing", "refused")
GETS = ("right", "short", "long", "chunked", "missing")
SIZES = ("right", "short", "long", "unknown")
LENGTHS = {"right": GOOD, "short": SHORT, "long": LONG}


def expected(head: str, get: str, digest: str, size: str) -> Outcome:
    """Return what has to come of one combination. The server has all data; ``get`` is the length it tells."""
    told = LENGTHS.get(get)
    if size != "unknown" and LENGTHS[size] != (told or GOOD):
        return Outcome.SOURCE  # what is stated contradicts the server
    if get == "long":
        return Outcome.SOURCE  # it breaks off, time and again
    # A HEAD that is refused is made up for by the first byte, with which this server tells the right length.
    hinted = None if size != "unknown" else GOOD if head == "refused" else LENGTHS.get(head)
    if get == "short" and digest == "unknown":
        # Where another length was told before, the first byte is asked for: with it the right one comes.
        differs = hinted not in (None, SHORT)
        return Outcome.SOURCE if differs else Outcome.SERVED_AS_TOLD
    if get == "short" or digest == "wrong":
        # Data that may have been cut off show nothing of the image: the server told two lengths, or none.
        sent = GOOD if get == "chunked" else told
        differs = None not in (hinted, sent) and hinted != sent
        untold = get == "missing" and size == "unknown"
        return Outcome.SOURCE if differs or untold else Outcome.IMAGE
    if get == "missing" and digest == "unknown" and hinted == LONG:
        return Outcome.SOURCE  # nothing shows that it was not cut off
    return Outcome.SERVED


COMBINATIONS = list(itertools.product(HEADS, GETS, ("right", "wrong", "unknown"), SIZES))


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with BadServer() as server:
        yield server


@pytest.mark.parametrize(("head", "get", "digest", "size"), COMBINATIONS)
def test_whose_fault_a_length_is(server: BadServer, head: str, get: str, digest: str, size: str) -> None:
    path = f"/{head}-{get}-{digest}-{size}"
    url = server.put(path, DATA)
    server.always_fail(path, _head(head), method="HEAD")
    server.always_fail(path, _get(get), method="GET")
    stated = {"right": DIGEST, "wrong": WRONG, "unknown": None}[digest]
    entry = HttpImage(url, "raw", stated, size=LENGTHS.get(size))
    assert outcome(HttpSource({"x": entry}, timeout=(60.0, 60.0))) is expected(head, get, digest, size)


def _head(told: str) -> Fault:
    if told == "refused":
        return faults.status(405)
    return faults.length_told(LENGTHS.get(told))


def _get(told: str) -> Fault:
    """The whole data with this length. The answer to the single byte of a description is right."""
    fault = {"chunked": faults.chunked(), "right": faults.fine()}.get(told)
    fault = fault or faults.length_told(LENGTHS.get(told))
    return lambda seen, answer: answer if seen.headers.get("Range") == "bytes=0-0" else fault(seen, answer)


REST = "/rest"


def _served_without_a_length(server: BadServer) -> HttpSource:
    """Return a source of data whose length nothing tells, which breaks off once and may be resumed."""
    url = server.put(REST, DATA, etag='"one"')
    server.forget(REST)
    server.always_fail(REST, faults.length_told(None), method="HEAD")
    server.fail(REST, faults.both(faults.chunked(), faults.truncated(SHORT // 2)))
    return HttpSource({"x": HttpImage(url, "raw")}, timeout=(60.0, 60.0))


def test_a_rest_that_ends_before_its_range_is_not_the_whole(server: BadServer) -> None:
    source = _served_without_a_length(server)
    server.fail(REST, faults.cut_without_length(1000))
    assert fetch(source, retries=3) == DATA


def test_a_range_that_ends_before_the_whole_is_not_the_whole(server: BadServer) -> None:
    source = _served_without_a_length(server)

    def shorter(seen: Seen, answer: Answer) -> Answer:
        first = SHORT // 2
        told = f"bytes {first}-{first + 999}/{GOOD}"
        return dataclasses.replace(
            answer, headers={**answer.headers, "Content-Range": told}, body=answer.body[:1000]
        )

    server.fail(REST, shorter)
    assert fetch(source, retries=3) == DATA
    assert server.requests("GET", REST)[-1].headers["Range"] == f"bytes={SHORT // 2 + 1000}-"


def test_a_range_of_a_whole_of_which_no_length_is_told_is_not_spliced_in(server: BadServer) -> None:
    source = _served_without_a_length(server)
    server.fail(REST, faults.range_told(f"bytes {SHORT // 2}-{GOOD - 1}/*"))
    assert fetch(source, retries=3) == DATA
    assert "Range" not in server.requests("GET", REST)[-1].headers


def test_mirrors_of_which_only_some_tell_the_length(server: BadServer) -> None:
    url = server.put("/mirror", DATA)
    server.fail("/mirror", faults.length_told(SHORT), method="HEAD")
    server.fail("/mirror", faults.chunked(), faults.fine(), faults.chunked())
    assert fetch(HttpSource({"x": HttpImage(url, "raw")}), retries=0) == DATA


NO_RANGES = faults.range_ignored(DATA)


def _cut(server: BadServer, head: int, *, chunked: bool, ranges: Fault, digest: bool = False) -> HttpSource:
    """Return a source of data that a server cuts off each time, and ends as if that were all of it."""

    def cut(seen: Seen, answer: Answer) -> Answer:
        if seen.headers.get("Range") == "bytes=0-0":
            answer = ranges(seen, answer)
            if answer.status == 206:
                return answer
        return dataclasses.replace(answer, body=DATA[:SHORT], chunked=chunked)

    path = f"/cut-{head}-{chunked}-{ranges is NO_RANGES}"
    url = server.put(path, DATA)
    server.forget(path)
    server.always_fail(path, faults.length_told(head), method="HEAD")
    server.always_fail(path, cut, method="GET")
    return HttpSource({"x": HttpImage(url, "raw", DIGEST if digest else None)}, timeout=(60.0, 60.0))


@pytest.mark.parametrize("digest", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "ranges", [faults.fine(), NO_RANGES, faults.range_refused(), faults.range_refused(501)]
)
def test_data_that_are_shorter_than_head_told_are_not_taken_for_the_whole(
    server: BadServer, ranges: Fault, chunked: bool, digest: bool
) -> None:
    source = _cut(server, GOOD, chunked=chunked, ranges=ranges, digest=digest)
    with pytest.raises(errors.SourceError, match=f"{SHORT} bytes") as told:
        fetch(source, retries=1)
    assert not isinstance(told.value, SourceRefused)
    assert str(GOOD) in str(told.value)


def test_where_head_told_fewer_bytes_an_answer_with_a_part_has_a_say(server: BadServer) -> None:
    for chunked in (False, True):
        source = _cut(server, 1000, chunked=chunked, ranges=faults.fine())
        with pytest.raises(errors.SourceError, match=f"{SHORT} bytes.*{GOOD}"):
            fetch(source, retries=1)
        source = _cut(server, 1000, chunked=chunked, ranges=NO_RANGES)
        assert fetch(source, retries=0) == DATA[:SHORT]  # nothing shows that more belongs to it


def test_more_data_than_a_part_and_head_tell_are_not_taken(server: BadServer) -> None:
    for chunked in (False, True):
        fault = faults.both(
            faults.range_ignored(DATA + bytes(512)), faults.chunked() if chunked else faults.fine()
        )

        def longer(seen: Seen, answer: Answer, fault: Fault = fault) -> Answer:
            return answer if seen.headers.get("Range") == "bytes=0-0" else fault(seen, answer)

        server.forget("/more")
        url = server.put("/more", DATA)
        server.always_fail("/more", longer, method="GET")
        with pytest.raises(errors.SourceError, match=f"{GOOD + 512} bytes.*{GOOD}"):
            fetch(HttpSource({"x": HttpImage(url, "raw")}), retries=1)


def test_content_that_was_replaced_by_shorter_one_since_head(server: BadServer) -> None:
    for fault in (faults.fine(), faults.chunked()):
        server.forget("/replaced")
        url = server.put("/replaced", DATA, etag='"new"')
        server.always_fail("/replaced", fault, method="GET")
        before = faults.both(faults.length_told(LONG), faults.entity_tag('"old"'))
        server.fail("/replaced", before, method="HEAD")
        assert fetch(HttpSource({"x": HttpImage(url, "raw")}), retries=0) == DATA


@pytest.mark.parametrize("digest", [None, DIGEST])
@pytest.mark.parametrize("ranges", [faults.fine(), NO_RANGES])
@pytest.mark.parametrize("length", [1000, GOOD - 1])
def test_a_length_that_is_wrong_once_does_not_matter(
    server: BadServer, length: int, ranges: Fault, digest: model.Digest | None
) -> None:
    server.forget("/glitch")
    url = server.put("/glitch", DATA)
    server.fail("/glitch", lambda seen, answer: dataclasses.replace(answer, body=DATA[:length]))
    server.always_fail("/glitch", ranges, method="GET")
    assert fetch(HttpSource({"x": HttpImage(url, "raw", digest)}), retries=1) == DATA


def test_what_has_a_length_as_told_is_asked_for_once(server: BadServer) -> None:
    url = server.put("/once", DATA)
    server.always_fail("/once", faults.chunked(), method="GET")
    assert fetch(HttpSource({"x": HttpImage(url, "raw")}), retries=0) == DATA
    assert len(server.requests("GET", "/once")) == 1


def test_data_of_the_told_length_with_another_digest_are_the_images(server: BadServer) -> None:
    url = server.put("/chunks", DATA)
    server.always_fail("/chunks", faults.chunked(), method="GET")
    with pytest.raises(errors.ImageRejected):
        fetch(HttpSource({"x": HttpImage(url, "raw", WRONG)}), retries=3)
    assert len(server.requests("GET", "/chunks")) == 1


def test_one_length_that_is_stated_and_contradicted_is_told_before_the_data(server: BadServer) -> None:
    url = server.put("/table", DATA)
    with pytest.raises(
        errors.SourceError, match=f"{GOOD} bytes, which is less than the {LONG} bytes"
    ) as told:
        fetch(HttpSource({"x": HttpImage(url, "raw", DIGEST, size=LONG)}), retries=0)
    assert not isinstance(told.value, SourceRefused)
