# SPDX-License-Identifier: Apache-2.0
"""A stand-in for Neutron without networks: whatever a list is asked of is empty, and nothing can be made."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        collection = urllib.parse.urlsplit(self.path).path.rstrip("/").rpartition("/")[2]
        self._answer(200, {collection.removesuffix(".json").replace("-", "_"): []})

    def do_POST(self) -> None:
        self._answer(404, {"NeutronError": {"type": "NotFound", "message": "there are no networks here"}})

    do_PUT = do_DELETE = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def running_neutron() -> Iterator[str]:
    """Run it for the length of the context; yield its endpoint."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as running:
        running.daemon_threads = True
        serving = threading.Thread(target=running.serve_forever, daemon=True)
        serving.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()
            serving.join()
