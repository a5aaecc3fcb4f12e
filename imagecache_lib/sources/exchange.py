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
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Protocol

import requests
import requests.auth
import requests.utils
import urllib3

from imagecache_lib import errors
from imagecache_lib.sources import connection, unanswered
from imagecache_lib.sources.interface import SourceMisconfigured

#: Seconds to wait for the connection, and for each read.
Timeout = tuple[float, float]

MOST_REDIRECTS = 5
#: How often a request is sent while its connection turns out to be dead. A pool may hold several dead ones:
#: a server that restarts drops them all.
_SENDS = 4
_POOL = 32

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: What has to be quoted in a URL. Some parsers end its host at a backslash (WHATWG's) and others do not (RFC
#: 3986): what is asked would be another host than what the rules here are about.
_UNSAFE = re.compile(r"[^\x21-\x5b\x5d-\x7e]")
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)


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
    :param anonymous: whether what this host's .netrc file has is not sent.
    """

    def __init__(
        self,
        session: requests.Session | None,
        *,
        verify: bool | str,
        timeout: Timeout,
        anonymous: bool = False,
    ) -> None:
        self._anonymous = anonymous
        self._callers = session
        self._verify = verify
        self._timeout = timeout
        self._own: tuple[int, requests.Session] | None = None

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> requests.Response:
        # What is given so keeps what a .netrc file has for the host from taking its place.
        authorization: requests.auth.AuthBase | None = _OfUrl() if self._anonymous else None
        if "Authorization" in headers:
            authorization = _Authorization(headers["Authorization"])
        return self._session().request(
            method,
            url,
            headers=dict(headers),
            data=body,
            auth=authorization,
            stream=True,
            allow_redirects=False,
            timeout=connection.bounded(self._timeout),
            verify=self._trust(),
        )

    def stranger(self) -> SessionSender:
        """Return what sends to other origins: none of the session's headers, cookies, or credentials.

        Nor any of this host's own: the server that redirects chooses whom they would be sent to, and whose
        answer becomes a disk.
        """
        return SessionSender(None, verify=self._trust(), timeout=self._timeout, anonymous=True)

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


class _OfUrl(requests.auth.AuthBase):
    """Sends user and password of the URL, if it has them, and no others."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        user, password = requests.utils.get_auth_from_url(request.url or "")
        return requests.auth.HTTPBasicAuth(user, password)(request) if user or password else request


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
        url.encode()  # half a character of UTF-16 is none
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        valid = valid and parts.netloc.isprintable()  # it is shown
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
            _require_length(response, image_id)
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
            if left == 0 or not unanswered.is_dead_connection(error):
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
    return next((_UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", one) for one in told), None)


def _require_length(response: requests.Response, image_id: str) -> None:
    """Refuse a length of the data that is none, or that is another each time (RFC 9112, section 6.3).

    http.client and urllib3 take such data for whole wherever the connection ends.

    :raises SourceError: the length is none.
    """
    told = _values(response, "Content-Length")
    if not told or "Transfer-Encoding" in response.headers:
        return
    lengths = {length.strip() for value in told for length in value.split(",")}
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(length) for length in lengths):
        raise errors.SourceError(
            f"{shown(response.url)}: {unanswered.NO_HEADERS}", image=image_id, next_step="try again later"
        )


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


def failure(error: BaseException, url: str, image_id: str | None) -> errors.SourceError:
    """Say why a request to a URL got no answer, or why the answer broke off, without telling a secret."""
    return unanswered.failure(error, shown(url), image_id)
