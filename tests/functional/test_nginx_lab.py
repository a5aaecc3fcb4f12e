# SPDX-License-Identifier: Apache-2.0
"""What the lab's nginx really does: the facts that the HTTP source is built on, and that the lab works."""

from __future__ import annotations

import time

import pytest
import requests

from tests.lab import nginx as nginx_lab

DATA = bytes(range(256)) * 1024


@pytest.fixture(scope="module", autouse=True)
def served(nginx: nginx_lab.Nginx) -> None:
    (nginx.root / "lab.img").write_bytes(DATA)


def test_a_range_is_served_while_the_entity_tag_still_matches(nginx: nginx_lab.Nginx) -> None:
    tag = requests.head(f"{nginx.url}/lab.img", timeout=60).headers["ETag"]
    assert not tag.startswith("W/")
    headers = {"Range": "bytes=262000-", "If-Range": tag}
    matching = requests.get(f"{nginx.url}/lab.img", headers=headers, timeout=60)
    assert (matching.status_code, matching.content) == (206, DATA[262_000:])
    changed = requests.get(f"{nginx.url}/lab.img", headers={**headers, "If-Range": '"other"'}, timeout=60)
    assert (changed.status_code, changed.content) == (200, DATA)
    logged = nginx.answered("/lab.img", at_least=3)
    assert [entry.status for entry in logged] == [200, 206, 200]


def test_a_place_without_ranges_sends_everything(nginx: nginx_lab.Nginx) -> None:
    answer = requests.get(f"{nginx.url}/no-range/lab.img", headers={"Range": "bytes=5-"}, timeout=60)
    assert (answer.status_code, answer.content) == (200, DATA)


def test_a_slow_place_is_slow(nginx: nginx_lab.Nginx) -> None:
    started = time.monotonic()
    answer = requests.get(f"{nginx.url}/slow/lab.img", timeout=60)
    assert answer.content == DATA
    # 256 KiB at 256 KiB a second, the first second's worth of which may come at once.
    assert time.monotonic() - started > 0.5


def test_its_certificate_is_not_trusted_until_one_says_so(tls_nginx: nginx_lab.Nginx) -> None:
    (tls_nginx.root / "secret.img").write_bytes(DATA)
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{tls_nginx.url}/secret.img", timeout=60)
    answer = requests.get(f"{tls_nginx.url}/secret.img", timeout=60, verify=str(tls_nginx.certificate))
    assert answer.content == DATA
