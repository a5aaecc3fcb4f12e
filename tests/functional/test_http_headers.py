# SPDX-License-Identifier: Apache-2.0
"""HttpSource against what a real nginx says beside the data: credentials, codings, types, refused methods."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import pytest

from imagecache_lib import errors, model
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.sources.interface import SourceRefused
from imagecache_lib.sources.transfer import StartAgain, Transfer, describe
from imagecache_lib.system.host import System
from tests.lab import nginx as nginx_lab

DATA = random.Random(13).randbytes(2**20)
DIGEST = model.Digest("sha256", hashlib.sha256(DATA).hexdigest())
IMPATIENT = System(sleep=lambda _seconds: None)

_PLACES = """
location /private/ {{ alias {root}/; auth_basic "images"; auth_basic_user_file {home}/users; }}
location /old/ {{
    auth_basic "images"; auth_basic_user_file {home}/users;
    rewrite ^/old/(.*)$ $scheme://$http_host/private/$1 redirect;
}}
location /pages/ {{ alias {root}/; types {{}} default_type text/html; }}
location /unknown/ {{ alias {root}/; types {{}} default_type text/plain; }}
location /stored/ {{ alias {root}/; add_header Content-Encoding aws-chunked; }}
location /packed/ {{ alias {root}/; add_header Content-Encoding gzip; }}
location /get-only/ {{ alias {root}/; if ($request_method = HEAD) {{ return 404; }} }}
"""


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nginx_lab.Nginx]:
    home = tmp_path_factory.mktemp("nginx")
    (home / "users").write_text("user:{PLAIN}pa@ss\n")
    places = _PLACES.format(root=home / "root", home=home)
    with nginx_lab.running_nginx(home, extra=places) as running:
        (running.root / "a.img").write_bytes(DATA)
        yield running


def fetch(url: str, digest: model.Digest | None = None) -> bytes:
    source = HttpSource({"an-image": HttpImage(url, "raw", digest)})
    found, image = describe(source, "an-image", host=IMPATIENT, retries=0)
    fetching = Transfer(found, image, host=IMPATIENT, retries=0)
    while True:
        try:
            return b"".join(fetching.chunks())
        except StartAgain:
            continue


def test_credentials_of_a_url_follow_an_absolute_redirect_within_the_origin(nginx: nginx_lab.Nginx) -> None:
    with_user = nginx.url.replace("//", "//user:pa%40ss@")
    assert fetch(f"{with_user}/old/a.img") == DATA
    assert fetch(f"{with_user}/private/a.img") == DATA
    with pytest.raises(SourceRefused, match="credentials"):
        fetch(f"{nginx.url}/old/a.img")


def test_a_page_is_no_image_unless_a_digest_says_so(nginx: nginx_lab.Nginx) -> None:
    with pytest.raises(SourceRefused, match="text/html"):
        fetch(f"{nginx.url}/pages/a.img")
    assert fetch(f"{nginx.url}/pages/a.img", DIGEST) == DATA
    assert fetch(f"{nginx.url}/unknown/a.img") == DATA


def test_codings_matter_only_where_they_change_bytes_and_no_digest_decides(nginx: nginx_lab.Nginx) -> None:
    assert fetch(f"{nginx.url}/stored/a.img") == DATA
    assert fetch(f"{nginx.url}/packed/a.img", DIGEST) == DATA
    with pytest.raises(errors.SourceError, match="gzip"):
        fetch(f"{nginx.url}/packed/a.img")


def test_where_head_is_refused_get_decides(nginx: nginx_lab.Nginx) -> None:
    assert fetch(f"{nginx.url}/get-only/a.img") == DATA
    with pytest.raises(errors.ImageNotFound):
        fetch(f"{nginx.url}/get-only/missing.img")
