# SPDX-License-Identifier: Apache-2.0
"""A real nginx that serves a directory: Range, strong ETags, and as slow as a test wants it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import subprocess
from collections.abc import Iterator

from tests.lab import server
from tests.support import needs
from tests.support.ports import free_port

_CONFIGURATION = """
daemon off;
worker_processes 1;
error_log {home}/error.log;
pid {home}/nginx.pid;
user {user};
events {{ worker_connections 256; }}
http {{
    log_format lab escape=json
        '{{"method": "$request_method", "path": "$uri", "status": $status, "range": "$http_range", '
        '"if_range": "$http_if_range", "sent": $body_bytes_sent}}';
    access_log {home}/access.log lab;
    default_type application/octet-stream;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    server {{
        listen 127.0.0.1:{port}{tls};
        root {root};
        {certificate}
        {extra}
        location /slow/ {{ alias {root}/; limit_rate {rate}; }}
        location /no-range/ {{ alias {root}/; max_ranges 0; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
    }}
}}
"""


@dataclasses.dataclass(frozen=True)
class Answered:
    """One request as nginx logged it, when it was done with it.

    :param range: the Range header, empty if there was none.
    :param if_range: the If-Range header, likewise.
    :param sent: bytes of the body.
    """

    method: str
    path: str
    status: int
    range: str
    if_range: str
    sent: int


@dataclasses.dataclass(frozen=True)
class Nginx:
    """A running nginx.

    The files of ``root`` are at ``/``; at ``/slow/`` they come slowly, at ``/no-range/`` without Range, and
    ``/moved/`` redirects to ``/``.

    :param url: without a final slash.
    :param root: the directory it serves.
    :param certificate: for TLS, the file with its self-signed certificate.
    """

    url: str
    root: pathlib.Path
    home: pathlib.Path
    certificate: pathlib.Path | None = None

    def answered(self, path: str, *, at_least: int = 1) -> list[Answered]:
        """Return what was logged for a path, once that many requests were.

        nginx logs a request after it sent the answer, so the client may be first.

        :raises TimeoutError: there are not as many.
        """

        def logged() -> list[Answered]:
            lines = (self.home / "access.log").read_text().splitlines()
            entries = [Answered(**json.loads(line)) for line in lines]
            return [entry for entry in entries if entry.path == path]

        server.wait_until(lambda: len(logged()) >= at_least, f"nginx logs {path}", seconds=120)
        return logged()


@contextlib.contextmanager
def running_nginx(
    home: pathlib.Path, *, tls: bool = False, rate: str = "256k", extra: str = ""
) -> Iterator[Nginx]:
    """Run an nginx for the length of the context.

    :param home: an existing, empty directory for all it writes; it serves ``home/root``.
    :param tls: speak https, with a certificate for 127.0.0.1 that it signed itself.
    :param rate: bytes a second for ``/slow/``, per connection, after nginx's manner.
    :param extra: more of a server's configuration.
    """
    program = needs.program("nginx")
    root = home / "root"
    root.mkdir()
    port = free_port()
    certificate = _self_signed(home) if tls else None
    configuration = home / "nginx.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            home=home,
            # The master is root in CI, and its worker must reach files that pytest keeps to its user.
            user=pathlib.Path(home).owner(),
            port=port,
            tls=" ssl" if tls else "",
            certificate=f"ssl_certificate {certificate}; ssl_certificate_key {home}/key.pem;" if tls else "",
            root=root,
            rate=rate,
            extra=extra,
        )
    )
    (home / "access.log").touch()
    command = [program, "-c", str(configuration), "-e", str(home / "error.log"), "-p", str(home)]
    with server.running(command, ready=lambda: server.listens(port), log=home / "output.log"):
        yield Nginx(f"{'https' if tls else 'http'}://127.0.0.1:{port}", root, home, certificate)


def _self_signed(home: pathlib.Path) -> pathlib.Path:
    certificate = home / "certificate.pem"
    subprocess.run(
        [
            needs.program("openssl"),
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            home / "key.pem",
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    return certificate
