# SPDX-License-Identifier: Apache-2.0
"""The hashes of pieces that lie beside a record: of which bases there are some, and whose they are."""

from __future__ import annotations

import dataclasses
import os

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.store import pieces
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.pieces import Hasher, Pieces
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, OTHER_ID, CacheCase, disk_image, raw_image

WITH_PIECES = ic.Request(hash_pieces=True)


class _WrongDigest(FakeSource):
    def describe(self, image_id: str) -> ic.Image:
        return dataclasses.replace(super().describe(image_id), digest=ic.Digest("sha512", "0" * 128))


class TestPiecesOfBases(CacheCase):
    def stored(self, image_id: str = ID) -> Pieces | None:
        """Return what the cache has for an image."""
        manager = self.manager()
        cache = CacheStore(manager.config, manager.host)
        record = cache.evidence_of(self.base(image_id).name)
        return None if record is None else cache.pieces_of(record)

    def expected(self, data: bytes, source: FakeSource, image_id: str = ID) -> Pieces:
        hasher = Hasher()
        hasher.update(data)
        digest = source.describe(image_id).digest
        assert digest is not None
        return Pieces(digest, len(data), hasher.all())

    def test_they_are_those_of_the_source_whatever_it_was_converted_to(self) -> None:
        for disk_format in ("raw", "qcow2", "vmdk"):
            with self.subTest(disk_format):
                image = raw_image(4)
                if disk_format != "raw":
                    image = disk_image(self.directory, disk_format, data=image)
                source = FakeSource({f"image-{disk_format}": image}, disk_format=disk_format)
                self.manager(source).cache_image(f"image-{disk_format}", request=WITH_PIECES)
                expected = self.expected(image, source, f"image-{disk_format}")
                self.assertEqual(expected, self.stored(f"image-{disk_format}"))

    def test_without_a_digest_there_are_none(self) -> None:
        self.manager(FakeSource({ID: raw_image(1)}, digests=False)).cache_image(ID, request=WITH_PIECES)
        self.assertEqual(1, len(self.manager().list_bases()))
        self.assertIsNone(self.stored())

    def test_a_disk_alone_takes_none(self) -> None:
        self.spawn(self.manager())
        self.assertEqual(1, len(self.manager().list_bases()))
        self.assertIsNone(self.stored())

    def test_a_wrong_digest_leaves_none(self) -> None:
        with self.assertRaises(errors.ImageRejected):
            self.manager(_WrongDigest({ID: raw_image(1)})).cache_image(ID, request=WITH_PIECES)
        self.assertEqual([], os.listdir(self.record().parent))
        self.assertEqual([], self.in_flight())

    def test_they_go_with_their_base(self) -> None:
        manager = self.manager()
        manager.cache_image(ID, request=WITH_PIECES)
        self.assertTrue(self.record().with_suffix(".pieces").exists())
        manager.evict_image(ID)
        self.assertEqual([], os.listdir(self.record().parent))

    def test_torn_ones_and_those_of_another_base_count_as_none(self) -> None:
        self.manager().cache_image(ID, request=WITH_PIECES)
        path = self.record().with_suffix(".pieces")
        whole = path.read_bytes()
        known = pieces.parse(whole, self.known_id())
        assert known is not None
        for other in (whole[:-1], b"", known.to_bytes("f" * 32), known.to_bytes()):
            path.write_bytes(other)
            self.assertIsNone(self.stored())
        path.write_bytes(whole)
        self.assertEqual(known, self.stored())
        path.unlink()
        self.assertIsNone(self.stored())
        self.assertEqual(raw_image(1), self.spawn(self.manager()))

    def known_id(self) -> str:
        return os.getxattr(self.base(), "user.imagecache.id").decode()

    def test_a_base_of_the_same_content_has_its_own(self) -> None:
        same = FakeSource({ID: raw_image(1), OTHER_ID: raw_image(1)})
        manager = self.manager(same)
        manager.cache_image(ID, request=WITH_PIECES)
        manager.cache_image(OTHER_ID, request=WITH_PIECES)
        self.assertEqual(1, same.opens)
        self.assertEqual(self.expected(raw_image(1), same), self.stored(OTHER_ID))

    def test_a_crash_before_the_record_does_not_lose_them(self) -> None:
        class Killed(BaseException):
            pass

        def kill() -> None:
            raise Killed

        self.points.at("publish:synced", kill)
        with self.assertRaises(Killed):
            self.manager().cache_image(ID, request=WITH_PIECES)
        self.spawn(self.manager())
        self.assertEqual(1, self.source.opens)
        self.assertEqual(self.expected(raw_image(1), self.source), self.stored())


if __name__ == "__main__":
    import unittest

    unittest.main()
