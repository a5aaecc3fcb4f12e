# SPDX-License-Identifier: Apache-2.0
"""Images on a web server: ids are looked up in a table, and never are URLs or paths themselves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import requests

from imagecache_lib import model
from imagecache_lib.sources import answers, exchange, interface
from imagecache_lib.sources.interface import ImageSource

#: Key in :attr:`Image.properties` of the strong entity tag under which the image was described.
ETAG = "etag"

#: HEAD answers that say nothing about GET: not implemented, or a signed URL that allows GET only (S3: 403).
_HEAD_UNUSABLE = frozenset({403, 405, 501})


@dataclasses.dataclass(frozen=True)
class HttpImage:
    """One image on a web server.

    :param url: absolute http or https URL. May hold a user and password or a signature: it is never
        shown but for host and path.
    :param disk_format: Glance's name of its format. None: the content decides.
    :param digest: of its content. Without one, only TLS and the server vouch for what arrives, and a
        broken transfer resumes only if the server sends strong entity tags.
    :param size: bytes. None: as the server says.
    """

    url: str = dataclasses.field(repr=False)
    disk_format: str | None = None
    digest: model.Digest | None = None
    size: int | None = None


class HttpSource(ImageSource):
    """Images from web servers, over HTTP/1.1 with ranges (RFC 9110).

    Redirects are followed, except from https to http. Another origin is asked without any of the
    session's headers, cookies and credentials.

    :param images: by image id.
    :param session: a requests session that carries what the servers ask for: credentials, proxies,
        client certificates. None: one of its own.
    :param timeout: seconds for the connection, and for each read.
    :param verify: as in requests: True, or the path of a file with CA certificates. False turns
        verification off.
    :raises ConfigError: a URL is not absolute http or https.
    """

    def __init__(
        self,
        images: Mapping[str, HttpImage],
        *,
        session: requests.Session | None = None,
        timeout: exchange.Timeout = (5.0, 60.0),
        verify: bool | str = True,
    ) -> None:
        for image in images.values():
            exchange.check_url(image.url)
        self._images = dict(images)
        send = exchange.SessionSend(session, verify=verify, timeout=timeout)
        self._web = exchange.Web(send, send.stranger())

    def __repr__(self) -> str:
        return f"HttpSource({len(self._images)} images)"

    def describe(self, image_id: str) -> model.Image:
        entry = self._entry(image_id)
        identity = {"Accept-Encoding": "identity"}
        with exchange.exchange(self._web, "HEAD", entry.url, identity, image_id=image_id) as response:
            if response.status_code == 200:
                size = answers.content_length(response.headers)
                return _image(image_id, entry, size, response)
            if response.status_code not in _HEAD_UNUSABLE:
                raise answers.refusal(response, image_id)
        first = {**identity, "Range": "bytes=0-0"}
        with exchange.exchange(self._web, "GET", entry.url, first, image_id=image_id) as response:
            if response.status_code == 206:
                part = answers.parse_content_range(response.headers.get("Content-Range", ""))
                return _image(image_id, entry, part[2] if part else None, response)
            if response.status_code == 200:
                return _image(image_id, entry, answers.content_length(response.headers), response)
            raise answers.refusal(response, image_id)

    def known_digest(self, image_id: str) -> model.Digest | None:
        entry = self._images.get(image_id)
        return None if entry is None else entry.digest

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        url = self._entry(image.id).url
        with answers.data(self._web, url, {}, image, offset, validator=image.properties.get(ETAG)) as stream:
            yield stream

    def can_resume(self, image: model.Image) -> bool:
        return super().can_resume(image) or image.properties.get(ETAG) is not None

    def _entry(self, image_id: str) -> HttpImage:
        return interface.entry_of(self._images, image_id)


def _image(image_id: str, entry: HttpImage, size: int | None, response: requests.Response) -> model.Image:
    tag = answers.strong_etag(response.headers)
    return model.Image(
        id=image_id,
        disk_format=entry.disk_format,
        size=entry.size if entry.size is not None else size,
        digest=entry.digest,
        properties=MappingProxyType({} if tag is None else {ETAG: tag}),
    )
