# SPDX-License-Identifier: Apache-2.0
"""One HTTP request and its answer, as every HTTP source makes it.

Rules that hold for all of them are here and nowhere else: which redirects are followed, and that a secret
never reaches another origin or a message. Nothing is retried here, but for a kept-alive connection that
turns out to be dead when the request is sent. What an answer means is in
:mod:`imagecache_lib.sources.answers`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import os
import re
import socket
import ssl
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Protocol

import requests
import requests.auth
import urllib3
import urllib3.exceptions

from imagecache_lib import errors
from imagecache_lib.sources import connection
from imagecache_lib.sources.interface import SourceMisconfigured

#: Seconds to wait for the connection, and for each read.
Timeout = tuple[float, float]

MOST_REDIRECTS = 5
#: How often a request is sent while its connection turns out to be dead. A pool may hold several dead ones:
#: a server that restarts drops them all.
_SENDS = 4
_POOL = 32

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NO_ASCII = re.compile(r"[^\x21-\x7e]")


class Disconnected(errors.SourceError):
    """The server took the request and closed the connection without an answer."""


class Sender(Protocol):
    """Sends requests."""

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> requests.Response:
        """Send one request, follow nothing, and return the answer with its body unread."""


class SessionSender:
    """Sends through a requests session: the caller's, or one of its own per process.

    Of its own it makes one per process, because a forked child that reads from its parent's connections
    gets the parent's answers.

    :param session: the caller's. Its own rules for TLS hold as long as ``verify`` is True.
    :param verify: as in requests: True, False, or the path of a file with CA certificates.
    """

    def __init__(self, session: requests.Session | None, *, verify: bool | str, timeout: Timeout) -> None:
        self._callers = session
        self._verify = verify
        self._timeout = timeout
        self._own: tuple[int, requests.Session] | None = None

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> requests.Response:
        return self._session().request(
            method,
            url,
            headers=dict(headers),
            data=body,
            # Given so too: what a .netrc file has for the host would take the place of the header alone.
            auth=_Authorization(headers["Authorization"]) if "Authorization" in headers else None,
            stream=True,
            allow_redirects=False,
            timeout=connection.bounded(self._timeout),
            verify=self._trust(),
        )

    def stranger(self) -> SessionSender:
        """Return what sends to other origins: none of the session's headers, cookies, or credentials."""
        return SessionSender(None, verify=self._trust(), timeout=self._timeout)

    def _trust(self) -> bool | str:
        # Given with the call: of a session's own verify, requests lets REQUESTS_CA_BUNDLE take the place.
        if self._callers is not None and self._verify is True:
            return True if self._callers.verify is None else self._callers.verify
        return self._verify

    def _session(self) -> requests.Session:
        if self._callers is not None:
            return self._callers
        own = self._own
        if own is None or own[0] != os.getpid():
            session = _Session()
            for scheme in ("http://", "https://"):
                session.mount(scheme, connection.Adapter(pool_maxsize=_POOL))
            self._own = own = (os.getpid(), session)
        return own[1]


class _Session(requests.Session):
    """A session that follows no redirect, and does not prepare to: for that it would read all of the body."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None: the answer points nowhere."""


class _Authorization(requests.auth.AuthBase):
    """Sends one Authorization header as it is."""

    def __init__(self, value: str) -> None:
        self._value = value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = self._value
        return request


@dataclasses.dataclass(frozen=True)
class Web:
    """How one source speaks HTTP.

    :param sender: for the origins that the source was configured with. May carry credentials.
    :param elsewhere: for other origins that these redirect to; must carry no credentials. With None such
        redirects are refused.
    """

    sender: Sender
    elsewhere: Sender | None = None


def shown(url: str) -> str:
    """Return the URL without what may be secret: user, password, query (signatures), fragment."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def origin(url: str) -> str:
    """Return a text that is the same for one address only, and tells no secret of the URL."""
    query = urllib.parse.urlsplit(url).query
    return shown(url) if not query else f"{shown(url)}?{hashlib.sha256(query.encode()).hexdigest()}"


def check_url(url: str) -> None:
    """Refuse what is not an absolute http or https URL.

    :raises ConfigError: the text is not such a URL.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise errors.ConfigError(
            "an image source's URL is not an absolute http or https URL",
            next_step="correct the URL in the source's configuration",
        )


