# SPDX-License-Identifier: Apache-2.0
"""Serves this host's base images to its peers, for images that are gone from the image service.

Two resources for each image that is in the cache and passed its checks, under the image id in unpadded
base64url. Both take GET and HEAD, and want ``Authorization: Bearer <token>``::

    /v1/images/<id>         JSON: id, format, source_format, size, virtual_size, digest {algorithm, value}
    /v1/images/<id>/data    the base's bytes; one byte range, If-Range

The digest is the image's own where the base was never converted. For a converted base it is a sha256 of what
lies in the cache, read when it is first asked for: it shows that the bytes arrived as they left. The entity
tag is the digest. A base that is being served is leased, so that no eviction takes it.

A host that relays has the resources of :mod:`imagecache_lib.precache.raw` too.
"""

from __future__ import annotations

import base64
import binascii
import collections
import hashlib
import hmac
import http.server
import json
import logging
import os
import re
import socket
import ssl
import sys
import threading
from typing import Any

from imagecache_lib import errors, manager, model
from imagecache_lib.precache import raw
from imagecache_lib.store.spool import Spools
from imagecache_lib.system import threads

LOG = logging.getLogger(__name__)

_PATH = re.compile(r"/v1/(images|raw)/([A-Za-z0-9_-]+)(/data|/pieces)?")
_PARTS = {"images": (None, "/data"), "raw": (None, "/pieces")}
_RANGE = re.compile(r"bytes=(\d{1,19})-(\d{0,19})")
_CHUNK = 2**20

#: A token shorter than this is guessed too soon.
SHORTEST_TOKEN = 16

#: Peers served at a time. More would only slow each other down, and this host's guests too.
_MOST_PEERS = 8
_RETRY_AFTER = 10

#: Seconds that a peer may keep a connection without a word.
_IDLE = 60

_REMEMBERED = 1000


