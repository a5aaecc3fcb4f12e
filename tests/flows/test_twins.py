# SPDX-License-Identifier: Apache-2.0
"""Two image ids with one content cost one download."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
from typing import Any

import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.store import evidence
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, OTHER_ID, CacheCase, content_of, disk_image, raw_image


class Source(FakeSource):
    """Says other things of an image than what is so."""

    def __init__(self, images: dict[str, bytes], **told: object) -> None:
        super().__init__(images)
        self.told = told

    def describe(self, image_id: str) -> ic.Image:
        return dataclasses.replace(super().describe(image_id), **self.told)  # type: ignore[arg-type]


class Packed(FakeSource):
    """Says of all images how they are compressed."""

    def __init__(self, images: dict[str, bytes], *, disk_format: str, compression: str | None) -> None:
        super().__init__(images, disk_format=disk_format)
        self.compression = compression

    def describe(self, image_id: str) -> ic.Image:
        return dataclasses.replace(super().describe(image_id), compression=self.compression)


class TestTwins(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.same = FakeSource({ID: raw_image(1), OTHER_ID: raw_image(1)})

    def record_of(self, image_id: str) -> evidence.Record:
        record = evidence.parse(self.record(image_id).read_bytes())
        assert record is not None
        return record

    def cache_both(self, source: FakeSource | None = None, **options: Any) -> int:
        """Cache one, then the other. Returns how often anything was downloaded."""
        source = source or self.same
        manager = self.manager(source, **options)
        self.assertIs(ic.CacheResult.CACHED, manager.cache_image(ID))
        self.assertIs(ic.CacheResult.CACHED, manager.cache_image(OTHER_ID))
        return source.opens

    def test_the_second_is_a_file_of_its_own_with_the_same_evidence(self) -> None:
        self.assertEqual(1, self.cache_both())
        self.assertEqual(raw_image(1), self.base(OTHER_ID).read_bytes())
        self.assertEqual(1, self.base(ID).stat().st_nlink)
        self.assertLess(self.base(OTHER_ID).stat().st_blocks * 512, 2 * 2**20)
        one, other = self.record_of(ID), self.record_of(OTHER_ID)
        self.assertNotEqual(one.base_id, other.base_id)
        self.assertEqual(OTHER_ID, other.image_id)
        as_one = dataclasses.replace(other, name=one.name, image_id=ID, base_id=one.base_id, inode=one.inode)
        self.assertEqual(one, as_one)
        (copied,) = (event for event in self.events if isinstance(event, events.Copied))
        self.assertEqual((self.base(OTHER_ID).name, one.name), (copied.name, copied.origin))
        self.assertEqual(1, self.happened(events.Fetched))

    def test_a_copy_is_charged_for_what_it_takes(self) -> None:
        manager = self.manager(self.same)
        manager.cache_image(ID)
        report = manager.precache_image(OTHER_ID)
        (copied,) = (event for event in self.events if isinstance(event, events.Copied))
        allocated = 0 if copied.shared else self.base(OTHER_ID).stat().st_blocks * 512
        self.assertEqual(ic.CacheReport(ic.CacheResult.CACHED, 0, allocated), report)

    def test_it_outlives_the_first_and_is_scrubbed_like_it(self) -> None:
        self.cache_both()
        manager = self.manager(self.same)
        manager.evict_image(ID)
        self.assertEqual(raw_image(1), self.spawn(manager, OTHER_ID))
        (found,) = manager.scrub(rate=0).bases
        self.assertIs(ic.Verdict.SOUND, found.verdict)

    def test_a_converted_base_serves_too(self) -> None:
        image = disk_image(self.directory, "qcow2")
        source = FakeSource({ID: image, OTHER_ID: image}, disk_format="qcow2")
        self.assertEqual(1, self.cache_both(source))
        self.assertEqual(raw_image(), content_of(str(self.base(OTHER_ID)), "raw"))

    def test_one_that_came_compressed_serves_what_is_to_be_unpacked_from_the_same_bytes(self) -> None:
        for data, format in ((raw_image(), "raw"), (disk_image(self.directory, "qcow2"), "qcow2")):
            with self.subTest(format):
                packed = gzip.compress(data)
                ids = [f"{format}-{number}" for number in range(4)]
                source = Packed(dict.fromkeys(ids, packed), disk_format=format, compression="gzip")
                manager = self.manager(source)
                manager.cache_image(ids[0])
                manager.cache_image(ids[1])
                self.assertEqual(1, source.opens)
                self.assertEqual(raw_image(), content_of(str(self.base(ids[1])), "raw"))
                self.assertEqual(f"{format}+gzip", self.record_of(ids[1]).source_format)
                source.compression = None  # the bytes are to be taken as they are
                with self.assertRaises(ic.ImageRejected):
                    manager.cache_image(ids[2])
                source.compression = "xz"
                with self.assertRaises(ic.ImageRejected):
                    manager.cache_image(ids[3])

    def test_a_digest_in_upper_case_is_the_same(self) -> None:
        data = raw_image(1)
        said = ic.Digest("SHA-256", hashlib.sha256(data).hexdigest().upper())
        source = Source({ID: data, OTHER_ID: data}, digest=said)
        self.assertEqual(1, self.cache_both(source))

    def test_a_plain_file_serves_a_plain_file_only(self) -> None:
        manager = self.manager(self.same)
        manager.fetch_file(ID, self.target("kernel"))
        manager.fetch_file(OTHER_ID, self.target("kernel-2"))
        self.assertEqual(1, self.same.opens)
        third = "33333333-aaaa-4bbb-8ccc-0123456789ab"
        source = FakeSource({third: raw_image(1)})
        self.manager(source).cache_image(third)
        self.assertEqual(1, source.opens)

    def test_a_disk_serves_as_a_plain_file_unless_it_was_converted(self) -> None:
        manager = self.manager(self.same)
        manager.cache_image(ID)
        manager.fetch_file(OTHER_ID, self.target("kernel"))
        self.assertEqual(1, self.same.opens)
        image = disk_image(self.directory, "qcow2")
        source = FakeSource({"a": image, "b": image}, disk_format="qcow2")
        self.manager(source).cache_image("a")
        self.manager(source).fetch_file("b", self.target("kernel-2"))
        self.assertEqual(2, source.opens)

    def test_one_that_would_be_stored_otherwise_is_fetched(self) -> None:
        image = disk_image(self.directory, "qcow2")
        source = FakeSource({ID: image, OTHER_ID: image}, disk_format="qcow2")
        self.manager(source).cache_image(ID)
        self.manager(source, force_raw_images=False).cache_image(OTHER_ID)
        self.assertEqual(2, source.opens)
        self.assertEqual("qcow2", self.record_of(OTHER_ID).stored_format)

    def test_only_a_strong_digest_will_do(self) -> None:
        data = raw_image(1)
        md5 = ic.Digest("md5", hashlib.md5(data).hexdigest())
        self.assertEqual(2, self.cache_both(Source({ID: data, OTHER_ID: data}, digest=md5)))

    def test_without_a_digest_both_are_fetched(self) -> None:
        source = FakeSource({ID: raw_image(1), OTHER_ID: raw_image(1)}, digests=False)
        self.assertEqual(2, self.cache_both(source))

    def test_what_it_claims_to_be_still_counts(self) -> None:
        self.manager(self.same).cache_image(ID)
        for claimed in ("qcow2", "iso"):
            liar = Source({OTHER_ID: raw_image(1)}, disk_format=claimed)
            with self.subTest(claimed), self.assertRaises(ic.ImageRejected):
                self.manager(liar).cache_image(OTHER_ID)
        image = disk_image(self.directory, "qcow2")
        self.manager(FakeSource({"a": image}, disk_format="qcow2")).cache_image("a")
        with self.assertRaises(ic.ImageRejected):
            self.manager(FakeSource({"b": image}, disk_format="raw")).cache_image("b")
        self.assertEqual([], self.in_flight())

    def test_a_disk_that_is_too_small_is_refused_all_the_same(self) -> None:
        self.manager(self.same).cache_image(ID)
        with self.assertRaises(ic.DiskTooSmallError):
            self.manager(self.same).create_disk(OTHER_ID, self.target(), size=2**20)
        self.assertFalse(self.base(OTHER_ID).exists())

    def test_an_adopted_a_damaged_and_a_foreign_one_do_not_serve(self) -> None:
        def adopted() -> None:
            self.record().unlink()
            self.manager(self.same).cache_image(ID)

        def damaged() -> None:
            self.record().write_text(self.record().read_text().replace('"damaged": false', '"damaged": true'))

        def foreign() -> None:
            content = self.base().read_bytes()
            self.base().unlink()
            self.base().write_bytes(content)

        def unsummed() -> None:
            self.record().with_suffix(".sums").unlink()

        for spoil in (adopted, damaged, foreign, unsummed):
            with self.subTest(spoil.__name__):
                self.manager(self.same).cache_image(ID)
                spoil()
                opens = self.same.opens
                self.manager(self.same).cache_image(OTHER_ID)
                self.assertEqual(opens + 1, self.same.opens)
                for image_id in (ID, OTHER_ID):
                    self.manager().evict_image(image_id)

    def test_a_copy_of_what_the_disk_changed_is_not_kept(self) -> None:
        self.manager(self.same).cache_image(ID)
        before = self.base().stat()
        with self.base().open("r+b") as file:
            file.write(b"rotten")
        os.utime(self.base(), ns=(before.st_atime_ns, before.st_mtime_ns))
        self.manager(self.same).cache_image(OTHER_ID)
        copied = next((event for event in self.events if isinstance(event, events.Copied)), None)
        # Shared extents cannot be looked at without reading them: the scrub finds it then.
        if copied is None:
            self.assertEqual(raw_image(1), self.base(OTHER_ID).read_bytes())
            self.assertEqual(2, self.same.opens)
        else:
            self.assertTrue(copied.shared)
            self.assertEqual(2, len(self.manager().scrub(rate=0).damaged))
