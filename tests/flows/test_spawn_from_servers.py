# SPDX-License-Identifier: Apache-2.0
"""Spawns from servers and files that tell something wrong beside good data: the disk is right."""

from __future__ import annotations

import os
import random

from imagecache_lib import errors
from imagecache_lib.sources.file import FileImage, FileSource
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import BadServer
from tests.support.cache_case import MIB, CacheCase, disk_image, raw_image

IMAGE = "served"


def _read_by_this_process() -> int:
    with open("/proc/self/io") as lines:
        return int(next(line for line in lines if line.startswith("rchar")).split()[1])


class TestServers(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.server = self.enterContext(BadServer())

    def serve(self, data: bytes, disk_format: str) -> HttpSource:
        url = self.server.put("/image", data)
        return HttpSource({IMAGE: HttpImage(url, disk_format)}, timeout=(5.0, 5.0))

    def test_a_head_that_tells_another_length(self) -> None:
        for format in ("raw", "qcow2", "vmdk"):
            data = raw_image(1) if format == "raw" else disk_image(self.directory, format)
            manager = self.manager(self.serve(data, format), num_retries=0)
            wanted = self.spawn(manager, IMAGE)
            for length in (0, 1000, len(data) - 1, len(data) + MIB):
                with self.subTest(format=format, length=length):
                    manager.evict_image(IMAGE)
                    self.server.fail("/image", faults.length_told(length), method="HEAD")
                    self.assertEqual(wanted, self.spawn(manager, IMAGE))

    def test_a_document_instead_of_the_image_is_not_cached(self) -> None:
        manager = self.manager(self.serve(b"<html>gone</html>", "raw"))
        self.server.always_fail("/image", faults.document())
        with self.assertRaisesRegex(errors.SourceError, "text/html"):
            manager.cache_image(IMAGE)
        self.assertFalse(manager.is_cached(IMAGE))


class TestSparseFiles(CacheCase):
    def test_a_sparse_file_is_read_by_its_data(self) -> None:
        path = self.directory / "sparse.raw"
        data = random.Random(8).randbytes(MIB)
        with open(path, "wb") as file:
            file.truncate(2**31)
            for offset in (5 * MIB, 2**30 + 4096, 2**31 - MIB):
                file.seek(offset)
                file.write(data)
        manager = self.manager(FileSource({IMAGE: FileImage(path, "raw")}))
        before = _read_by_this_process()
        manager.cache_image(IMAGE)
        self.assertLess(_read_by_this_process() - before, 64 * MIB)
        with manager.fetch_or_reuse(IMAGE) as base:
            self.assertEqual(2**31, os.stat(base.path).st_size)
            with open(base.path, "rb") as stored:
                for offset in (5 * MIB, 2**30 + 4096, 2**31 - MIB):
                    stored.seek(offset - 1)
                    self.assertEqual(b"\0" + data, stored.read(MIB + 1))
