# SPDX-License-Identifier: Apache-2.0
"""Connections whose reads end: once the caller no longer waits, and where a server sends what is no data.

A timeout of requests and of http.client bounds the wait for the next bytes. It does not bound how many bytes
a server takes for the head of an answer, for interim answers before that (RFC 9110, section 15.2), or for
what lies between the data of a chunked one: sizes, extensions and trailers (RFC 9112, section 7.1). Each of
these must be here as a whole within the read timeout, and within :data:`MOST` bytes. Nor does anything there
look whether the caller still waits, or bound how many addresses of one name are tried.

An adapter of a session that the library makes has such connections. A session that the caller of the library
brings has its own; of the deadline, :func:`bounded` lets it know.
"""

from __future__ import annotations

import contextlib
import contextvars
import http.client
import io
import re
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import requests
import requests.adapters
import urllib3
import urllib3.connection
from urllib3.util import ssl_

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Most bytes of the head of an answer, interim answers included, and most bytes that are taken from the
#: connection for one piece of data. A piece is asked for in 1 MiB.
MOST = 2 * 2**20

#: Seconds between two looks whether the caller still waits, while nothing comes.
_SLICE = 0.5

#: So many addresses of one name are tried, each for the timeout of a connection.
MOST_ADDRESSES = 16

#: Chunks of chunked data may be many more than this only if they have so many bytes on average: each takes
#: its time, whatever is in it. Servers send KiB in each.
MANY_CHUNKS = 10_000
LEAST_PER_CHUNK = 256

#: A line before a chunk: its size, and extensions that nothing here knows.
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\n]*)?\r?\n")
_LONGEST_LINE = 2**16

#: 101 is no interim answer, but the last one of a protocol that ends with it.
_SWITCHING = 101

#: Shortest timeout in seconds: zero would not wait at all.
_SHORTEST = 0.01


class Caller(Protocol):
    """Whom a request is made for."""

    def check(self) -> None:
        """Raise if the caller no longer waits."""

    def seconds_left(self) -> float | None:
        """Return how long the caller waits yet, or None if that has no end."""


class TooSlow(TimeoutError):
    """What is no data came for longer than the read timeout."""


class TooMuch(http.client.HTTPException):
    """What is no data has more than :data:`MOST` bytes, or it is most of what comes."""


_caller: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("imagecache_caller", default=None)


@contextlib.contextmanager
def waiting(caller: Caller) -> Iterator[None]:
    """Say for whom the requests are made that are sent in the body, on this thread.

    An answer that comes in the body is read for the same caller, whenever and on which thread ever that is.
    """
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def bounded(timeout: tuple[float, float]) -> tuple[float, float]:
    """Return the timeouts for a connection and for a read, neither beyond the time that the caller waits.

    :param timeout: both in seconds.
    """
    caller = _caller.get()
    left = None if caller is None else caller.seconds_left()
    if left is None:
        return timeout
    left = max(left, _SHORTEST)
    return min(timeout[0], left), min(timeout[1], left)


