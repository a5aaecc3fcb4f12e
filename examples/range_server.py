# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server for one directory, with ranges, strong entity tags and a limited rate.

The standard library's own has no ranges. Every answered request is a line in the log:
``method path status bytes``. Usage: ``range_server.py DIRECTORY PORT BYTES_PER_SECOND LOG``.
"""

from __future__ import annotations

import http.server
import os
import re
import sys
import time
from typing import IO

#: Slices of a second in which the rate is kept.
_SLICES = 20


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET and HEAD for the files of one directory, by their names alone."""

    protocol_version = "HTTP/1.1"
    directory: str
    rate: int
    log: IO[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = os.path.join(self.directory, os.path.basename(self.path))
        if not os.path.isfile(path):
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            self._note(404, 0)
            return
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            tag = f'"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"'
            start, end = self._range(found.st_size, tag)
            partial = (start, end) != (0, found.st_size)
            self.send_response(206 if partial else 200)
            self.send_header("Content-Length", str(end - start))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", tag)
            if partial:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{found.st_size}")
            self.end_headers()
            sent = self._send(file, start, end) if with_body else 0
        self._note(206 if partial else 200, sent)

    def _range(self, size: int, tag: str) -> tuple[int, int]:
        """Return the first byte to send and the one behind the last: RFC 9110, one range, or all."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.headers.get("If-Range", tag) != tag or int(asked[1]) >= size:
            return 0, size
        return int(asked[1]), min(size, int(asked[2]) + 1) if asked[2] else size

    def _send(self, file: IO[bytes], start: int, end: int) -> int:
        began, position = time.monotonic(), start
        while position < end:
            count = min(self.rate // _SLICES, end - position)
            position += self.connection.sendfile(file, position, count)
            time.sleep(max(0.0, (position - start) / self.rate - (time.monotonic() - began)))
        return position - start

    def _note(self, status: int, sent: int) -> None:
        self.log.write(f"{self.command} {self.path} {status} {sent}\n")

    def log_message(self, *_arguments: object) -> None:
        """The log has its own format."""


def main() -> None:
    Handler.directory, Handler.rate = sys.argv[1], int(sys.argv[3])
    with open(sys.argv[4], "a", buffering=1) as Handler.log:  # written a line at a time
        http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()


if __name__ == "__main__":
    main()
