# SPDX-License-Identifier: Apache-2.0
"""Images in Glance, over its v2 API.

Facts about the server that shape this module: ``GET /v2/images/{id}/file`` honours Range but sends neither
ETag nor Accept-Ranges, so only the digest tells a splice of two versions; it answers 204 for an image
without data; ``os_hash_algo`` and ``os_hash_value`` come with API 2.7 (Rocky), before there is only the
md5 ``checksum``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import requests

from imagecache_lib import errors, model
from imagecache_lib.sources import answers, exchange
from imagecache_lib.sources.interface import CannotCopy, CannotResume, ImageSource, SourceRefused

_T = TypeVar("_T")

#: Most bytes of metadata. Glance's default limits allow some hundred KiB.
_LARGEST_METADATA = 4 * 2**20
#: Property of an image while Glance works on an import, such as a copy.
_IMPORT_TASK = "os_glance_import_task"
_HEX = re.compile(r"[0-9a-f]+")
#: Keys of the metadata that have a field of their own in :class:`Image`.
_MAPPED = frozenset(
    {
        "id",
        "disk_format",
        "container_format",
        "size",
        "virtual_size",
        "status",
        "checksum",
        "os_hash_algo",
        "os_hash_value",
        "locations",
        "direct_url",
        "stores",
    }
)


class GlanceSource(ImageSource):
    """Images in Glance.

    The token never reaches an origin other than the endpoints', a log, or a message.

    :param endpoints: URL or URLs of one image service, with or without ``/v2``. They are tried in turn.
        Without any, the session's catalog is asked.
    :param token: sent as X-Auth-Token; a callable is asked before every request, from any thread. None: no
        authentication, or the session's.
    :param session: a keystoneauth1 session or adapter, which brings token, catalog and its own rules for TLS.
    :param service_type: and ``service_name``, ``interface``, ``region_name``: which entry of the session's
        catalog, as keystoneauth1 takes them.
    :param verify: False turns the verification of TLS certificates off. Not for sessions.
    :param cafile: file with the CA certificates to trust. Not for sessions.
    :param timeout: seconds for the connection, and for each read.
    :raises ConfigError: there is neither endpoint nor session, there is both token and session, or an
        endpoint is not an absolute http or https URL.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] = (),
        *,
        token: str | Callable[[], str] | None = None,
        session: Any = None,
        service_type: str = "image",
        service_name: str | None = None,
        interface: str | Sequence[str] = "public",
        region_name: str | None = None,
        verify: bool = True,
        cafile: str | None = None,
        timeout: exchange.Timeout = (5.0, 60.0),
    ) -> None:
        given = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        if not given and session is None:
            raise errors.ConfigError(
                "a Glance source has neither an endpoint nor a session", next_step="configure one of them"
            )
        if token is not None and session is not None:
            raise errors.ConfigError(
                "a Glance source has both a token and a session", next_step="configure one of them"
            )
        self._endpoints = [_root(endpoint) for endpoint in given]
        self._token = token
        self._session = session
        self._catalog_entry = {
            "service_type": service_type,
            "service_name": service_name,
            "interface": interface,
            "region_name": region_name,
        }
        # Redirects to another origin are refused rather than followed without the token: Glance never
        # sends any, and one that a proxy sends would only end in a puzzling 401.
        if session is not None:
            self._web = exchange.Web(_KeystoneSend(session, timeout))
        else:
            trusted: bool | str = cafile if verify and cafile is not None else verify
            self._web = exchange.Web(exchange.SessionSend(None, verify=trusted, timeout=timeout))
        # The endpoint that answered last. A lost update costs one attempt at an endpoint that is down.
        self._first = 0

    def __repr__(self) -> str:
        where = ", ".join(exchange.shown(endpoint) for endpoint in self._endpoints) or "catalog"
        return f"GlanceSource({where})"

    def describe(self, image_id: str) -> model.Image:
        def ask(root: str) -> model.Image:
            url, headers = _image_url(root, image_id), self._headers(image_id)
            with exchange.exchange(self._web, "GET", url, headers, image_id=image_id) as answer:
                if answer.status_code != 200:
                    raise answers.refusal(answer, image_id)
                return image_from_metadata(image_id, _read_metadata(answer, image_id))

        return self._in_turn(image_id, ask)

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with contextlib.ExitStack() as stack:

            def ask(root: str) -> Iterator[bytes]:
                url = f"{_image_url(root, image.id)}/file"
                return stack.enter_context(
                    answers.data(self._web, url, self._headers(image.id), image, offset)
                )

            stream = self._in_turn(image.id, ask)
            try:
                yield stream
            except errors.SourceError:
                # It broke midway: another endpoint may do better.
                self._first += 1
                raise

    def vouches_for_digest(self, image: model.Image) -> bool:
        """Whether Glance computed the digest, as it does of what is uploaded.

        Of data that lies on a web server, whoever registers the address may state one.
        """
        return not any(each.startswith(("http://", "https://")) for each in image.locations)

    def copy_to_store(self, image: model.Image, store: str) -> None:
        # The interoperable import's method "copy-image", which Glance has since Victoria.
        body = json.dumps({"method": {"name": "copy-image"}, "stores": [store]}).encode()

        def ask(root: str) -> None:
            url = f"{_image_url(root, image.id)}/import"
            headers = self._headers(image.id) | {"Content-Type": "application/json"}
            with exchange.exchange(self._web, "POST", url, headers, image_id=image.id, body=body) as answer:
                if answer.status_code in (200, 201, 202):
                    return
                if answer.status_code not in (400, 403, 404, 405, 409, 413, 501):
                    raise answers.refusal(answer, image.id)
                refusal = CannotCopy(
                    f"Glance does not copy it into the store {store}: {exchange.shown(url)} answers"
                    f" HTTP {answer.status_code}",
                    image=image.id,
                    next_step="check the store's name, the import method copy-image, and the policy"
                    " copy_image",
                )
            # Glance answers 409 for a store that it does not have, and 409 or 400 when another host asked
            # first: only the image tells them apart.
            now = self.describe(image.id)
            if store not in now.stores and _IMPORT_TASK not in now.properties:
                raise refusal

        self._in_turn(image.id, ask)

    def _headers(self, image_id: str) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        token = self._token
        if callable(token):
            try:
                token = token()
            except errors.ImageCacheError:
                raise
            except Exception as error:  # the caller's function; its text may hold a secret
                raise errors.SourceError(
                    f"no token could be had ({type(error).__name__})",
                    image=image_id,
                    next_step="check what gives the source its tokens",
                ) from None
        if token is not None:
            headers["X-Auth-Token"] = token
        return headers

    def _in_turn(self, image_id: str, ask: Callable[[str], _T]) -> _T:
        """Ask one endpoint after the other until one answers; that there is no such image is an answer."""
        roots = self._endpoints or [self._root_from_catalog(image_id)]
        failures: list[errors.SourceError] = []
        first = self._first
        for turn in range(first, first + len(roots)):
            try:
                answer = ask(roots[turn % len(roots)])
            except errors.SourceError as error:
                failures.append(error)
            else:
                self._first = turn % len(roots)
                return answer
        raise min(failures, key=_hopelessness)

    def _root_from_catalog(self, image_id: str) -> str:
        try:
            endpoint = self._session.get_endpoint(**self._catalog_entry)
        except Exception as error:  # the caller's session
            raise exchange.failure(error, "the identity service", image_id) from None
        if not endpoint:
            raise SourceRefused(
                "the catalog has no such image service",
                image=image_id,
                next_step="check service type, interface and region",
            )
        return _root(str(endpoint))


