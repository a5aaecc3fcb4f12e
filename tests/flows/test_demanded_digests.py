# SPDX-License-Identifier: Apache-2.0
"""The digest that a table demands holds whichever source brings the data, and however its name is spelled."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
from collections.abc import Iterator

import imagecache_lib as ic
from imagecache_lib.precache.peer import PeerServer
from imagecache_lib.sources import tables
from imagecache_lib.sources.glance_metadata import image_from_metadata
from imagecache_lib.sources.interface import SourceRefused
from imagecache_lib.sources.peer import PeerSource
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, OTHER_ID, CacheCase, disk_image, raw_image

TOKEN = "a-secret-of-the-peers"
GOOD, OTHER = raw_image(1), raw_image(2)


def digest_of(data: bytes, algorithm: str = "sha256") -> ic.Digest:
    return ic.Digest(algorithm, hashlib.new(algorithm, data).hexdigest())


class Demanding(FakeSource):
    """Knows the digest of an image without asking, and says another of it, or none, when it is asked."""

    def __init__(
        self, known: ic.Digest, data: bytes, *, digests: bool = True, disk_format: str = "raw"
    ) -> None:
        super().__init__({ID: data}, digests=digests, disk_format=disk_format)
        self._known = known

    def known_digest(self, image_id: str) -> ic.Digest | None:
        return self._known


class _Told:
    """Chunks, and what is said of the image beside them."""

    def __init__(self, image: ic.Image, chunks: Iterator[bytes]) -> None:
        self.image, self._chunks = image, chunks

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._chunks)


class Correcting(FakeSource):
    """Says with the data something else of the image than before.

    :param said: fields of the description.
    """

    def __init__(self, data: bytes, **said: object) -> None:
        super().__init__({ID: data})
        self._said = said

    @contextlib.contextmanager
    def open(self, image: ic.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with super().open(image, offset) as chunks:
            yield _Told(dataclasses.replace(image, **self._said), chunks)  # type: ignore[arg-type]


class TestFallbacks(CacheCase):
    """A table that demands a digest, and whose file is gone."""

    def demanding(self, digest: ic.Digest) -> ic.ImageCacheManager:
        gone = ic.FileSource({ID: ic.FileImage(self.directory / "gone", "raw", digest=digest)})
        return self.manager(gone)

    def test_what_has_the_digest_is_served_whatever_the_fallback_says(self) -> None:
        for algorithm in ("sha512", "sha256"):
            for digests in (True, False):
                with self.subTest(algorithm, digests=digests):
                    fallback = FakeSource({ID: GOOD}, digests=digests)
                    manager = self.demanding(digest_of(GOOD, algorithm))
                    found = self.spawn(manager, request=ic.Request(fallbacks=(fallback,)))
                    self.assertEqual(GOOD, found)
                    shown = manager.show_base(ID)
                    assert shown is not None
                    self.assertEqual(digest_of(GOOD, algorithm), shown.digest)
                    manager.evict_image(ID)

    def test_other_data_is_not_served_and_is_transferred_once_at_most(self) -> None:
        for algorithm in ("sha512", "sha256"):
            for digests in (True, False):
                with self.subTest(algorithm, digests=digests):
                    fallback = FakeSource({ID: OTHER}, digests=digests)
                    with self.assertRaises((ic.ImageRejected, SourceRefused)) as caught:
                        self.demanding(digest_of(GOOD, algorithm)).create_disk(
                            ID, self.target(), request=ic.Request(fallbacks=(fallback,))
                        )
                    self.assertIn(digest_of(GOOD, algorithm).value, str(caught.exception))
                    self.assertLessEqual(fallback.opens, 1)
                    self.assertFalse(self.base().exists())
                    self.assertEqual([], self.in_flight())

    def test_a_conversion_proves_nothing_of_the_data(self) -> None:
        image = disk_image(self.directory, "qcow2", data=GOOD)
        there = self.directory / "there"
        there.mkdir()
        peer = self.manager(FakeSource({ID: image}, disk_format="qcow2"), instances_path=str(there))
        peer.cache_image(ID)
        fallback = self.peer_of(peer)
        for digest in (digest_of(image), digest_of(GOOD)):
            with self.assertRaisesRegex(ic.ImageNotFound, digest.value):
                self.demanding(digest).create_disk(
                    ID, self.target(), request=ic.Request(fallbacks=(fallback,))
                )

    def test_a_demand_opens_no_other_images_base(self) -> None:
        self.manager(FakeSource({OTHER_ID: GOOD})).cache_image(OTHER_ID)
        fallback = FakeSource({ID: OTHER}, digests=False)
        fallback.vouches_for_digest = lambda image: True  # type: ignore[method-assign]
        with self.assertRaises(ic.ImageRejected):
            self.demanding(digest_of(GOOD, "sha512")).create_disk(
                ID, self.target(), request=ic.Request(fallbacks=(fallback,))
            )

    def test_a_peer_that_knows_an_md5_alone_serves(self) -> None:
        there = self.directory / "there"
        there.mkdir()
        peer = self.manager(Demanding(digest_of(GOOD, "md5"), GOOD), instances_path=str(there))
        peer.cache_image(ID)
        found = self.spawn(self.manager(FakeSource({})), request=ic.Request(fallbacks=(self.peer_of(peer),)))
        self.assertEqual(GOOD, found)
        shown = self.manager().show_base(ID)
        assert shown is not None
        self.assertEqual(digest_of(GOOD, "md5"), shown.digest)

    def peer_of(self, manager: ic.ImageCacheManager) -> PeerSource:
        server = PeerServer(manager, ("127.0.0.1", 0), token=TOKEN)
        server.start()
        self.addCleanup(server.stop)
        return PeerSource(f"http://127.0.0.1:{server.port}", token=TOKEN, trusted=True)


class TestOtherAlgorithms(CacheCase):
    """The digest by which a base was checked and the one that is demanded later are by two algorithms."""

    def digests(self, data: bytes) -> list[ic.Digest]:
        return [digest_of(data, algorithm) for algorithm in ("sha256", "md5", "sha512", "blake2b", "sha256")]

    def test_bytes_that_are_kept_as_they_came_are_read_and_not_fetched(self) -> None:
        qcow2 = disk_image(self.directory, "qcow2", data=GOOD)
        for data, disk_format in ((GOOD, "raw"), (qcow2, "qcow2")):
            first = FakeSource({ID: data}, disk_format=disk_format)
            self.manager(first, force_raw_images=False).cache_image(ID)
            inode = self.base().stat().st_ino
            for digest in self.digests(data):
                with self.subTest(disk_format, digest=digest):
                    source = Demanding(digest, data)
                    manager = self.manager(source, force_raw_images=False)
                    self.assertFalse(manager.is_cached(ID))
                    self.assertEqual(GOOD, self.spawn(manager)[: len(GOOD)])
                    self.assertTrue(manager.is_cached(ID))
                    self.assertEqual((0, inode), (source.opens, self.base().stat().st_ino))
                    shown = manager.show_base(ID)
                    assert shown is not None
                    self.assertEqual(digest, shown.digest)
            self.manager().evict_image(ID)

    def test_bytes_that_came_without_a_digest_are_read(self) -> None:
        self.manager(FakeSource({ID: GOOD}, digests=False)).cache_image(ID)
        source = Demanding(digest_of(GOOD), GOOD)
        self.assertEqual(GOOD, self.spawn(self.manager(source)))
        self.assertEqual(0, source.opens)

    def test_a_plain_file_is_read_and_stays_one(self) -> None:
        kernel = gzip.compress(b"a ramdisk, which is no disk")
        path = self.target("kernel")
        self.manager(FakeSource({ID: kernel})).fetch_file(ID, path)
        source = Demanding(digest_of(kernel), kernel)
        self.manager(source).fetch_file(ID, self.target("again"))
        self.assertEqual(0, source.opens)
        with self.assertRaises(ic.ImageRejected):
            self.manager(source).create_disk(ID, self.target())

    def test_other_bytes_are_not_served(self) -> None:
        for digest in self.digests(GOOD)[:2]:
            with self.subTest(digest=digest):
                self.manager(FakeSource({ID: OTHER})).cache_image(ID)
                source = Demanding(digest, GOOD, digests=False)
                self.assertEqual(GOOD, self.spawn(self.manager(source)))
                self.assertEqual(1, source.opens)
                self.manager().evict_image(ID)

    def test_bytes_that_the_disk_changed_since_are_not_served(self) -> None:
        self.manager(FakeSource({ID: GOOD})).cache_image(ID)
        with open(self.base(), "r+b") as base:
            base.seek(len(GOOD) // 2)
            base.write(b"\xff" * 512)
        source = Demanding(digest_of(GOOD), GOOD)
        self.assertEqual(GOOD, self.spawn(self.manager(source)))
        self.assertEqual(1, source.opens)

    def test_a_conversion_does_not_tell_and_is_fetched_again(self) -> None:
        image = disk_image(self.directory, "qcow2", data=GOOD)
        self.manager(FakeSource({ID: image}, disk_format="qcow2")).cache_image(ID)
        source = Demanding(digest_of(image), image, digests=False, disk_format="qcow2")
        found = self.spawn(self.manager(source))
        self.assertEqual((GOOD, 1), (found[: len(GOOD)], source.opens))

    def test_another_digest_by_the_same_algorithm_is_not_read_for(self) -> None:
        self.manager(FakeSource({ID: GOOD})).cache_image(ID)
        source = Demanding(digest_of(OTHER, "sha512"), OTHER)
        self.assertEqual(OTHER, self.spawn(self.manager(source)))
        self.assertEqual(1, source.opens)


class TestSourcesThatContradictThemselves(CacheCase):
    def test_what_is_known_without_asking_counts(self) -> None:
        for digests in (True, False):
            source = Demanding(digest_of(GOOD, "sha512"), OTHER, digests=digests)
            with self.assertRaises((ic.ImageRejected, SourceRefused)):
                self.manager(source).create_disk(ID, self.target())
            self.assertLessEqual(source.opens, 1)
        source = Demanding(digest_of(GOOD, "md5"), GOOD)
        self.assertEqual(GOOD, self.spawn(self.manager(source)))

    def test_a_digest_that_changes_while_it_is_asked_for_is_the_sources_fault(self) -> None:
        source = Correcting(GOOD, digest=digest_of(OTHER, "sha512"))
        with self.assertRaisesRegex(ic.SourceError, "ask again") as caught:
            self.manager(source).cache_image(ID)
        self.assertNotIsInstance(caught.exception, SourceRefused)

    def test_a_corrected_length_takes_no_digest_away(self) -> None:
        source = Correcting(OTHER, digest=None, size=len(OTHER) - 512)
        described = dataclasses.replace(source.describe(ID), digest=digest_of(GOOD, "sha512"))
        source.describe = lambda image_id: described  # type: ignore[method-assign]
        with self.assertRaises(ic.ImageCacheError):
            self.manager(source).cache_image(ID)
        self.assertFalse(self.base().exists())


class TestSpellings(CacheCase):
    def test_one_algorithm_has_one_name(self) -> None:
        for name, *others in (
            ("sha512", "SHA512", "sha-512", "SHA2-512", "sha_512", " Sha512 "),
            ("sha256", "SHA-256", "SHA2-256", "sha2_256"),
            ("sha3_512", "SHA3-512", "sha-3-512", "sha3 512"),
            ("blake2b", "BLAKE2b", "BLAKE2b-512", "blake2b512"),
            ("md5", "MD5", "md-5"),
            ("sha1", "SHA-1"),
        ):
            good = digest_of(GOOD, name)
            for spelled in others:
                with self.subTest(spelled):
                    self.assertEqual(good, ic.Digest(spelled, good.value.upper()))

    def test_what_a_table_takes_a_fetch_can_compare(self) -> None:
        path = self.directory / "image"
        path.write_bytes(GOOD)
        for spelled in ("SHA2-256", "sha-512", "sha3-384", "BLAKE2s-256", "md5"):
            value = digest_of(GOOD, ic.Digest(spelled, "").algorithm).value
            table = self.directory / "table"
            table.write_text(json.dumps({ID: {"path": str(path), "digest": f"{spelled}:{value.upper()}"}}))
            manager = self.manager(ic.FileSource(tables.read(str(table), ic.FileImage)))
            manager.cache_image(ID)
            self.assertTrue(manager.is_cached(ID))
            manager.evict_image(ID)

    def test_what_not_all_hosts_can_compute_is_no_digest_of_a_table(self) -> None:
        for text in ("shake_128:ab", "sm3:" + "0" * 64, "sha512_256:" + "0" * 64, "crc32:00000000"):
            with self.subTest(text), self.assertRaisesRegex(ValueError, "algorithm"):
                tables.parse_digest(text)

    def test_glances_names(self) -> None:
        md5 = digest_of(GOOD, "md5")
        for algorithm, value, expected in (
            ("SHA2-512", digest_of(GOOD, "sha512").value.upper(), digest_of(GOOD, "sha512")),
            ("sha-256", f" {digest_of(GOOD).value} ", digest_of(GOOD)),
            ("sm3", "0" * 64, md5),
            ("sha512_256", "0" * 64, md5),
            ("sha512", None, md5),
        ):
            with self.subTest(algorithm):
                told = {"id": ID, "os_hash_algo": algorithm, "os_hash_value": value, "checksum": md5.value}
                self.assertEqual(expected, image_from_metadata(ID, told).digest)
