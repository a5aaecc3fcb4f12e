# SPDX-License-Identifier: Apache-2.0
"""Images that another host has in its cache: a second chance for what is gone from the image service.

The other side is :mod:`imagecache_lib.precache.peer`, whose docstring has the protocol.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import requests

from imagecache_lib import errors, model
from imagecache_lib.sources import answers, body, exchange
from imagecache_lib.sources.body import Body
from imagecache_lib.sources.interface import ImageSource, SourceRefused, flag, require_options

_LONGEST_ANSWER = 64 * 1024
_HEX = re.compile(r"[0-9a-f]+")


def path_of(image_id: str) -> str:
    """Return the path of an image on a peer.

    :raises ImageNotFound: the id cannot be an image's.
    """
    return f"/v1/images/{encoded(image_id)}"


def encoded(image_id: str) -> str:
    """Return an image's id as part of a path, in which no character of it means anything.

    :raises ImageNotFound: the id cannot be an image's.
    """
    try:
        named = base64.urlsafe_b64encode(image_id.encode()).decode().rstrip("=")
    except UnicodeEncodeError:
        named = ""
    if not named:
        raise errors.ImageNotFound("no image has such an id", image=image_id, next_step="correct the id")
    return named


class PeerSource(ImageSource):
    """The cache of one other host, over HTTP.

    What comes is inspected as from any source. A trusted peer's digest is believed: for an unconverted base
    it is the image's own, and what was fetched counts as checked against it; for a converted one it is that
    of the peer's base, and this host has not checked the image's own data. An untrusted peer's digest is
    ignored.

    :param url: of the peer, such as ``https://node-1:9293``.
    :param token: the secret that the peers share.
    :param trusted: believe its digests.
    :param timeout: seconds for the connection, and for each read. Before its first answer on a converted
        image the peer reads the whole base.
    :param verify: as in requests: True, or the path of a file with CA certificates.
    :raises ConfigError: the URL is not absolute http or https.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str,
        trusted: bool = False,
        timeout: exchange.Timeout = (5.0, 300.0),
        verify: bool | str = True,
    ) -> None:
        exchange.check_url(url)
        self._url = url.rstrip("/")
        self._trusted = trusted
        self._headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"}
        # No other origin: a peer that redirects is none.
        self._web = exchange.Web(exchange.SessionSender(None, verify=verify, timeout=timeout))

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> ImageSource:
        """Make one from ``url``, ``token``, ``cafile`` and ``trusted`` (``yes`` or ``no``)."""
        require_options("peer", options, "url", "token", "cafile", "trusted", needed="url")
        return cls(
            options["url"],
            token=options.get("token", ""),
            trusted=flag("peer", options, "trusted"),
            verify=options.get("cafile") or True,
        )

    def __repr__(self) -> str:
        return f"PeerSource({exchange.shown(self._url)!r})"

    def origin(self, image_id: str) -> str:
        return f"peer:{exchange.origin(self._url)}"

    def describe(self, image_id: str) -> model.Image:
        url = self._url + path_of(image_id)
        with exchange.exchange(self._web, "GET", url, self._headers, image_id=image_id) as response:
            if response.status_code != 200:
                raise answers.refusal(response, image_id)
            told = b""
            for chunk in body.read(response, image_id):
                told += chunk
                if len(told) > _LONGEST_ANSWER:
                    raise _unintelligible(image_id, url)
            return self._image(image_id, told, response)

    def _image(self, image_id: str, told: bytes, response: requests.Response) -> model.Image:
        try:
            fields: dict[str, Any] = json.loads(told)
            stored, source = str(fields["format"]), str(fields["source_format"])
            size, virtual_size = int(fields["size"]), int(fields["virtual_size"])
            digest = model.Digest(str(fields["digest"]["algorithm"]), str(fields["digest"]["value"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise _unintelligible(image_id, response.url) from error
        # An image that the image service has only an md5 of has no other here.
        is_digest = _HEX.fullmatch(digest.value) and len(digest.value) == digest.hex_length
        if not is_digest or min(size, virtual_size) < 0:
            raise _unintelligible(image_id, response.url)
        tag = answers.strong_etag(response.headers)
        return model.Image(
            id=image_id,
            disk_format=stored,
            size=size,
            digest=digest if self._trusted else None,
            virtual_size=virtual_size,
            converted_from=source if source != stored else None,
            properties=MappingProxyType({} if tag is None else {answers.ETAG: tag}),
        )

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Body]:
        url = f"{self._url}{path_of(image.id)}/data"
        with answers.data(self._web, url, self._headers, image, offset) as stream:
            yield stream

    def can_resume(self, image: model.Image) -> bool:
        return super().can_resume(image) or image.properties.get(answers.ETAG) is not None


def _unintelligible(image_id: str, url: str) -> errors.SourceError:
    return SourceRefused(
        "the peer's answer makes no sense",
        image=image_id,
        path=exchange.shown(url),
        next_step="check that an agent of this release answers there",
    )
