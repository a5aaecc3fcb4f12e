# SPDX-License-Identifier: Apache-2.0
"""One host's cache as another's second chance: who may ask, what is believed, and what is recorded."""

from __future__ import annotations

import hashlib
import os
import unittest
from collections.abc import Mapping

import requests

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.precache.peer import PeerServer
from imagecache_lib.sources.interface import SourceRefused
from imagecache_lib.sources.peer import PeerSource, path_of
from imagecache_lib.testing.source_contract import SourceContract
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, OTHER_ID, CacheCase, disk_image, raw_image

TOKEN = "a-secret-of-the-peers"


class PeerCase(CacheCase):
    """A peer that has some images, and a host that has none and an image service without them."""

    def setUp(self) -> None:
        super().setUp()
        self.qcow2 = disk_image(self.directory, "qcow2", data=raw_image(2))
        there = self.directory / "there"
        there.mkdir()
        raw, qcow2 = FakeSource({ID: raw_image(1)}), FakeSource({OTHER_ID: self.qcow2}, disk_format="qcow2")
        self.peer = self.manager(raw, instances_path=str(there))
        self.peer.cache_image(ID)
        self.peer.cache_image(OTHER_ID, request=ic.Request(source=qcow2))
        self.url = self.serve(self.peer)
        self.source = FakeSource({})

    def serve(self, peer: ic.ImageCacheManager) -> str:
        server = PeerServer(peer, ("127.0.0.1", 0), token=TOKEN)
        server.start()
        self.addCleanup(server.stop)
        return f"http://127.0.0.1:{server.port}"

    def get(self, path: str, **headers: str) -> requests.Response:
        return requests.get(
            self.url + path, headers={"Authorization": f"Bearer {TOKEN}", **headers}, timeout=10
        )

    def request(self, *, trusted: bool = True) -> ic.Request:
        return ic.Request(fallbacks=(PeerSource(self.url, token=TOKEN, trusted=trusted),))


class FallbackTest(PeerCase):
    def test_gone_from_the_service_and_there_at_a_peer(self) -> None:
        self.assertEqual(raw_image(1), self.spawn(self.manager(), request=self.request()))
        shown = self.manager().show_base(ID)
        assert shown is not None
        self.assertEqual(hashlib.sha512(raw_image(1)).hexdigest(), shown.digest and shown.digest.value)

    def test_a_converted_base_is_recorded_as_one(self) -> None:
        manager = self.manager()
        self.assertEqual(raw_image(2), self.spawn(manager, OTHER_ID, request=self.request()))
        shown = manager.show_base(OTHER_ID)
        assert shown is not None
        self.assertEqual(("qcow2", "raw", None), (shown.source_format, shown.stored_format, shown.digest))
        with self.assertRaises(errors.ImageNotFound):
            manager.fetch_file(OTHER_ID, str(self.instances / "kernel"), request=self.request())

    def test_what_an_untrusted_peer_says_of_its_content_proves_nothing(self) -> None:
        manager = self.manager()
        manager.cache_image(ID, request=self.request(trusted=False))
        shown = manager.show_base(ID)
        assert shown is not None
        self.assertIsNone(shown.digest)

    def test_content_that_rotted_at_the_peer_is_refused(self) -> None:
        with self.peer.lease_cached(ID) as held, open(held.path, "r+b") as file:
            file.write(b"rot")
        with self.assertRaisesRegex(errors.ImageRejected, "sha512"):
            self.manager().cache_image(ID, request=self.request())
        self.assertEqual([], self.in_flight())

    def test_what_the_peer_does_not_have_either_is_not_found(self) -> None:
        with self.assertRaises(errors.ImageNotFound):
            self.manager().cache_image("neither-here-nor-there", request=self.request())

    def test_a_peer_that_is_gone_changes_nothing_of_the_answer(self) -> None:
        request = ic.Request(fallbacks=(PeerSource("http://127.0.0.1:9", token=TOKEN),))
        with self.assertRaises(errors.ImageNotFound):
            self.manager().cache_image(ID, request=request)


