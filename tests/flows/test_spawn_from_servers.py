# SPDX-License-Identifier: Apache-2.0
"""Spawns from servers and files that tell something wrong beside good data: the disk is right."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import zstandard

from imagecache_lib import errors, model
from imagecache_lib.sources.file import FileImage, FileSource
from imagecache_lib.sources.glance import GlanceSource
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import BadServer
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import MIB, OTHER_ID, CacheCase, disk_image, raw_image
from tests.support.servers import GlanceServer

IMAGE = "served"
UNTOLD = faults.length_told(None)


def _read_by_this_process() -> int:
    with open("/proc/self/io") as lines:
        return int(next(line for line in lines if line.startswith("rchar")).split()[1])


class TestServers(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.manager().cache_image(OTHER_ID)
        self.server = self.enterContext(BadServer())

    def serve(self, data: bytes, disk_format: str, digest: model.Digest | None = None) -> HttpSource:
        url = self.server.put("/image", data)
        return HttpSource({IMAGE: HttpImage(url, disk_format, digest)}, timeout=(60.0, 60.0))

    def test_a_head_that_tells_another_length(self) -> None:
        for format in ("raw", "qcow2", "vmdk"):
            data = raw_image(1) if format == "raw" else disk_image(self.directory, format)
            manager = self.manager(self.serve(data, format), num_retries=0)
            wanted = self.spawn(manager, IMAGE)
            for length in (0, 1000, len(data) - 1, len(data) + MIB, 2**58):
                with self.subTest(format=format, length=length):
                    manager.evict_image(IMAGE)
                    self.server.fail("/image", faults.length_told(length), method="HEAD")
                    self.assertEqual(wanted, self.spawn(manager, IMAGE))

    def test_a_head_that_tells_another_length_and_data_that_come_without_one(self) -> None:
        for format in ("raw", "qcow2", "vmdk"):
            data = raw_image(1) if format == "raw" else disk_image(self.directory, format)
            digest = model.Digest("sha256", hashlib.sha256(data).hexdigest())
            wanted = self.spawn(self.manager(FakeSource({"plain": data}, disk_format=format)), "plain")
            for stated, way in ((None, faults.chunked()), (digest, faults.chunked()), (digest, UNTOLD)):
                manager = self.manager(self.serve(data, format, stated), num_retries=0)
                self.server.always_fail("/image", way, method="GET")
                for length in (0, 1000, len(data) - 1, len(data) + MIB, 2**58):
                    with self.subTest(format=format, stated=stated, length=length):
                        self.server.fail("/image", faults.length_told(length), method="HEAD")
                        self.assertEqual(wanted, self.spawn(manager, IMAGE))
                        manager.evict_image(IMAGE)
                self.server.forget("/image")

    def test_a_hint_reserves_no_room(self) -> None:
        data = raw_image(1)
        for way in (faults.fine(), faults.chunked()):
            manager = self.manager(self.serve(data, "raw"), num_retries=0)
            self.server.always_fail("/image", way, method="GET")
            self.server.fail("/image", faults.length_told(2**43), method="HEAD")
            self.assertEqual(data, self.spawn(manager, IMAGE))
            manager.evict_image(IMAGE)
            self.server.forget("/image")

    def test_no_failure_of_head_ends_a_fetch(self) -> None:
        data = raw_image(1)
        manager = self.manager(self.serve(data, "raw"), num_retries=0)
        for fault in (
            faults.header("Content-Length", "-1"),
            faults.redirected("/image"),
            faults.redirected("file:///image"),
            faults.many_headers(),
        ):
            self.server.always_fail("/image", fault, method="HEAD")
            self.assertEqual(data, self.spawn(manager, IMAGE))
            manager.evict_image(IMAGE)
            self.server.forget("/image")

    def test_a_hint_does_not_decide_whether_the_image_fits(self) -> None:
        data = raw_image(1)
        self.server.always_fail("/image", faults.chunked(), method="GET")
        manager = self.manager(self.serve(data, "raw"), num_retries=0)
        self.server.fail("/image", faults.length_told(len(data) + MIB), method="HEAD")
        self.assertEqual(data, self.spawn(manager, IMAGE, size=len(data)))
        manager.evict_image(IMAGE)
        target = self.target("small")
        with self.leaves_nothing(), self.assertRaises(errors.DiskTooSmallError):
            manager.create_disk(IMAGE, target, size=len(data) - MIB)

    def test_what_ends_with_the_connection_before_it_should_is_not_cached(self) -> None:
        manager = self.manager(self.serve(raw_image(1), "raw"), num_retries=1)
        self.server.always_fail("/image", faults.cut_without_length(MIB // 2), method="GET")
        with self.leaves_nothing(), self.assertRaisesRegex(errors.SourceError, "cut off.*digest"):
            manager.cache_image(IMAGE)

    def test_a_length_that_no_image_can_have_is_refused(self) -> None:
        data = raw_image(1)
        manager = self.manager(self.serve(data, "raw"), num_retries=0)
        length = faults.length_told(2**58)
        self.server.always_fail("/image", faults.range_ignored(data), length)
        with self.leaves_nothing(), self.assertRaisesRegex(errors.ImageRejected, "absurd"):
            manager.cache_image(IMAGE)
        self.server.forget("/image")
        self.server.always_fail("/image", length)  # and by a range the right one
        with (
            self.leaves_nothing(),
            self.assertRaisesRegex(errors.SourceError, f"{len(data)} bytes with a part"),
        ):
            manager.cache_image(IMAGE)

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


PACK: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "bzip2": bz2.compress,
}


class TestCompressedImages(CacheCase):
    """One disk, compressed as a whole, unpacked while it arrives."""

    def setUp(self) -> None:
        super().setUp()
        self.manager().cache_image(OTHER_ID)
        self.server = self.enterContext(BadServer())

    def http(self, packed: bytes, compression: str, disk_format: str, **fields: Any) -> HttpSource:
        url = self.server.put("/image", packed)
        return HttpSource({IMAGE: HttpImage(url, disk_format, compression=compression, **fields)})

    def content(self, disk_format: str) -> bytes:
        return raw_image(1) if disk_format == "raw" else disk_image(self.directory, disk_format)

    def test_the_disk_is_what_was_compressed(self) -> None:
        for disk_format in ("raw", "qcow2", "vmdk"):
            data = self.content(disk_format)
            wanted = self.spawn(self.manager(FakeSource({"plain": data}, disk_format=disk_format)), "plain")
            for name, pack in PACK.items():
                packed = pack(data)
                digest = model.Digest("sha256", hashlib.sha256(packed).hexdigest())
                with self.subTest(format=disk_format, compression=name):
                    manager = self.manager(self.http(packed, name, disk_format, digest=digest))
                    self.assertEqual(wanted, self.spawn(manager, IMAGE))
                    self.assertTrue(manager.is_cached(IMAGE))
                    with manager.fetch_or_reuse(IMAGE) as base:
                        self.assertEqual(digest, base.digest)
                        self.assertEqual((f"{disk_format}+{name}", "raw"), (base.source_format, base.format))
                    manager.evict_image(IMAGE)

    def test_the_digest_is_of_what_the_source_names(self) -> None:
        data = self.content("raw")
        digest = model.Digest("sha256", hashlib.sha256(data).hexdigest())
        manager = self.manager(self.http(gzip.compress(data), "gzip", "raw", digest=digest))
        with self.leaves_nothing(), self.assertRaisesRegex(errors.ImageRejected, "sha256"):
            manager.cache_image(IMAGE)

    def test_what_does_not_fit_the_disk_is_refused_before_it_is_unpacked(self) -> None:
        manager = self.manager(self.http(gzip.compress(bytes(64 * MIB)), "gzip", "raw"))
        target = self.target()
        with self.leaves_nothing(), self.assertRaises(errors.DiskTooSmallError):
            manager.create_disk(IMAGE, target, size=MIB)

    def test_bombs_truncations_and_garbage_leave_nothing(self) -> None:
        data = self.content("raw")
        for name, pack in PACK.items():
            for packed in (pack(data)[:-5], pack(data) + b"garbage", pack(bytes(9 * MIB)), b"\0not packed"):
                manager = self.manager(self.http(packed, name, "raw"), max_virtual_size=8 * MIB)
                with self.subTest(name=name), self.leaves_nothing():
                    self.assertRaises(errors.ImageRejected, manager.cache_image, IMAGE)

    def test_a_transfer_that_breaks_is_resumed(self) -> None:
        packed = gzip.compress(self.content("raw"))
        digest = model.Digest("sha256", hashlib.sha256(packed).hexdigest())
        manager = self.manager(self.http(packed, "gzip", "raw", digest=digest), num_retries=1)
        self.server.fail("/image", faults.truncated(len(packed) // 2))
        self.assertEqual(gzip.decompress(packed), self.spawn(manager, IMAGE))

    def test_a_plain_file_is_the_bytes_as_they_came(self) -> None:
        packed = gzip.compress(b"a kernel")
        manager = self.manager(self.http(packed, "gzip", "raw"))
        path = self.target("kernel")
        manager.fetch_file(IMAGE, path)
        with open(path, "rb") as file:
            self.assertEqual(packed, file.read())

    def glance(self, data: bytes, container_format: str) -> GlanceSource:
        server = self.enterContext(GlanceServer())
        server.add(IMAGE, data, container_format=container_format)
        return GlanceSource(server.url)

    def test_glances_compressed_images_are_unpacked_where_the_configuration_allows_it(self) -> None:
        data = self.content("raw")
        for pack in PACK.values():
            source = self.glance(pack(data), "compressed")
            with self.assertRaisesRegex(errors.ImageRejected, "compressed.*decompress_images"):
                self.manager(source).cache_image(IMAGE)
            manager = self.manager(source, decompress_images=True)
            self.assertEqual(data, self.spawn(manager, IMAGE))
            manager.evict_image(IMAGE)

    def test_archives_of_disks_are_refused_before_they_are_fetched(self) -> None:
        for container in ("ova", "docker"):
            source = self.glance(b"a tar archive", container)
            with self.leaves_nothing(), self.assertRaisesRegex(errors.ImageRejected, container):
                self.manager(source).cache_image(IMAGE)
