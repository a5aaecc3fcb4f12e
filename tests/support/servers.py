# SPDX-License-Identifier: Apache-2.0
"""Real HTTP servers on loopback for the tests: one that misbehaves on demand, a small Glance, nginx."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import hashlib
import http.server
import ipaddress
import json
import os
import pathlib
import socket
import ssl
import struct
import subprocess
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support import needs


@dataclasses.dataclass(frozen=True)
class Answer:
    """One scripted answer.

    :param body: what is sent after the headers.
    :param length: Content-Length: None: that of the body; -1: none, the end of the connection is the end.
    :param after: what follows the body: ``keep`` the connection, ``close`` it, ``reset`` it, ``stall`` until
        the server ends, or go on ``endless``\\ ly. ``drop`` resets it before anything is sent.
    """

    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    length: int | None = None
    after: str = "keep"


@dataclasses.dataclass(frozen=True)
class Seen:
    """One request that a server saw. ``connection`` numbers its connection."""

    method: str
    path: str
    headers: Mapping[str, str]
    connection: int
    body: bytes = b""


def data_answer(data: bytes, seen: Seen, *, honour_range: bool = True, etag: str | None = None) -> Answer:
    """Answer a GET or HEAD for data as RFC 9110 says, with one range and If-Range."""
    headers = {} if etag is None else {"ETag": etag}
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


Script = Answer | Callable[[Seen], Answer]


class Server:
    """An HTTP/1.1 server on loopback that answers as scripted, and notes what it saw."""

    def __init__(self, *, tls: Certificate | None = None) -> None:
        self._lock = threading.Lock()
        self._scripts: dict[str, list[Script]] = {}
        self._connections = 0
        self.closing = threading.Event()
        self.seen: list[Seen] = []
        handler = functools.partial(_Connection, self)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.path)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def script(self, path: str, *answers: Script) -> None:
        """Answer requests for the path with these, one each; the last one stays."""
        with self._lock:
            self._scripts[path] = list(answers)

    def answer(self, seen: Seen) -> Answer:
        """Return what a request is answered with. Subclasses may compute it."""
        with self._lock:
            queue = self._scripts.get(seen.path)
            if not queue:
                return Answer(status=404)
            script = queue.pop(0) if len(queue) > 1 else queue[0]
        return script if isinstance(script, Answer) else script(seen)

    def note(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    def number_connection(self) -> int:
        with self._lock:
            self._connections += 1
            return self._connections

    def requests(self, method: str | None = None) -> list[Seen]:
        """Return what was asked, of one method or all."""
        with self._lock:
            return [seen for seen in self.seen if method in (None, seen.method)]


class _Connection(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, owner: Server, *args: object) -> None:
        self._owner = owner
        self._number = owner.number_connection()
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:  # the name is http.server's
        self._answer()

    def do_HEAD(self) -> None:  # the name is http.server's
        self._answer()

    def do_POST(self) -> None:  # the name is http.server's
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen = Seen(self.command, self.path, dict(self.headers), self._number, body)
        self._owner.note(seen)
        answer = self._owner.answer(seen)
        with contextlib.suppress(OSError):
            self._send(answer)

    def _send(self, answer: Answer) -> None:
        if answer.after == "drop":
            self._reset()
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        length = len(answer.body) if answer.length is None else answer.length
        if length >= 0 and answer.status not in (204, 304):
            self.send_header("Content-Length", str(length))
        if answer.after != "keep":
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(answer.body)
        self.wfile.flush()
        if answer.after == "reset":
            self._reset()
        elif answer.after == "stall":
            self._owner.closing.wait()
        while answer.after == "endless" and not self._owner.closing.is_set():
            self.wfile.write(bytes(2**16))

    def _reset(self) -> None:
        # Closing with a linger time of zero sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


class GlanceServer(Server):
    """The part of Glance's v2 API that reads images, faithful in statuses and headers.

    :param token: if given, requests with another X-Auth-Token get 401.
    """

    def __init__(self, *, token: str | None = None) -> None:
        super().__init__()
        self._token = token
        self._images: dict[str, tuple[dict[str, object], bytes | None]] = {}

    def __enter__(self) -> GlanceServer:
        super().__enter__()
        return self

    def add(self, image_id: str, data: bytes | None, **metadata: object) -> None:
        """Store an image; without data it is queued. Metadata overwrite what would be computed."""
        document: dict[str, object] = {
            "id": image_id,
            "name": image_id,
            "status": "queued" if data is None else "active",
            "disk_format": "raw",
            "container_format": "bare",
            "visibility": "public",
            "os_hidden": False,
            "tags": [],
            "min_disk": 0,
            "size": None,
            "virtual_size": None,
            "checksum": None,
            "os_hash_algo": None,
            "os_hash_value": None,
            "stores": "fast",
        }
        if data is not None:
            document |= {
                "size": len(data),
                "checksum": hashlib.md5(data).hexdigest(),
                "os_hash_algo": "sha512",
                "os_hash_value": hashlib.sha512(data).hexdigest(),
            }
        self._images[image_id] = (document | metadata, data)

    def answer(self, seen: Seen) -> Answer:
        if seen.path in self._scripts:
            return super().answer(seen)
        if self._token is not None and seen.headers.get("X-Auth-Token") != self._token:
            return Answer(status=401)
        # As WSGI servers do, unquote before the routes are matched.
        parts = urllib.parse.unquote(urllib.parse.urlsplit(seen.path).path).split("/")
        if parts[:3] != ["", "v2", "images"] or len(parts) not in (4, 5) or parts[3] not in self._images:
            return Answer(status=404)
        document, data = self._images[parts[3]]
        if parts[4:] == []:
            headers = {"Content-Type": "application/json; charset=UTF-8"}
            return Answer(headers=headers, body=json.dumps(document).encode())
        if parts[4:] != ["file"]:
            return Answer(status=404)
        if seen.method != "GET":
            return Answer(status=405)
        if data is None:
            return Answer(status=204)
        return data_answer(data, seen)


@contextlib.contextmanager
def nginx(root: pathlib.Path, work: pathlib.Path) -> Iterator[str]:
    """Serve a directory with nginx as a child process; yields its URL.

    Where nginx is lacking, the test ends: :mod:`tests.support.needs`.
    """
    command = needs.program("nginx")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        user = "user root;" if os.geteuid() == 0 else ""
        config = work / "nginx.conf"
        config.write_text(
            f"daemon off; worker_processes 1; {user} pid {work}/pid; error_log {work}/error.log;\n"
            "events { worker_connections 256; }\n"
            f"http {{ access_log off; client_body_temp_path {work}/body; proxy_temp_path {work}/proxy;\n"
            f"fastcgi_temp_path {work}/fastcgi; uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;\n"
            f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
        )
        # nginx takes over listening sockets that this variable names. So it is ready before it has started:
        # connections wait in the backlog.
        child = subprocess.Popen(
            [command, "-c", str(config), "-p", str(work), "-e", f"{work}/error.log"],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
            pass_fds=[listener.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        child.terminate()
        child.wait()


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A self-signed certificate for 127.0.0.1 with its key, in one PEM file."""

    path: pathlib.Path

    @classmethod
    def make(cls, directory: pathlib.Path) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
            .sign(key, hashes.SHA256())
        )
        path = directory / "server.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
        return cls(path)
