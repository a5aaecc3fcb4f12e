# SPDX-License-Identifier: Apache-2.0
"""Why a request got no answer, or why an answer broke off.

The errors of requests, urllib3 and keystoneauth1 are told by their types: their texts hold URLs and headers.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl

import requests
import urllib3.exceptions

from imagecache_lib import errors
from imagecache_lib.sources import connection
from imagecache_lib.sources.interface import SourceMisconfigured

#: What is said of an answer whose headers make no sense.
NO_HEADERS = "its headers are not HTTP's"
#: What to do about a proxy.
PROXY = "check the proxy that the environment or the session names, and its user and password"

_PROXY = (requests.exceptions.ProxyError, urllib3.exceptions.ProxyError)
#: What to do about a certificate that does not verify, and by OpenSSL's code of the reason: it is not valid
#: yet, or no more; it is of another name, or of another address.
_CERTIFICATE = "give the source the file of the CA that signed it (for imagecache: OS_CACERT)"
_RENEW = "have the server's certificate renewed, or set the clock of this host"
_RENAME = "ask the server by a name that is in its certificate, or have one made for this name"
_CERTIFICATES = {9: _RENEW, 10: _RENEW, 62: _RENAME, 64: _RENAME}
#: NewConnectionError is of addresses that refuse and of names that do not resolve.
_UNREACHABLE = (requests.ConnectTimeout, urllib3.exceptions.NewConnectionError)
_SILENT = (requests.Timeout, urllib3.exceptions.ReadTimeoutError, TimeoutError)
#: http.client's only text of an answer to CONNECT.
_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})\b", re.ASCII)
_BUSY = frozenset({"408", "425", "429"})


class Unreachable(errors.SourceError):
    """There is no connection to the server, whatever it is asked for."""


class Silent(errors.SourceError):
    """The server took the request, and sent no answer to it, or next to nothing of one, in time."""


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


def is_dead_connection(error: BaseException) -> bool:
    """Return whether a connection ended that was there when the request was sent."""
    # RemoteDisconnected is a ConnectionResetError. A refused connection is not one.
    dead = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
    return any(isinstance(cause, dead) for cause in _causes(error))


def failure(error: BaseException, where: str, image_id: str | None) -> errors.SourceError:
    """Return the error that says what went wrong, without a word of the error that is given.

    :param where: the address, without what is secret in it.
    """
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return SourceMisconfigured(
                f"the certificate of {where} does not verify: {cause.verify_message}",
                image=image_id,
                next_step=_CERTIFICATES.get(cause.verify_code, _CERTIFICATE),
            )
        if getattr(cause, "http_status", None) in (401, 403):
            return SourceMisconfigured(
                f"the session could not get a token to ask {where} with",
                image=image_id,
                next_step="check the credentials of the session",
            )
    if _lacks_a_file(error, causes):
        return SourceMisconfigured(
            f"no request to {where} can be made: a file that TLS needs, of CA certificates or of a client's"
            " certificate or key, is not there or is none",
            image=image_id,
            next_step="correct its path (for imagecache: OS_CACERT; for requests: REQUESTS_CA_BUNDLE)",
        )
    if _is_own_fault(error, causes):
        return SourceMisconfigured(
            f"no request to {where} can be made ({type(error).__name__})",
            image=image_id,
            next_step="check the token, the URL, and the proxy's if there is one, for stray characters",
        )
    if any(isinstance(cause, _PROXY) for cause in causes):
        return _of_the_proxy(error, causes, where, image_id)
    kind: type[errors.SourceError] = errors.SourceError
    if any(isinstance(cause, _UNREACHABLE) for cause in causes):
        kind = Unreachable
    elif any(isinstance(cause, _SILENT) for cause in causes):
        kind = Silent
    return kind(f"{where}: {_reason(error, causes)}", image=image_id, next_step="try again later")


def _of_the_proxy(
    error: BaseException, causes: list[BaseException], where: str, image_id: str | None
) -> errors.SourceError:
    """Return the error of a request that did not get through the proxy."""
    refusal = next((found for found in map(_TUNNEL.match, map(str, causes)) if found), None)
    reason = f"the proxy answers HTTP {refusal[1]}" if refusal else f"the proxy: {_reason(error, causes)}"
    kind: type[errors.SourceError] = Unreachable
    if refusal and refusal[1].startswith("4") and refusal[1] not in _BUSY:
        kind = SourceMisconfigured
    return kind(f"{where}: {reason}", image=image_id, next_step=PROXY)


def _lacks_a_file(error: BaseException, causes: list[BaseException]) -> bool:
    """Return whether what TLS is configured with cannot be read: certificates of CAs, or a client's own."""
    # requests looks whether the files are there, and has no type of its own for that. What is in them OpenSSL
    # reads before there is a connection.
    if type(error) is OSError and error.errno is None and "invalid path: " in str(error):
        return True
    of_tls = [cause for cause in causes if isinstance(cause, ssl.SSLError)]
    return any(cause.library == "X509" or "PEM lib" in str(cause.strerror) for cause in of_tls)


def _is_own_fault(error: BaseException, causes: list[BaseException]) -> bool:
    """Return whether no request could be made of what there was to send, such as a token with a line end."""
    if any(isinstance(cause, urllib3.exceptions.LocationValueError) for cause in causes):
        return True
    if any(isinstance(cause, urllib3.exceptions.InvalidHeader) for cause in causes):
        return False  # of the answer
    if isinstance(error, requests.RequestException):
        return isinstance(error, ValueError)
    return isinstance(error, ValueError) and not isinstance(error, OSError | urllib3.exceptions.HTTPError)


def _reason(error: BaseException, causes: list[BaseException]) -> str:
    kinds: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
        ((requests.ConnectTimeout,), "no connection in time"),
        ((connection.TooSlow,), "what it sends is no data, and takes too long"),
        ((connection.TooMuch,), "it sends too much that is no data"),
        (_SILENT, "nothing came in time"),
        ((http.client.RemoteDisconnected,), "the server closed the connection without an answer"),
        ((http.client.IncompleteRead, urllib3.exceptions.IncompleteRead), "the data broke off"),
        ((socket.gaierror,), "its name does not resolve"),
        ((http.client.BadStatusLine, http.client.UnknownProtocol), "its answer is not HTTP"),
        (
            (http.client.HTTPException, urllib3.exceptions.InvalidHeader),
            NO_HEADERS,
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
