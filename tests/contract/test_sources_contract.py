# SPDX-License-Identifier: Apache-2.0
"""Every source that this library has, against the contract that any source must meet."""

from __future__ import annotations

import hashlib
import pathlib
import tempfile
import unittest
from collections.abc import Mapping

from imagecache_lib import model
from imagecache_lib.sources.file import FileImage, FileSource
from imagecache_lib.sources.glance import GlanceSource
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.testing.bad_server import BadServer
from imagecache_lib.testing.http_contract import HttpSourceContract
from imagecache_lib.testing.source_contract import SourceContract
from imagecache_lib.testing.sources import FakeSource
from tests.support import servers


def _digest(data: bytes) -> model.Digest:
    return model.Digest("sha256", hashlib.sha256(data).hexdigest())


class TestFakeSource(SourceContract, unittest.TestCase):
    def make_source(self, images: Mapping[str, bytes]) -> ImageSource:
        return FakeSource(images)


class TestFileSource(SourceContract, unittest.TestCase):
    def make_source(self, images: Mapping[str, bytes]) -> ImageSource:
        directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        table = {}
        for image_id, data in images.items():
            path = directory / hashlib.sha1(image_id.encode()).hexdigest()
            path.write_bytes(data)
            table[image_id] = FileImage(path, "raw", _digest(data))
        return FileSource(table)


class TestHttpSourceOnNginx(SourceContract, unittest.TestCase):
    root: pathlib.Path
    url: str

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.root, work = directory / "root", directory / "work"
        cls.root.mkdir()
        work.mkdir()
        cls.url = cls.enterClassContext(servers.nginx(cls.root, work))

    def make_source(self, images: Mapping[str, bytes]) -> ImageSource:
        table = {}
        for image_id, data in images.items():
            name = hashlib.sha1(image_id.encode()).hexdigest()
            (self.root / name).write_bytes(data)
            table[image_id] = HttpImage(f"{self.url}/{name}", "raw")
        return HttpSource(table)

    def test_resumes_without_a_digest_because_nginx_sends_strong_entity_tags(self) -> None:
        image = self.source.describe(next(iter(self.images)))
        self.assertIsNone(image.digest)
        self.assertTrue(self.source.can_resume(image))
        self.assertEqual(self.data[1000:], self.read(image, 1000))


class TestHttpSource(HttpSourceContract, unittest.TestCase):
    def make_http_source(self, server: BadServer, images: Mapping[str, bytes]) -> ImageSource:
        table = {
            image_id: HttpImage(server.put(self.data_path(image_id), data, etag='"one"'), "raw")
            for image_id, data in images.items()
        }
        return HttpSource(table, timeout=(60.0, 5.0))

    def data_path(self, image_id: str) -> str:
        return f"/{image_id}.img"


class TestHttpSourceWithDigests(TestHttpSource):
    def make_http_source(self, server: BadServer, images: Mapping[str, bytes]) -> ImageSource:
        table = {
            image_id: HttpImage(server.put(self.data_path(image_id), data), "raw", _digest(data))
            for image_id, data in images.items()
        }
        return HttpSource(table, timeout=(60.0, 5.0))


class TestGlanceSource(HttpSourceContract, unittest.TestCase):
    def make_source(self, images: Mapping[str, bytes]) -> ImageSource:
        self.server = server = self.enterContext(servers.GlanceServer(token="good"))
        for image_id, data in images.items():
            server.add(image_id, data)
        return GlanceSource(server.url, token="good", timeout=(60.0, 5.0))

    def data_path(self, image_id: str) -> str:
        return f"/v2/images/{image_id}/file"