@contextlib.contextmanager
def exchange(
    web: Web,
    method: str,
    url: str,
    headers: Mapping[str, str],
    *,
    image_id: str,
    body: bytes | None = None,
) -> Iterator[requests.Response]:
    """Send a request, follow its redirects, and yield the answer, whatever its status, with its body unread.

    :param url: user and password in it are sent to its origin, by which way ever redirects lead there, and to
        no other.
    :raises SourceMisconfigured: a redirect must not be followed, or the server's certificate does not verify.
    :raises SourceError: the server does not answer.
    """
    sender = web.sender
    url, own = _without_credentials(url)
    home = _origin(url)
    for _ in range(MOST_REDIRECTS + 1):
        sent = {**own, **headers} if _origin(url) == home else headers
        response = _send(sender, method, url, sent, body, image_id)
        with contextlib.closing(response):
            location = _location(response, image_id)
            if method == "HEAD":
                # There is no body, but the connection is only kept once that was read.
                response.raw.drain_conn()
            if response.status_code not in _REDIRECTS or location is None:
                yield response
                return
        target = _redirect_target(url, location, image_id)
        if _origin(target) != _origin(url):
            if web.elsewhere is None:
                raise SourceMisconfigured(
                    f"{shown(url)} redirects to another origin, {shown(target)}, that must not see the token",
                    image=image_id,
                    next_step="configure the address it redirects to",
                )
            # For good: a stranger that redirects back must not make us show our credentials again.
            sender = web.elsewhere
        url = target
    raise SourceMisconfigured(
        f"more than {MOST_REDIRECTS} redirects, the last from {shown(url)}",
        image=image_id,
        next_step="correct the URL or the server",
    )


def _send(
    sender: Sender, method: str, url: str, headers: Mapping[str, str], body: bytes | None, image_id: str
) -> requests.Response:
    for left in reversed(range(_SENDS)):
        try:
            return sender.send(method, url, headers, body)
        except errors.ImageCacheError:
            raise
        except Exception as error:  # whatever a caller's session raises is foreign
            if left == 0 or not _is_dead_connection(error):
                # "from None": the texts of requests' errors hold whole URLs and header values.
                raise failure(error, url, image_id) from None
    raise AssertionError("the last attempt returned or raised")


def _location(response: requests.Response, image_id: str) -> str | None:
    """Return where an answer points to, as ASCII, or None if it points nowhere.

    :raises SourceMisconfigured: it points to two places.
    """
    told = {value.strip() for value in _values(response, "Location")}
    if len(told) > 1:
        raise SourceMisconfigured(
            f"{shown(response.url)} redirects to two places at once",
            image=image_id,
            next_step="correct the server",
        )
    # http.client takes the bytes of a header for Latin-1. Whatever they are, in a URL they are quoted.
    return next((_NO_ASCII.sub(lambda found: f"%{ord(found[0]):02X}", one) for one in told), None)


def _values(response: requests.Response, name: str) -> list[str]:
    """Return all values of a header. What requests has joins them by commas."""
    headers = getattr(response.raw, "headers", None)
    if isinstance(headers, urllib3.HTTPHeaderDict):
        return headers.getlist(name)
    return [response.headers[name]] if name in response.headers else []


def _redirect_target(url: str, location: str, image_id: str) -> str:
    try:
        target = urllib.parse.urljoin(url, location)
        check_url(target)
    except (ValueError, errors.ConfigError):
        raise SourceMisconfigured(
            f"{shown(url)} redirects to something that is not a web address",
            image=image_id,
            next_step="correct the URL or the server",
        ) from None
    if url.lower().startswith("https:") and not target.lower().startswith("https:"):
        raise SourceMisconfigured(
            f"{shown(url)} redirects from https to http ({shown(target)})",
            image=image_id,
            next_step="configure an address that stays on https",
        )
    return target


