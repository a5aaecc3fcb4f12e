# SPDX-License-Identifier: Apache-2.0
"""Images in Glance, over its v2 API.

Facts about the server that shape this module: ``GET /v2/images/{id}/file`` honours Range but sends neither
ETag nor Accept-Ranges, so only the digest tells a splice of two versions; it answers 204 for an image
without data, and 400 to a range where its store cannot read from an offset.
"""

from __future__ import annotations

import contextlib
import json
import re
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import requests

from imagecache_lib import errors, model
from imagecache_lib.sources import answers, connection, exchange
from imagecache_lib.sources.body import Body
from imagecache_lib.sources.endpoints import FromOneOfSeveral, Suspects
from imagecache_lib.sources.glance_metadata import image_from_metadata, read_metadata
from imagecache_lib.sources.interface import (
    CannotCopy,
    CannotResume,
    ImageSource,
    SourceMisconfigured,
    SourceRefused,
    Unauthorized,
    flag,
    require_options,
)

_T = TypeVar("_T")

#: Property of an image while Glance works on an import, such as a copy.
_IMPORT_TASK = "os_glance_import_task"


class GlanceSource(ImageSource):
    """Images in Glance.

    The token never reaches an origin other than the endpoints', a log, or a message.

    :param endpoints: URL or URLs of one image service, with or without ``/v2``. They are tried in turn.
        Without any, the session's catalog is asked.
    :param token: sent as X-Auth-Token; a callable is asked before every request, from any thread, and once
        more after a 401. With None there is no authentication, or the session's.
    :param session: a keystoneauth1 session, which brings token, catalog and its own rules for TLS.
    :param adapter: a keystoneauth1 adapter instead, which also brings the catalog's entry: its interface,
        region and endpoint override hold, and so do its authentication (a service token) and request id.
    :param service_type: and ``service_name``, ``interface``, ``region_name``: which entry of the session's
        catalog, as keystoneauth1 takes them. Not for adapters.
    :param verify: False turns the verification of TLS certificates off. Not for sessions.
    :param cafile: file with the CA certificates to trust. Not for sessions.
    :param timeout: seconds for the connection, and for each read.
    :param computes_digests: True if Glance has computed the digests of all its images itself, so that no user
        can have stated one: see :meth:`vouches_for_digest`. Glance does not tell this.
    :raises ConfigError: there is neither endpoint nor session, there are two of token, session and adapter,
        or an endpoint is not an absolute http or https URL.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] = (),
        *,
        token: str | Callable[[], str] | None = None,
        session: Any = None,
        adapter: Any = None,
        service_type: str = "image",
        service_name: str | None = None,
        interface: str | Sequence[str] = "public",
        region_name: str | None = None,
        verify: bool = True,
        cafile: str | None = None,
        timeout: exchange.Timeout = (5.0, 60.0),
        computes_digests: bool = False,
    ) -> None:
        given = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        if adapter is None and hasattr(session, "endpoint_override"):
            session, adapter = None, session  # an adapter, and what it was made with must hold
        if not given and session is None and adapter is None:
            raise errors.ConfigError(
                "a Glance source has neither an endpoint nor a session", next_step="configure one of them"
            )
        if sum(one is not None for one in (token, session, adapter)) > 1:
            raise errors.ConfigError(
                "a Glance source has two of token, session and adapter", next_step="configure one of them"
            )
        self._endpoints = [_root(endpoint) for endpoint in given]
        self._suspects = Suspects(self._endpoints)
        self._token = token
        self._computes_digests = computes_digests
        self._session = adapter or session
        self._catalog_entry: dict[str, Any] = {}
        if adapter is None:
            self._catalog_entry = {
                "service_type": service_type,
                "service_name": service_name,
                "interface": interface,
                "region_name": region_name,
            }
        # Redirects to another origin are refused rather than followed without the token: Glance never
        # sends any, and one that a proxy sends would only end in a puzzling 401.
        if self._session is not None:
            self._web = exchange.Web(_KeystoneSender(self._session, timeout))
        else:
            trusted: bool | str = cafile if verify and cafile is not None else verify
            self._web = exchange.Web(exchange.SessionSender(None, verify=trusted, timeout=timeout))
        # The endpoint that answered last. A lost update costs one attempt at an endpoint that is down.
        self._first = 0

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> ImageSource:
        """Make one from ``endpoints``, URLs with commas between them, ``token``, ``cafile`` and
        ``computes_digests`` (``yes`` or ``no``).
        """
        known = ("endpoints", "token", "cafile", "computes_digests")
        require_options("glance", options, *known, needed="endpoints")
        endpoints = [endpoint.strip() for endpoint in options["endpoints"].split(",")]
        return cls(
            endpoints,
            token=options.get("token"),
            cafile=options.get("cafile"),
            computes_digests=flag("glance", options, "computes_digests"),
        )

    def __repr__(self) -> str:
        where = ", ".join(exchange.shown(endpoint) for endpoint in self._endpoints) or "catalog"
        return f"GlanceSource({where})"

    def origin(self, image_id: str) -> str:
        if self._endpoints:
            return f"glance:{' '.join(sorted(exchange.origin(each) for each in self._endpoints))}"
        # One host's sessions and adapters lead to one cloud, in which this names the service.
        names = ("service_type", "service_name", "interface", "region_name", "endpoint_override")
        entry = [self._catalog_entry.get(name, getattr(self._session, name, None)) for name in names]
        return f"glance:{entry!r}"

    def describe(self, image_id: str) -> model.Image:
        def ask(root: str, headers: Mapping[str, str]) -> model.Image:
            url = _image_url(root, image_id)
            with exchange.exchange(self._web, "GET", url, headers, image_id=image_id) as answer:
                if answer.status_code != 200:
                    raise answers.refusal(answer, image_id, of_data=False)
                return image_from_metadata(image_id, read_metadata(answer, image_id))

        return self._in_turn(image_id, ask)

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with contextlib.ExitStack() as stack:
            stream = self._opened(image, offset, stack)
            try:
                yield stream
            except errors.SourceError:
                # It broke midway: another endpoint may do better.
                self._first += 1
                raise

    def _opened(self, image: model.Image, offset: int, stack: contextlib.ExitStack) -> Iterator[bytes]:
        """Open the data at the first endpoint of which nothing says that it sends something else.

        Endpoints that sent other data before are asked last.

        :param stack: what closes the answer.
        """
        several = len(self._endpoints) > 1
        doubted, believed = False, not several

        def ask(root: str, headers: Mapping[str, str]) -> Body | FromOneOfSeveral:
            nonlocal doubted
            url = f"{_image_url(root, image.id)}/file"
            with contextlib.ExitStack() as answer:
                stream = answer.enter_context(answers.data(self._web, url, headers, image, offset))
                if not believed:
                    stream.look()
                    if stream.doubt is not None:
                        doubted = True
                        raise stream.doubt
                stack.push(answer.pop_all())
                return FromOneOfSeveral(stream, root, self._suspects) if several else stream

        last = self._suspects.of(image)
        try:
            return self._in_turn(image.id, ask, last=last)
        except errors.SourceError:
            if not doubted or image.digest is None:
                raise
        believed = True  # all of them send it, and the digest decides
        return self._in_turn(image.id, ask, last=last)

    def vouches_for_digest(self, image: model.Image) -> bool:
        """Whether Glance computed the digest itself, by ``computes_digests`` and by the image's locations.

        It computes those of what is uploaded or imported. A user who registers a location (by PATCH where
        ``show_multiple_locations`` is set, by POST to ``/locations`` for a web store where ``do_secure_hash``
        is not) states the digest, and may state that of an image which this user may not read. The metadata
        of the image show neither these options nor, mostly, the locations.
        """
        on_the_web = any(each.startswith(("http://", "https://")) for each in image.locations)
        return self._computes_digests and not on_the_web

    def copy_to_store(self, image: model.Image, store: str) -> None:
        # The interoperable import's method "copy-image", which Glance has since Victoria.
        body = json.dumps({"method": {"name": "copy-image"}, "stores": [store]}).encode()

        def ask(root: str, headers: Mapping[str, str]) -> None:
            url = f"{_image_url(root, image.id)}/import"
            headers = {**headers, "Content-Type": "application/json"}
            with exchange.exchange(self._web, "POST", url, headers, image_id=image.id, body=body) as answer:
                if answer.status_code in (200, 201, 202):
                    return
                if answer.status_code not in (400, 403, 404, 405, 409, 413, 501):
                    raise answers.refusal(answer, image.id, of_data=False)
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

    def _in_turn(
        self,
        image_id: str,
        ask: Callable[[str, Mapping[str, str]], _T],
        *,
        last: Collection[str] = (),
    ) -> _T:
        """Ask one endpoint after the other until one answers; that there is no such image is an answer.

        :param last: endpoints that are asked after all others.
        """
        roots = self._endpoints or [self._root_from_catalog(image_id)]
        failures: list[errors.SourceError] = []
        first = self._first
        turns = [turn % len(roots) for turn in range(first, first + len(roots))]
        turns.sort(key=lambda turn: roots[turn] in last)
        for turn in turns:
            try:
                root, headers = roots[turn], self._headers(image_id)
                try:
                    answer = ask(root, headers)
                except Unauthorized:
                    # The token may have expired since: the caller's function is asked once more.
                    renewed = self._headers(image_id) if callable(self._token) else headers
                    if renewed == headers:
                        raise
                    answer = ask(root, renewed)
            except errors.SourceError as error:
                failures.append(error)
            else:
                self._first = turn
                return answer
        try:
            raise _together(failures, [roots[turn] for turn in turns])
        finally:
            failures.clear()  # their tracebacks hold this frame, and so the answers

    def _root_from_catalog(self, image_id: str) -> str:
        try:
            endpoint = self._session.get_endpoint(**self._catalog_entry)
        except Exception as error:  # the caller's session
            if not _is_of_the_catalog(error):
                raise exchange.failure(error, "the identity service", image_id) from None
            endpoint = None
        if not endpoint:
            raise SourceMisconfigured(
                "the catalog has no such image service",
                image=image_id,
                next_step="check service type, interface and region",
            )
        return _root(str(endpoint))


def _is_of_the_catalog(error: Exception) -> bool:
    """Whether a session says that its catalog has no such entry. keystoneauth1 is an extra: not imported."""
    return any(kind.__name__ == "CatalogException" for kind in type(error).__mro__)


class _KeystoneSender:
    """Sends through a keystoneauth1 session, which adds the token and renews it after a 401."""

    def __init__(self, session: Any, timeout: exchange.Timeout) -> None:
        self._session = session
        self._timeout = timeout

    def send(
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
            timeout=connection.bounded(self._timeout),
        )
        return answer


def _hopelessness(error: errors.SourceError) -> int:
    """Rank what several endpoints said: what can be acted on counts most."""
    if isinstance(error, CannotResume):
        return 0
    return 2 if isinstance(error, SourceRefused) else 1


def _together(failures: list[errors.SourceError], roots: Sequence[str]) -> errors.SourceError:
    """Return the failure that counts most. If there are several endpoints, it says what each one answered.

    :param failures: one of each endpoint, in their order.
    """
    error = min(failures, key=_hopelessness)
    if len(failures) > 1:
        asked = map(exchange.shown, roots)
        told = "; ".join(f"{root}: {each.cause}" for root, each in zip(asked, failures, strict=True))
        error.cause = f"none of its {len(failures)} endpoints gives it: {told}"
    return error


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
