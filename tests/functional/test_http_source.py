# SPDX-License-Identifier: Apache-2.0
"""HttpSource against a real nginx."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from imagecache_lib import errors
from imagecache_lib.sources import answers, http, transfer
from imagecache_lib.sources.interface import CannotResume
from imagecache_lib.system import host
from tests.lab import nginx as nginx_lab
from tests.lab import relay as relay_lab

DATA = random.Random(3).randbytes(2 * 2**20)
IMPATIENT = host.System(sleep=lambda _seconds: None)


def http_source(url: str, **kwargs: Any) -> http.HttpSource:
    return http.HttpSource({"an-image": http.HttpImage(url, "raw")}, **kwargs)


def fetch(source: http.HttpSource) -> bytes:
    found, image = transfer.describe(source, "an-image", host=IMPATIENT)
    return b"".join(transfer.Transfer(found, image, host=IMPATIENT).chunks())


def test_describe_tells_size_and_entity_tag(nginx: nginx_lab.Nginx) -> None:
    (nginx.root / "described.img").write_bytes(DATA)
    image = http_source(f"{nginx.url}/described.img").describe("an-image")
    assert (image.size, image.disk_format) == (len(DATA), "raw")
    assert image.properties[answers.ETAG].startswith('"')


def test_a_broken_transfer_goes_on_where_it_broke_by_the_entity_tag(
    nginx: nginx_lab.Nginx, relay_to: Callable[[str], relay_lab.Relay]
) -> None:
    (nginx.root / "broken.img").write_bytes(DATA)
    relay = relay_to(nginx.url)
    # The first connection may be the one that asks for the size, or be kept for the data too.
    relay.cut_after(500_000, 500_000)
    assert fetch(http_source(f"{relay.url}/broken.img")) == DATA
    assert relay.resets > 0
    assert any(entry.status == 206 and entry.if_range for entry in nginx.answered("/broken.img", at_least=2))


def test_content_that_changed_is_not_gone_on_with(nginx: nginx_lab.Nginx) -> None:
    served = nginx.root / "changing.img"
    served.write_bytes(DATA)
    source = http_source(f"{nginx.url}/changing.img")
    image = source.describe("an-image")
    served.write_bytes(bytes(reversed(DATA)))
    # nginx's entity tag is made of size and whole seconds.
    os.utime(served, (0, 0))
    with pytest.raises(CannotResume), source.open(image, 1000) as chunks:
        b"".join(chunks)


def test_a_server_that_ignores_ranges_cannot_resume(nginx: nginx_lab.Nginx) -> None:
    (nginx.root / "whole.img").write_bytes(DATA)
    source = http_source(f"{nginx.url}/no-range/whole.img")
    image = source.describe("an-image")
    with pytest.raises(CannotResume), source.open(image, 1000) as chunks:
        b"".join(chunks)
    assert fetch(source) == DATA


def test_redirects_are_followed(nginx: nginx_lab.Nginx) -> None:
    (nginx.root / "target.img").write_bytes(DATA)
    assert fetch(http_source(f"{nginx.url}/moved/target.img")) == DATA


def test_a_missing_file_is_not_found(nginx: nginx_lab.Nginx) -> None:
    with pytest.raises(errors.ImageNotFound):
        http_source(f"{nginx.url}/missing.img").describe("an-image")


def test_a_certificate_that_does_not_verify_is_refused_unless_its_ca_is_given(
    tls_nginx: nginx_lab.Nginx,
) -> None:
    (tls_nginx.root / "secret.img").write_bytes(DATA)
    url = f"{tls_nginx.url}/secret.img"
    with pytest.raises(errors.SourceError, match="certificate"):
        http_source(url).describe("an-image")
    assert fetch(http_source(url, verify=str(tls_nginx.certificate))) == DATA


def test_a_stalled_server_is_given_up(nginx: nginx_lab.Nginx) -> None:
    (nginx.root / "stalled.img").write_bytes(DATA)
    url = f"{nginx.url}/slow/stalled.img"
    image = http_source(url).describe("an-image")
    source = http_source(url, timeout=(60.0, 0.2))
    with pytest.raises(errors.SourceError, match="in time"), source.open(image) as chunks:
        b"".join(chunks)