class _Arriving(io.RawIOBase):
    """What comes in on a socket.

    :ivar cut_off: whether the connection ended without the alert that ends TLS, as where something on the way
        ends it.
    :param whole: the socket's own file, which keeps the socket open as long as it is.
    """

    def __init__(self, sock: socket.socket, whole: io.BufferedReader) -> None:
        self._socket = sock
        self._whole = whole
        self._caller = _caller.get()
        self._timeout = sock.gettimeout()
        self.cut_off = False
        if isinstance(sock, ssl.SSLSocket):
            # CPython asks for it at each read.
            sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]
        self.start()

    def start(self) -> None:
        """Allow the whole time and the most bytes once more: another piece is asked for."""
        # The timeouts of sockets are real time, whatever clock the host has.
        self._until = None if self._timeout is None else time.monotonic() + self._timeout
        self._amount = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while True:
            if self._caller is not None:
                self._caller.check()
            if self._amount > MOST:
                raise TooMuch(f"more than {MOST} bytes that are no data")
            self._socket.settimeout(self._next_slice())
            try:
                count = self._socket.recv_into(buffer)
            except TimeoutError:
                continue
            except ssl.SSLError as error:
                # The reason is what CPython before 3.11.3 tells of it.
                if not isinstance(error, ssl.SSLEOFError) and error.reason != _BROKE_OFF:
                    raise
                self.cut_off = True
                return 0
            finally:
                self._socket.settimeout(self._timeout)
            self._amount += count
            return count

    def _next_slice(self) -> float:
        if self._until is None:
            return _SLICE
        left = self._until - time.monotonic()
        if left > 0:
            return min(left, _SLICE)
        if self._amount:
            raise TooSlow
        raise TimeoutError("timed out")

    def close(self) -> None:
        self._whole.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer that is read with the bounds of this module. Interim answers are passed over."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._arriving = _Arriving(sock, self.fp)
        self._chunks = self._in_chunks = 0
        self.fp = io.BufferedReader(self._arriving)

    @property
    def was_cut_off(self) -> bool:
        """Whether the connection ended without the alert that ends TLS."""
        return self._arriving.cut_off

    def begin(self) -> None:
        super().begin()
        while 100 <= self.status < 200 and self.status != _SWITCHING:
            self.headers = None  # type: ignore[assignment]  # so that it begins anew
            super().begin()
        coding = self.headers.get("Transfer-Encoding", "")
        if not self.chunked and coding.rstrip(" \t").lower() == "chunked":
            # http.client takes what may stand behind a value for a part of it: RFC 9112, section 5.
            self.headers.replace_header("Transfer-Encoding", "chunked")
            self.chunked = True
            self.chunk_left = self.length = None
            self.will_close = self._check_close()  # type: ignore[attr-defined]

    def _read_next_chunk_size(self) -> int:
        # int() takes more than the digits of a size, and a line that broke off may begin with a 0, which is
        # the size of the last chunk: RFC 9112, section 7.1.
        line: bytes = self.fp.readline(_LONGEST_LINE)
        found = _CHUNK_SIZE.fullmatch(line)
        if found is None:
            self._close_conn()  # type: ignore[attr-defined]  # as where int() refuses it
            raise ValueError(line[:20])
        size = int(found[1], 16)
        self._chunks += 1
        self._in_chunks += size
        if self._chunks > max(MANY_CHUNKS, self._in_chunks // LEAST_PER_CHUNK):
            raise TooMuch(f"{self._chunks} chunks have {self._in_chunks} bytes")
        return size

    def read1(self, n: int = -1) -> bytes:
        self._arriving.start()
        return super().read1(n)

    def read(self, amt: int | None = None) -> bytes:
        self._arriving.start()
        return super().read(amt)


def was_cut_off(response: requests.Response) -> bool:
    """Return whether the data of an answer ended with a connection that TLS did not end.

    Of a session that the caller of the library brings, this is not known.
    """
    answer = getattr(response.raw, "_original_response", None)
    return isinstance(answer, _Answer) and answer.was_cut_off


#: CPython before 3.11.3 has OpenSSL 3 take a connection that broke off for one that TLS ended:
#: https://github.com/python/cpython/issues/95494.
_TAKES_ANY_END = sys.version_info < (3, 11, 3)


_BROKE_OFF = "UNEXPECTED_EOF_WHILE_READING"


class HttpConnection(urllib3.connection.HTTPConnection):
    """A connection as this module describes them."""

    response_class = _Answer

    def addresses(self) -> list[str]:
        """Return the addresses that the host's name stands for, in the order in which they are tried.

        :raises OSError: the name does not resolve.
        """
        family = urllib3.util.connection.allowed_gai_family()
        found = socket.getaddrinfo(self._dns_host.strip("[]"), self.port, family, socket.SOCK_STREAM)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    def _new_conn(self) -> socket.socket:
        # urllib3 tries all of them, each for the whole timeout: hours, if whoever answers for the name wills.
        name, whole, caller = self._dns_host, self.timeout, _caller.get()
        try:
            addresses = self.addresses()[:MOST_ADDRESSES]
        except (OSError, UnicodeError):
            return super()._new_conn()  # which says what is wrong with the name
        try:
            for left, address in zip(reversed(range(len(addresses))), addresses, strict=True):
                if caller is not None:
                    caller.check()
                if isinstance(whole, float | int):
                    self.timeout = bounded((whole, whole))[0]
                self._dns_host = address
                try:
                    return super()._new_conn()
                except urllib3.exceptions.HTTPError:
                    if not left:
                        raise
            raise AssertionError("a name that resolves has an address")
        finally:
            self._dns_host, self.timeout = name, whole


class _HttpsConnection(HttpConnection, urllib3.connection.HTTPSConnection):
    def connect(self) -> None:
        if _TAKES_ANY_END:
            if self.ssl_context is None:
                required = ssl_.resolve_cert_reqs(self.cert_reqs)
                self.ssl_context = ssl_.create_urllib3_context(cert_reqs=required)
            self.ssl_context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        super().connect()


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = HttpConnection


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


class Adapter(requests.adapters.HTTPAdapter):
    """The transport of a requests session, with connections as this module describes them."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self._use_pools(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        if not proxy.lower().startswith("socks"):
            self._use_pools(manager)
        return manager

    def _use_pools(self, manager: urllib3.PoolManager) -> None:
        manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
