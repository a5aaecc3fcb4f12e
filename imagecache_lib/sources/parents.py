# SPDX-License-Identifier: Apache-2.0
"""Other hosts that pass an image on while they receive it, over HTTP.

The other side is :mod:`imagecache_lib.precache.raw`, whose docstring has the protocol. A host is known by its
name alone; its address is this host's own configuration.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from imagecache_lib import errors, model
from imagecache_lib.sources import answers, body, exchange
from imagecache_lib.sources.body import Body
from imagecache_lib.sources.interface import CannotResume
from imagecache_lib.sources.peer import encoded
from imagecache_lib.store import pieces
from imagecache_lib.store.pieces import Pieces

#: What stands for the name of a host in a URL.
PLACE = "{host}"

#: A host's name as it may become part of a URL: nothing in it means anything there.
HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")

#: Header in which a host tells how many bytes it has, from the first on.
HAVE = "Imagecache-Have"

#: Seconds for a connection, and for each read. A host whose parent starves too is told so when it asks.
_TIMEOUT = (3.0, 5.0)
#: The same for short questions, which are asked between two chunks.
_ASK_TIMEOUT = (1.0, 2.0)


def path_of(image_id: str) -> str:
    """Return the path of an image's bytes on a host that passes it on.

    :raises ImageNotFound: the id cannot be an image's.
    """
    return f"/v1/raw/{encoded(image_id)}"


class Parents:
    """How this host reaches others. Safe to share between threads.

    :param url: with ``{host}`` where the name of a host belongs, such as ``https://{host}:9293``.
    :param token: the secret that the hosts share.
    :param verify: as in requests: True, or the path of a file with CA certificates.
    :param timeout: seconds for a connection, and for each read.
    :raises ConfigError: the URL has no place for a name, or is not absolute http or https.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str,
        verify: bool | str = True,
        timeout: exchange.Timeout = _TIMEOUT,
    ) -> None:
        if url.count(PLACE) != 1:
            raise errors.ConfigError(
                f"the URL of relaying hosts is {url!r}, and needs {PLACE} once",
                next_step=f"write it as https://{PLACE}:9293",
            )
        exchange.check_url(url.replace(PLACE, "host"))
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"}
        # No other origin: a host that redirects relays nothing.
        self._web = exchange.Web(exchange.SessionSender(None, verify=verify, timeout=timeout))
        self._asking = exchange.Web(exchange.SessionSender(None, verify=verify, timeout=_ASK_TIMEOUT))

    def __repr__(self) -> str:
        return f"Parents({exchange.shown(self._url)!r})"

    @contextlib.contextmanager
    def data(self, host: str, image: model.Image, offset: int) -> Iterator[Body]:
        """Yield what a host has of an image from an offset on, as it comes.

        :raises SourceError: the host cannot be reached, or has no such bytes.
        :raises ImageNotFound: the host does not pass the image on.
        """
        assert image.digest is not None
        headers = {**self._headers, "Range": f"bytes={offset}-"}
        url = self._of(host, image.id)
        with exchange.exchange(self._web, "GET", url, headers, image_id=image.id) as response:
            if response.status_code != 206:
                raise answers.refusal(response, image.id)
            part = answers.parse_content_range(response.headers.get("Content-Range", ""))
            if part is None or (part[0], part[2]) != (offset, image.size):
                raise CannotResume(f"host {host} sends another range than was asked for", image=image.id)
            _require_same(host, image, answers.strong_etag(response.headers))
            yield Body(response, image)

    def has(self, host: str, image: model.Image) -> int | None:
        """Return how many bytes of an image a host has now, or None if it does not say."""
        with contextlib.suppress(errors.ImageCacheError, ValueError):
            url = self._of(host, image.id)
            with exchange.exchange(self._asking, "HEAD", url, self._headers, image_id=image.id) as response:
                if response.status_code == 200:
                    return int(response.headers.get(HAVE, ""))
        return None

    def pieces(self, host: str, image: model.Image) -> Pieces | None:
        """Return the hashes of an image's pieces as a host knows them, or None if it knows none yet."""
        with contextlib.suppress(errors.ImageCacheError):
            url = f"{self._of(host, image.id)}/pieces"
            with exchange.exchange(self._asking, "GET", url, self._headers, image_id=image.id) as response:
                if response.status_code != 200:
                    return None
                told = bytearray()
                for chunk in body.read(response, image.id):
                    told += chunk
                    if len(told) > pieces.LIMIT:
                        return None
            found = pieces.parse(bytes(told))
            if found is not None and (found.digest, found.size) == (image.digest, image.size):
                return found
        return None

    def _of(self, host: str, image_id: str) -> str:
        if not HOST_NAME.fullmatch(host):
            raise errors.SourceError(f"{host!r:.80} is no name of a host", image=image_id)
        return self._url.replace(PLACE, host) + path_of(image_id)


def _require_same(host: str, image: model.Image, tag: str | None) -> None:
    assert image.digest is not None
    if tag != f'"{image.digest}"':
        raise errors.SourceError(f"host {host} passes on other data under this id", image=image.id)