class PeerServer:
    """Serves one cache, in threads.

    :param cache: the host's image cache.
    :param address: host and port to listen on; port 0 stands for any free port.
    :param token: the secret that the peers share.
    :param spools: what this host passes on while it receives it, or None if it relays nothing.
    :param tls: a server-side context. Without one, the server speaks plain HTTP, and an attacker on the
        network can read the token.
    :raises ConfigError: the token is too short, or the address cannot be listened on.
    """

    def __init__(
        self,
        cache: manager.ImageCacheManager,
        address: tuple[str, int],
        *,
        token: str,
        spools: Spools | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if len(token) < SHORTEST_TOKEN:
            raise errors.ConfigError(
                f"the peers' token has less than {SHORTEST_TOKEN} characters", next_step="make a random one"
            )
        try:
            self._server = _Server(
                address, cache, token, tls, None if spools is None else raw.RawImages(cache, spools)
            )
        except OSError as error:
            raise errors.ConfigError(
                f"peers cannot be served on {address[0]}:{address[1]}: {error.strerror}",
                next_step="choose another address",
            ) from error

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to serve, in threads, and return at once.

        :raises BackendError: no thread can be started.
        """
        threads.start(self._server.serve_forever, 0.1, name="imagecache-peers")

    def stop(self) -> None:
        """Accept no more requests. Those that are being answered end with the process."""
        self._server.shutdown()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        cache: manager.ImageCacheManager,
        token: str,
        tls: ssl.SSLContext | None,
        relayed: raw.RawImages | None,
    ) -> None:
        self.cache = cache
        self.relayed = relayed
        self.turns = threading.BoundedSemaphore(_MOST_PEERS)
        self._authorization = f"Bearer {token}".encode()
        self._tls = tls
        self._lock = threading.Lock()
        self._digests: collections.OrderedDict[tuple[str, int, int, int], model.Digest]
        self._digests = collections.OrderedDict()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Conversation)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        connection.settimeout(_IDLE)
        if self._tls is not None:
            # The handshake comes with the first read, in the connection's own thread.
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        LOG.info("A peer's connection from %s failed: %s", client_address, sys.exc_info()[1])

    def is_allowed(self, authorization: str) -> bool:
        return hmac.compare_digest(authorization.encode("latin-1", "replace"), self._authorization)

    def digest_of(self, held: model.BaseImage) -> model.Digest:
        """Return the digest of a base's bytes. Bases never change, so it is computed once."""
        if held.digest is not None and held.source_format == held.format:
            return held.digest
        assert held.fd is not None  # a leased base is open
        found = os.fstat(held.fd)
        key = (held.name, found.st_dev, found.st_ino, found.st_size)
        with self._lock:
            if key in self._digests:
                return self._digests[key]
        state, offset = hashlib.sha256(), 0
        while chunk := os.pread(held.fd, _CHUNK, offset):
            state.update(chunk)
            offset += len(chunk)
        digest = model.Digest("sha256", state.hexdigest())
        with self._lock:
            self._digests[key] = digest
            while len(self._digests) > _REMEMBERED:
                self._digests.popitem(last=False)
        return digest


class _Conversation(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "imagecache"
    sys_version = ""
    server: _Server

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *arguments: Any) -> None:
        LOG.debug("Peer %s: %s", self.client_address[0], format % arguments)

    def _answer(self, *, body: bool) -> None:
        if not self.server.is_allowed(self.headers.get("Authorization", "")):
            self._refuse(401, {"WWW-Authenticate": "Bearer"})
            return
        match = _PATH.fullmatch(self.path)
        image_id = _decoded(match[2]) if match is not None else None
        if match is None or image_id is None or match[3] not in _PARTS[match[1]]:
            self._refuse(404)
            return
        if match[1] == "raw":
            self._relay(image_id, match[3] or "", body=body)
            return
        if not self.server.turns.acquire(blocking=False):
            self._refuse(503, {"Retry-After": str(_RETRY_AFTER)})
            return
        try:
            with self.server.cache.lease_cached(image_id) as held:
                self._serve(held, data=match[3] == "/data", body=body)
        except (errors.ImageNotFound, errors.ImageRejected):
            self._refuse(404)
        except errors.ImageCacheError as error:
            LOG.warning("Image %s cannot be served to a peer: %s", image_id, error)
            self._refuse(503)
        finally:
            self.server.turns.release()

    def _relay(self, image_id: str, part: str, *, body: bool) -> None:
        if self.server.relayed is None:
            self._refuse(404)
            return
        asked = raw.Asked(image_id, self.headers.get("Range", ""), body=body)
        answer = self.server.relayed.pieces(asked) if part else self.server.relayed.data(asked)
        with answer:
            self._head(answer.status, answer.headers)
            try:
                for chunk in answer.chunks():
                    self.wfile.write(chunk)
            except errors.ImageCacheError as error:
                # The length that was promised does not come: the other side sees that it broke off.
                LOG.info("Image %s is no longer passed on to %s: %s", image_id, self.client_address[0], error)
                self.close_connection = True

    def _refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        self._head(status, {**(headers or {}), "Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _serve(self, held: model.BaseImage, *, data: bool, body: bool) -> None:
        assert held.fd is not None  # a leased base is open
        digest = self.server.digest_of(held)
        size = os.fstat(held.fd).st_size
        headers = {"ETag": f'"{digest.value}"'}
        if data:
            self._data(held.fd, size, headers, body=body)
            return
        told = json.dumps(
            {
                "id": held.image_id,
                "format": held.format,
                "source_format": held.source_format,
                "size": size,
                "virtual_size": held.virtual_size,
                "digest": {"algorithm": digest.algorithm, "value": digest.value},
            }
        ).encode()
        self._head(200, {**headers, "Content-Type": "application/json", "Content-Length": str(len(told))})
        if body:
            self.wfile.write(told)

    def _data(self, fd: int, size: int, headers: dict[str, str], *, body: bool) -> None:
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        first, last, status = 0, size - 1, 200
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is not None and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            first, last, status = int(asked[1]), min(int(asked[2] or size), size - 1), 206
            if first > last:
                self._refuse(416, {"Content-Range": f"bytes */{size}"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._head(status, {**headers, "Content-Length": str(last - first + 1)})
        while body and first <= last and (chunk := os.pread(fd, min(_CHUNK, last - first + 1), first)):
            self.wfile.write(chunk)
            first += len(chunk)


def _decoded(text: str) -> str | None:
    """Return the image id in a path, or None if the path names no image."""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except (binascii.Error, ValueError):
        return None
