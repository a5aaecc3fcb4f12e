# SPDX-License-Identifier: Apache-2.0
"""The source that asks another host's cache, against hosts that say what makes no sense."""

from __future__ import annotations

import json
import unittest

from imagecache_lib.sources.interface import SourceRefused
from imagecache_lib.sources.peer import PeerSource, path_of
from imagecache_lib.testing.bad_server import Answer, BadServer

GOOD: dict[str, object] = {
    "format": "raw",
    "source_format": "raw",
    "size": 512,
    "virtual_size": 512,
    "digest": {"algorithm": "sha256", "value": "0" * 64},
}


class TestNonsense(unittest.TestCase):
    def test_is_told_as_the_peers(self) -> None:
        server = self.enterContext(BadServer())
        source = PeerSource(server.url, token="secret")
        server.script(path_of("x"), Answer(body=json.dumps(GOOD).encode()))
        self.assertEqual(512, source.describe("x").size)
        documents: tuple[object, ...] = (
            b"",
            b"<html>",
            b"\xff\xfe",
            b"[" * 60_000,
            b'{"a":' * 10_000,
            [],
            None,
            {**GOOD, "size": float("inf")},
            {**GOOD, "virtual_size": float("nan")},
            {**GOOD, "size": -1},
            {**GOOD, "virtual_size": -1},
            {**GOOD, "digest": None},
            {**GOOD, "digest": {"algorithm": "crc32", "value": "00"}},
            {**GOOD, "digest": {"algorithm": "sha256", "value": "00"}},
        )
        for document in documents:
            body = document if isinstance(document, bytes) else json.dumps(document).encode()
            server.script(path_of("x"), Answer(body=body))
            with self.subTest(body=body[:80]), self.assertRaisesRegex(SourceRefused, "peer's answer"):
                source.describe("x")
