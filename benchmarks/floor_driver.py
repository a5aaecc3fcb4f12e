# SPDX-License-Identifier: Apache-2.0
"""The floor: a download to nowhere with its digest, on two threads and with nothing else."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import queue
import threading
import urllib.parse
from typing import Any

from benchmarks import meter, serving


def _hash(chunks: queue.Queue[bytes | None], digest: Any) -> None:
    while (chunk := chunks.get()) is not None:
        digest.update(chunk)


class Driver:
    """A client of one Glance."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._netloc = urllib.parse.urlsplit(options.glance).netloc
        self._token = options.token

    def download(self, image_id: str, digest: str) -> dict[str, Any]:
        """Fetch the data over a new connection.

        :param digest: SHA-512 that it must have.
        """
        chunks: queue.Queue[bytes | None] = queue.Queue(8)
        found = hashlib.sha512()
        measured = meter.Meter()
        hasher = threading.Thread(target=_hash, args=(chunks, found))
        hasher.start()
        connection = http.client.HTTPConnection(self._netloc, timeout=60)
        try:
            connection.request("GET", f"/v2/images/{image_id}/file", headers={"X-Auth-Token": self._token})
            answer = connection.getresponse()
            while chunk := answer.read(2**20):
                chunks.put(chunk)
        finally:
            chunks.put(None)
            hasher.join()
            connection.close()
        measures = measured.read()
        if found.hexdigest() != digest:
            raise AssertionError(f"the digest is {found.hexdigest()} and not {digest}")
        return measures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--glance", required=True)
    parser.add_argument("--token", required=True)
    driver = Driver(parser.parse_args())
    serving.serve({"ready": dict, "download": driver.download})


if __name__ == "__main__":
    main()
