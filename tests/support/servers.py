# SPDX-License-Identifier: Apache-2.0
"""Real HTTP servers on loopback for the tests: a small Glance that misbehaves on demand, nginx."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import ipaddress
import json
import os
import pathlib
import socket
import subprocess
import urllib.parse
from collections.abc import Iterator

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from imagecache_lib.testing.bad_server import Answer, BadServer, Seen, data_answer
from tests.support import needs


class GlanceServer(BadServer):
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
    """A self-signed certificate for an address of loopback with its key, in one PEM file."""

    path: pathlib.Path

    @classmethod
    def make(
        cls, directory: pathlib.Path, *, days: tuple[int, int] = (-1, 1), address: str = "127.0.0.1"
    ) -> Certificate:
        """Make one that is valid between two days, which are counted from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + dt.timedelta(days=days[0]))
            .not_valid_after(now + dt.timedelta(days=days[1]))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False
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
