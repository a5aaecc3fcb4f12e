# SPDX-License-Identifier: Apache-2.0
"""A plain web server on loopback that costs little: the kernel sends the files of one directory."""

from __future__ import annotations

import contextlib
import http.server
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.serving import ROOT

_TICKS = os.sysconf("SC_CLK_TCK")
_STEP = 2**20


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    directory = "."

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, *, send: bool) -> None:
        with open(os.path.join(self.directory, os.path.basename(self.path)), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.send_header("ETag", f'"{size}"')
            self.end_headers()
            self.wfile.flush()
            sent = 0 if send else size
            while sent < size:
                sent += os.sendfile(self.connection.fileno(), file.fileno(), sent, min(_STEP, size - sent))

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


class Server:
    """The server's process as its clients see it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self._port = port

    def url(self, name: str) -> str:
        """Return the address of a file."""
        return f"http://127.0.0.1:{self._port}/{name}"

    def cpu(self) -> float:
        """Return the seconds of processor time that it has taken so far."""
        fields = pathlib.Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


@contextlib.contextmanager
def running(directory: pathlib.Path) -> Iterator[Server]:
    """Serve the files of a directory, and yield the server."""
    command = [sys.executable, "-m", "benchmarks.loopback", str(directory)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(process, int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    _Handler.directory = sys.argv[1]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