class _KeystoneSend:
    """Sends through a keystoneauth1 session, which adds the token and renews it after a 401."""

    def __init__(self, session: Any, timeout: exchange.Timeout) -> None:
        self._session = session
        self._timeout = timeout

    def __call__(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> requests.Response:
        # log=False: the session would log all headers, and reads a body to log it.
        answer: requests.Response = self._session.request(
            url,
            method,
            headers=dict(headers),
            data=body,
            authenticated=True,
            redirect=False,
            raise_exc=False,
            log=False,
            stream=True,
            timeout=self._timeout,
        )
        return answer


def _hopelessness(error: errors.SourceError) -> int:
    """Rank what several endpoints said: what can be acted on counts most."""
    if isinstance(error, CannotResume):
        return 0
    return 2 if isinstance(error, SourceRefused) else 1


def _root(endpoint: str) -> str:
    exchange.check_url(endpoint)
    return re.sub(r"(/v2(\.\d+)?)?/*$", "", endpoint.rstrip("/"))


def _image_url(root: str, image_id: str) -> str:
    # Glance's ids are UUIDs. An id with dots or slashes can only be meant to reach another resource, and
    # quoting is no defence: clients and proxies on the way resolve "..", some of them "%2F" too.
    if image_id in (".", "..") or "/" in image_id or "\\" in image_id:
        raise _no_such_id(image_id)
    try:
        return f"{root}/v2/images/{urllib.parse.quote(image_id, safe='')}"
    except UnicodeEncodeError:
        raise _no_such_id(image_id) from None


def _no_such_id(image_id: str) -> errors.ImageNotFound:
    return errors.ImageNotFound(
        "no image in Glance has such an id", image=ascii(image_id)[1:-1], next_step="correct the id"
    )


# -- metadata --------------------------------------------------------------------------------------------


def _read_metadata(answer: requests.Response, image_id: str) -> object:
    collected = bytearray()
    for chunk in answers.body(answer, image_id):
        collected += chunk
        if len(collected) > _LARGEST_METADATA:
            raise _nonsense(image_id, f"the metadata have more than {_LARGEST_METADATA} bytes")
    try:
        return json.loads(collected)
    except (ValueError, RecursionError):
        raise _nonsense(image_id, "the metadata are not JSON") from None


def image_from_metadata(image_id: str, metadata: object) -> model.Image:
    """Turn the JSON document of ``GET /v2/images/{id}`` into an :class:`Image`.

    :raises SourceError: it is not the metadata of that image.
    """
    if not isinstance(metadata, dict) or metadata.get("id") != image_id:
        raise _nonsense(image_id, "the metadata are not those of this image")
    fields = _Fields(image_id, metadata)
    return model.Image(
        id=image_id,
        disk_format=fields.text("disk_format"),
        size=fields.length("size"),
        digest=_digest(fields),
        virtual_size=fields.length("virtual_size"),
        container_format=fields.text("container_format"),
        status=fields.text("status") or "active",
        locations=fields.locations(),
        stores=tuple(name for name in (fields.text("stores") or "").split(",") if name),
        properties=MappingProxyType({key: metadata[key] for key in metadata if key not in _MAPPED}),
    )


class _Fields:
    """Reads typed values out of metadata that anybody may have written."""

    def __init__(self, image_id: str, metadata: Mapping[str, Any]) -> None:
        self.image_id = image_id
        self._metadata = metadata

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise _nonsense(self.image_id, f"{key} in the metadata is not text")
        return value

    def length(self, key: str) -> int | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _nonsense(self.image_id, f"{key} in the metadata is not a number of bytes")
        return value

    def locations(self) -> tuple[str, ...]:
        listed = self._metadata.get("locations") or []
        if not isinstance(listed, list):
            raise _nonsense(self.image_id, "locations in the metadata is not a list")
        urls = [entry.get("url") for entry in listed if isinstance(entry, dict)]
        urls.append(self.text("direct_url"))
        return tuple(dict.fromkeys(url for url in urls if isinstance(url, str)))


def _digest(fields: _Fields) -> model.Digest | None:
    algorithm, value = fields.text("os_hash_algo"), fields.text("os_hash_value")
    md5 = fields.text("checksum")
    if not algorithm or not value or (md5 and not _hex_length(algorithm)):
        # hashing_algorithm is the server's option, and may name what this host's OpenSSL lacks.
        algorithm, value = "md5", md5
    if not value:
        return None
    length = _hex_length(algorithm)
    if not length:
        raise SourceRefused(
            f"its digest is a {algorithm[:40]!r}, which this host cannot compute",
            image=fields.image_id,
            next_step="set hashing_algorithm in Glance to one that all hosts have, such as sha512",
        )
    if len(value) != length or not _HEX.fullmatch(value.lower()):
        raise _nonsense(fields.image_id, f"the {algorithm} in the metadata is not one")
    return model.Digest(algorithm, value.lower())


def _hex_length(algorithm: str) -> int:
    """Return how many hex digits a digest has; 0 for an algorithm that this host lacks."""
    try:
        return hashlib.new(algorithm, usedforsecurity=False).digest_size * 2
    except ValueError:
        return 0


def _nonsense(image_id: str, cause: str) -> errors.SourceError:
    return errors.SourceError(
        cause, image=image_id, next_step="check that the endpoint is a Glance v2 API, and what lies between"
    )
