# SPDX-License-Identifier: Apache-2.0
"""A web server on loopback that serves data rightly, and fails on demand, for tests of sources that speak
HTTP::

    with BadServer() as server:
        url = server.put("/image", data, etag='"one"')
        server.fail("/image", truncated(1000), busy(503, retry_after=1))
        ...fetch the image: the first GET is cut off, the second is answered 503, the third rightly...
        ranges = [seen.headers.get("Range") for seen in server.requests("GET")]
        assert ranges == [None, "bytes=1000-", "bytes=1000-"]

It is HTTP/1.1 with keep-alive, single ranges, If-Range and entity tags (RFC 9110), over TLS if it is given a
certificate. What it fails with is a :data:`Fault`: a function of the request and of the right answer, which
returns the answer to give. :mod:`imagecache_lib.testing.http_faults` has the usual ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.client
import http.server
import itertools
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

#: What an answer does after its body.
KEEP, CLOSE, RESET, STALL, ENDLESS, DROP = "keep", "close", "reset", "stall", "endless", "drop"

_T = TypeVar("_T")
_PIECE = 2**16
_BODILESS = frozenset({204, 304})


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer.

    :param headers: beside Content-Length.
    :param body: what is sent after the headers. Of a HEAD only its length is.
    :param length: Content-Length; None for that of the body, -1 for no such header: then the body ends with
        the connection.
    :param after: what follows the body: ``keep`` the connection, ``close`` it, ``reset`` it, ``stall`` until
        the server ends, or go on ``endless``\\ ly. ``drop`` resets it before anything is sent.
    :param chunked: send the body with Transfer-Encoding: chunked and no length. ``close`` and ``reset`` leave
        out the last chunk.
    :param pause: seconds between pieces of the body.
    :param piece: bytes in each of these pieces.
    :param version: of HTTP, in the status line. After an answer of HTTP/1.0 the connection is closed.
    :param interim: statuses of interim answers before this one, such as 100 and 103. They may be endless, as
        may be the next ones.
    :param more_headers: further headers, behind all others.
    :param head_pause: seconds between the bytes of the status line and the headers.
    :param chunk_size: what is written as the size of each chunk instead of the size.
    :param trailers: headers behind the last chunk.
    """

    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    length: int | None = None
    after: str = KEEP
    chunked: bool = False
    pause: float = 0.0
    piece: int = _PIECE
    version: str = "HTTP/1.1"
    interim: Iterable[int] = ()
    more_headers: Iterable[tuple[str, str]] = ()
    head_pause: float = 0.0
    chunk_size: str | None = None
    trailers: Iterable[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Seen:
    """One request that a server saw. ``connection`` numbers its connection."""

    method: str
    path: str
    headers: Mapping[str, str]
    connection: int
    body: bytes = b""


#: Says what to answer instead of the right answer.
Fault = Callable[[Seen, Answer], Answer]
#: One answer, or how to compute it.
Script = Answer | Callable[[Seen], Answer]


def data_answer(
    data: bytes,
    seen: Seen,
    *,
    honour_range: bool = True,
    etag: str | None = None,
    content_type: str | None = None,
) -> Answer:
    """Return the answer to a GET or HEAD for data as RFC 9110 says, with one range and If-Range."""
    headers = {} if etag is None else {"ETag": etag}
    if content_type is not None:
        headers["Content-Type"] = content_type
    wanted = seen.headers.get("Range", "")
    if_range = seen.headers.get("If-Range")
    if not honour_range or not wanted.startswith("bytes=") or (if_range is not None and if_range != etag):
        return Answer(headers=headers, body=data)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, end = int(first), min(int(last or len(data)), len(data) - 1)
    if start >= len(data):
        return Answer(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
    return Answer(status=206, headers=headers, body=data[start : end + 1])


@dataclasses.dataclass
class _Planned:
    """A fault that is still to come: for one method or all, once or for ever."""

    fault: Fault
    method: str | None
    for_ever: bool


class BadServer:
    """An HTTP/1.1 server on loopback that answers rightly, or as it is told, and notes what it saw.

    A context manager: it serves during the ``with``, which yields the server itself. Safe to use from any
    thread.

    :param tls: the path of a PEM file with certificate and key, or None for plain HTTP.
    """

    def __init__(self, *, tls: str | None = None) -> None:
        self._lock = threading.Lock()
        self._scripts: dict[str, list[Script]] = {}
        self._faults: dict[str, list[_Planned]] = {}
        self._connections = 0
        #: Set when the server ends; what stalls waits for it.
        self.closing = threading.Event()
        #: Every request, in order. A test may clear it.
        self.seen: list[Seen] = []
        self._server = _Listener(("127.0.0.1", 0), functools.partial(_Connection, self))
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        scheme = "http" if tls is None else "https"
        #: Its address, without a final slash.
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> BadServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(
        self,
        path: str,
        data: bytes,
        *,
        etag: str | None = None,
        content_type: str | None = "application/octet-stream",
    ) -> str:
        """Serve data at a path, in the place of what was there. Returns its URL."""

        def right(seen: Seen) -> Answer:
            return data_answer(data, seen, etag=etag, content_type=content_type)

        self.script(path, right)
        return self.url + path

    def script(self, path: str, *answers: Script) -> None:
        """Answer requests for the path with these, one each; the last one stays."""
        with self._lock:
            self._scripts[path] = list(answers)

    def fail(self, path: str, *faults: Fault, method: str | None = "GET") -> None:
        """Spoil the next answers for a path, one with each fault.

        :param method: of the requests that count, or None for any.
        """
        with self._lock:
            planned = [_Planned(fault, method, for_ever=False) for fault in faults]
            self._faults.setdefault(path, []).extend(planned)

    def always_fail(self, path: str, *faults: Fault, method: str | None = None) -> None:
        """Spoil every answer for a path from now on, with all of the faults, one after the other.

        :param method: as in :meth:`fail`. The faults that :meth:`fail` planned come first.
        """
        with self._lock:
            planned = [_Planned(fault, method, for_ever=True) for fault in faults]
            self._faults.setdefault(path, []).extend(planned)

    def forget(self, path: str) -> None:
        """Spoil no more answers for a path."""
        with self._lock:
            self._faults.pop(path, None)

    def answer(self, seen: Seen) -> Answer:
        """Return the right answer to a request: 404 if its path has none. Subclasses may compute it."""
        with self._lock:
            queue = _of_path(self._scripts, seen.path)
            if not queue:
                return Answer(status=404)
            script = queue.pop(0) if len(queue) > 1 else queue[0]
        return script if isinstance(script, Answer) else script(seen)

    def requests(self, method: str | None = None, path: str | None = None) -> list[Seen]:
        """Return the requests of one method, or of any, and for one path, or for any, in order."""
        with self._lock:
            return [seen for seen in self.seen if method in (None, seen.method) and path in (None, seen.path)]

    def _answer(self, seen: Seen) -> Answer:
        with self._lock:
            self.seen.append(seen)
        answer = self.answer(seen)
        for fault in self._faults_for(seen):
            answer = fault(seen, answer)
        return answer

    def _faults_for(self, seen: Seen) -> Iterable[Fault]:
        with self._lock:
            planned = _of_path(self._faults, seen.path) or []
            fitting = [one for one in planned if one.method in (None, seen.method)]
            for one in fitting:
                if not one.for_ever:
                    planned.remove(one)
                    return [one.fault]
            return [one.fault for one in fitting]

    def _number_connection(self) -> int:
        with self._lock:
            self._connections += 1
            return self._connections


def _of_path(known: Mapping[str, list[_T]], path: str) -> list[_T] | None:
    """Return what is known of a path, or if there is nothing, of the path without its query."""
    return known.get(path) or known.get(path.partition("?")[0])


class SilentServer:
    """A server on loopback that takes connections and says nothing, not even what TLS begins with.

    A context manager, which yields the server itself.
    """

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        #: Its address, without a final slash. It is as silent to plain HTTP.
        self.url = f"https://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> SilentServer:
        return self  # the kernel takes the connections, and nobody the requests

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet: clients that go away are what is tested."""


class _Connection(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, owner: BadServer, *args: object) -> None:
        self._owner = owner
        self._number = owner._number_connection()
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:  # the name is http.server's
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self._owner._answer(Seen(self.command, self.path, dict(self.headers), self._number, body))
        with contextlib.suppress(OSError):
            self._send(answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def _send(self, answer: Answer) -> None:
        if answer.after == DROP:
            self._reset()
            return
        for line in self._head(answer):
            self._write_head(line.encode("latin-1") + b"\r\n", answer.head_pause)
        if self.command == "HEAD":
            return
        self._send_body(answer)
        if answer.after == RESET:
            self._reset()
        elif answer.after == STALL:
            self._owner.closing.wait()
        while answer.after == ENDLESS and not self._owner.closing.is_set():
            self._write(bytes(_PIECE), answer)

    def _head(self, answer: Answer) -> Iterator[str]:
        """Yield the lines before the body, the empty one included."""
        for status in answer.interim:
            yield f"{answer.version} {status} {http.client.responses.get(status, '')}"
            yield "Link: </style.css>; rel=preload"
            yield ""
        yield f"{answer.version} {answer.status} {http.client.responses.get(answer.status, '')}"
        headers = [("Server", self.version_string()), ("Date", self.date_time_string())]
        headers += answer.headers.items()
        length = len(answer.body) if answer.length is None else answer.length
        if answer.chunked:
            headers.append(("Transfer-Encoding", "chunked"))
        elif length >= 0 and answer.status not in _BODILESS:
            headers.append(("Content-Length", str(length)))
        if answer.after != KEEP or answer.version == "HTTP/1.0" or (length < 0 and not answer.chunked):
            self.close_connection = True
            headers.append(("Connection", "close"))
        for name, value in itertools.chain(headers, answer.more_headers):
            yield f"{name}: {value}"
        yield ""

    def _write_head(self, line: bytes, pause: float) -> None:
        if self._owner.closing.is_set():
            raise ConnectionAbortedError("the server ends")
        if not pause:
            self.wfile.write(line)
        for number in line if pause else b"":
            self.wfile.write(bytes((number,)))
            if self._owner.closing.wait(pause):
                return

    def _send_body(self, answer: Answer) -> None:
        # At once unless it is to be slow: a reset takes from the client what it has not read.
        piece = answer.piece if answer.pause else max(1, len(answer.body))
        for start in range(0, len(answer.body), piece):
            if start and self._owner.closing.wait(answer.pause):
                return
            self._write(answer.body[start : start + piece], answer)
        if answer.chunked and answer.after == KEEP:
            self.wfile.write(b"0\r\n")
            for name, value in answer.trailers:
                self._write_head(f"{name}: {value}\r\n".encode("latin-1"), answer.pause)
            self.wfile.write(b"\r\n")
        self.wfile.flush()

    def _write(self, piece: bytes, answer: Answer) -> None:
        if answer.chunked:
            size = f"{len(piece):x}" if answer.chunk_size is None else answer.chunk_size
            piece = b"%s\r\n%s\r\n" % (size.encode("latin-1"), piece)
        self.wfile.write(piece)

    def _reset(self) -> None:
        # Closing with a linger time of zero sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