def _without_credentials(url: str) -> tuple[str, Mapping[str, str]]:
    """Take user and password out of a URL. Returns the URL without them, and the header that has them."""
    parts = urllib.parse.urlsplit(url)
    user_and_password, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    user, _, password = user_and_password.partition(":")
    # RFC 7617: the octets as they are written, once the URL's own quoting is undone.
    pair = urllib.parse.unquote_to_bytes(user) + b":" + urllib.parse.unquote_to_bytes(password)
    header = {"Authorization": "Basic " + base64.b64encode(pair).decode("ascii")}
    return urllib.parse.urlunsplit(parts._replace(netloc=host)), header


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _causes(error: BaseException) -> list[BaseException]:
    """Return the error and all that caused it: requests and urllib3 keep causes in args and ``reason``."""
    found: list[BaseException] = []
    pending: list[object] = [error]
    if not isinstance(error, requests.RequestException) and isinstance(
        error.__context__, requests.RequestException
    ):
        # keystoneauth1 raises its own while it handles requests', without "from".
        pending.append(error.__context__)
    while pending:
        one = pending.pop()
        if isinstance(one, BaseException) and one not in found:
            found.append(one)
            pending.extend((one.__cause__, getattr(one, "reason", None), *one.args))
    return found


def _is_dead_connection(error: BaseException) -> bool:
    # RemoteDisconnected is a ConnectionResetError. A refused connection is not one.
    dead = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
    return any(isinstance(cause, dead) for cause in _causes(error))


def failure(error: BaseException, url: str, image_id: str | None) -> errors.SourceError:
    """Say what went wrong without quoting the error: texts of requests' errors hold URLs and headers."""
    causes = _causes(error)
    where = shown(url)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return SourceMisconfigured(
                f"the certificate of {where} does not verify: {cause.verify_message}",
                image=image_id,
                next_step="give the source the file of the CA that signed it (for imagecache: OS_CACERT)",
            )
        if getattr(cause, "http_status", None) in (401, 403):
            return SourceMisconfigured(
                f"the session could not get a token to ask {where} with",
                image=image_id,
                next_step="check the credentials of the session",
            )
    if _is_own_fault(error):
        return SourceMisconfigured(
            f"no request to {where} can be made ({type(error).__name__})",
            image=image_id,
            next_step="check the token and the URL for stray characters",
        )
    reason = f"{where}: {_reason(error, causes)}"
    kind = Disconnected if _is_dead_connection(error) else errors.SourceError
    return kind(reason, image=image_id, next_step="try again later")


def _is_own_fault(error: BaseException) -> bool:
    """Return whether no request could be made of what there was to send, such as a token with a line end."""
    if isinstance(error, requests.RequestException):
        return isinstance(error, ValueError)
    return isinstance(error, ValueError) and not isinstance(error, OSError | urllib3.exceptions.HTTPError)


def _reason(error: BaseException, causes: list[BaseException]) -> str:
    kinds: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
        ((requests.ConnectTimeout,), "no connection in time"),
        ((connection.TooSlow,), "what it sends is no data, and takes too long"),
        ((connection.TooMuch,), "it sends too much that is no data"),
        ((requests.Timeout, urllib3.exceptions.ReadTimeoutError, TimeoutError), "nothing came in time"),
        ((http.client.RemoteDisconnected,), "the server closed the connection without an answer"),
        ((http.client.IncompleteRead, urllib3.exceptions.IncompleteRead), "the data broke off"),
        ((socket.gaierror,), "its name does not resolve"),
        ((http.client.BadStatusLine, http.client.UnknownProtocol), "its answer is not HTTP"),
        (
            (http.client.HTTPException, urllib3.exceptions.InvalidHeader),
            "its headers are not HTTP's",
        ),
    )
    for types, text in kinds:
        if any(isinstance(cause, types) for cause in causes):
            return text
    for cause in causes:
        if isinstance(cause, ssl.SSLError) and cause.reason:
            return f"TLS failed: {cause.reason.replace('_', ' ').lower()}"
        if isinstance(cause, OSError) and cause.strerror and not isinstance(cause, requests.RequestException):
            return cause.strerror
    return f"the transport failed ({type(error).__name__})"