class ServerTest(PeerCase):
    def test_only_who_has_the_token_is_served(self) -> None:
        for wrong in ("", "Bearer", "Bearer wrong", f"bearer {TOKEN}x", f"Basic {TOKEN}"):
            with self.subTest(wrong=wrong):
                self.assertEqual(401, self.get(path_of(ID), Authorization=wrong).status_code)
                self.assertEqual(401, self.get(f"{path_of(ID)}/data", Authorization=wrong).status_code)
        with self.assertRaises(SourceRefused):
            PeerSource(self.url, token="another").describe(ID)

    def test_a_token_that_can_be_guessed_is_refused(self) -> None:
        with self.assertRaises(errors.ConfigError):
            PeerServer(self.peer, ("127.0.0.1", 0), token="short")

    def test_ipv6(self) -> None:
        server = PeerServer(self.peer, ("::1", 0), token=TOKEN)
        server.start()
        self.addCleanup(server.stop)
        found = PeerSource(f"http://[::1]:{server.port}", token=TOKEN).describe(ID)
        self.assertEqual(len(raw_image()), found.size)

    def test_only_images_in_the_cache_have_a_path(self) -> None:
        for path in (
            "/",
            "/etc/passwd",
            "/v1/images/",
            "/v1/images/..%2f",
            "/v1/images/a",
            path_of("absent"),
            f"{path_of(ID)}/data/../..",
            f"{path_of(ID)}?x",
            path_of("../../etc/passwd"),
        ):
            with self.subTest(path=path):
                self.assertEqual(404, self.get(path).status_code)

    def test_asking_for_what_is_not_there_fetches_nothing(self) -> None:
        self.get(path_of("absent"))
        self.assertEqual(2, len(self.peer.list_bases()))

    def test_nothing_that_nobody_checked_is_served(self) -> None:
        with self.peer.lease_cached(ID) as held:
            path = held.path
        os.unlink(path)
        with open(path, "wb") as file:
            file.write(raw_image(3))
        self.assertEqual(404, self.get(path_of(ID)).status_code)
        self.assertTrue(os.path.exists(path))

    def test_ranges(self) -> None:
        path, data = f"{path_of(ID)}/data", raw_image(1)
        tag = self.get(path_of(ID)).headers["ETag"]
        for asked, status, content in (
            ("bytes=100-", 206, data[100:]),
            ("bytes=100-199", 206, data[100:200]),
            (f"bytes={len(data) - 1}-", 206, data[-1:]),
            (f"bytes=5-{10 * len(data)}", 206, data[5:]),
            (f"bytes={len(data)}-", 416, b""),
            ("bytes=9-5", 416, b""),
            ("bytes=-5", 200, data),
            ("bytes=0-1,5-6", 200, data),
        ):
            with self.subTest(asked=asked):
                found = self.get(path, Range=asked)
                self.assertEqual((status, content), (found.status_code, found.content))
        self.assertEqual(206, self.get(path, **{"Range": "bytes=1-", "If-Range": tag}).status_code)
        self.assertEqual(200, self.get(path, **{"Range": "bytes=1-", "If-Range": '"other"'}).status_code)

    def test_a_head_has_no_body(self) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with requests.Session() as session:
            for _time in range(2):
                found = session.head(f"{self.url}{path_of(ID)}/data", headers=headers, timeout=60)
                self.assertEqual(
                    (200, str(len(raw_image()))), (found.status_code, found.headers["Content-Length"])
                )

    def test_answers_that_make_no_sense_are_refused(self) -> None:
        class Odd(PeerSource):
            def say(self, told: bytes) -> None:
                response = requests.Response()
                response.url = "http://peer/"
                self._image(ID, told, response)

        odd = Odd(self.url, token=TOKEN)
        good = '{"format": "raw", "source_format": "raw", "size": 1, "virtual_size": 1, "digest": %s}'
        for told in (
            b"",
            b"[]",
            b"{}",
            (good % "null").encode(),
            (good % '{"algorithm": "md5", "value": "00"}').encode(),
            (good % '{"algorithm": "sha256", "value": "x"}').encode(),
        ):
            with self.subTest(told=told), self.assertRaises(SourceRefused):
                odd.say(told)


class PeerContractTest(SourceContract, CacheCase):  # type: ignore[misc]  # both have a "source"; its setter is ours
    """A peer's cache is a source like any other."""

    def make_source(self, images: Mapping[str, bytes]) -> PeerSource:
        there = self.manager(FakeSource(images), disable_deep_image_inspection=True)
        for image_id, data in images.items():
            if data:
                there.cache_image(image_id)
        server = PeerServer(there, ("127.0.0.1", 0), token=TOKEN)
        server.start()
        self.addCleanup(server.stop)
        return PeerSource(f"http://127.0.0.1:{server.port}", token=TOKEN, trusted=True)

    def test_an_image_without_a_byte_has_no_chunks(self) -> None:
        self.skipTest("no cache has an image without a byte")


if __name__ == "__main__":
    unittest.main()
