# SPDX-License-Identifier: Apache-2.0
"""Every way in which HEAD, GET, a table and a digest can tell the length of an image, and whose fault it is.

HEAD is a hint. The length of the answer that brings the data decides, and where it tells none, what arrives.
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
        return Outcome.SERVED_AS_TOLD  # nothing shows that more belongs to it
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
