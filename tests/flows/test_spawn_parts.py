# SPDX-License-Identifier: Apache-2.0
"""The parts of the spawn flow by themselves: names, inspection, digests, the space ledger, small files."""

from __future__ import annotations

import hashlib
import os
import unittest

from imagecache_lib import config, errors, model
from imagecache_lib.formats import inspection
from imagecache_lib.ingest import digest
from imagecache_lib.store import layout, reservations
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.evictor import NoEvictor
from imagecache_lib.store.reservations import Reservation
from imagecache_lib.store.stage import Stage
from imagecache_lib.system import durable
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter
from tests.support import files, leftovers
from tests.support.cache_case import MIB, CacheCase, disk_image, raw_image


class TestNames(unittest.TestCase):
    """Names that Nova gives; a directory of its own is found by them."""

    def test_names_are_novas(self) -> None:
        image_id = "155d900f-4e14-4e4c-a73d-069cbf4541e6"
        self.assertEqual(_sha1(image_id), layout.base_name(image_id))
        self.assertEqual("swap_512", layout.swap_name(512))
        self.assertEqual("ephemeral_1_40d1d2c", layout.ephemeral_name(1, "ext4"))
        self.assertEqual("ephemeral_20_0706d66", layout.ephemeral_name(20, "vfat"))
        self.assertEqual("nova-swap_512", layout.lock_name("swap_512"))

    def test_kinds(self) -> None:
        name = _sha1("x")
        for found, kind in (
            (name, layout.Kind.ORIGINAL),
            (f"{name}_10", layout.Kind.RESIZED),
            (f"{name}_sm", layout.Kind.RESIZED),
            ("swap_512", layout.Kind.SWAP),
            ("ephemeral_1_40d1d2c", layout.Kind.EPHEMERAL),
            (f"{name}.part", layout.Kind.FOREIGN_STAGE),
            (f"{name}.converted", layout.Kind.FOREIGN_STAGE),
            (name.upper(), layout.Kind.UNKNOWN),
            (name[:-1], layout.Kind.UNKNOWN),
            (f"{name}\n", layout.Kind.UNKNOWN),
            (f"{name}_", layout.Kind.UNKNOWN),
            (".imagecache", layout.Kind.UNKNOWN),
            ("", layout.Kind.UNKNOWN),
        ):
            with self.subTest(found=found):
                self.assertIs(kind, layout.classify(found))


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


#: The partition entries of an MBR in front of a GPT.
_PROTECTIVE = b"\0\0\2\0\xee\xff\xff\xff\1\0\0\0\xff\xff\xff\xff" + bytes(48)


class TestInspection(CacheCase):
    def inspect(self, data: bytes, claimed: str | None, strict: bool = True) -> inspection.Finding:
        path = self.directory / "image"
        path.write_bytes(data)
        rules = inspection.Rules.of(config.CacheConfig(instances_path="/unused"), strict=strict)
        with path.open("rb") as file:
            return inspection.inspect_file(file.fileno(), claimed, rules)

    def test_each_format_under_its_own_claim_and_none(self) -> None:
        for format, claims, options in (
            ("qcow2", ("qcow2",), ""),
            ("vmdk", ("vmdk",), "subformat=streamOptimized"),
            ("vmdk", ("vmdk",), "subformat=monolithicSparse"),
            ("vpc", ("vhd", "vpc"), "force_size=on"),
            ("vhdx", ("vhdx",), ""),
            ("vdi", ("vdi",), ""),
        ):
            data = disk_image(self.directory, format, options=options)
            for claimed in (None, *claims):
                with self.subTest(format=format, options=options, claimed=claimed):
                    found = self.inspect(data, claimed)
                    self.assertEqual(format, found.format)
                    self.assertGreaterEqual(found.virtual_size or 0, 3 * MIB)

    def test_a_raw_disk_under_every_name_that_glance_has_for_one(self) -> None:
        data = raw_image()
        gpt = bytearray(data)
        gpt[446:510] = _PROTECTIVE
        gpt[510:512] = b"\x55\xaa"
        gpt[512:520] = b"EFI PART"
        for claimed in (None, "raw", "ami", "aki", "ari"):
            for content in (data, bytes(gpt)):
                with self.subTest(claimed=claimed, gpt=content is not data):
                    found = self.inspect(content, claimed)
                    self.assertEqual(("raw", None), (found.format, found.virtual_size))

    def test_an_iso_with_and_without_a_partition_table(self) -> None:
        iso = bytearray(raw_image())
        iso[0x8000:0x8007] = b"\1CD001\1"
        hybrid = bytearray(iso)
        hybrid[446:510] = _PROTECTIVE
        hybrid[510:512] = b"\x55\xaa"
        hybrid[512:520] = b"EFI PART"
        for content in (bytes(iso), bytes(hybrid)):
            self.assertEqual("raw", self.inspect(content, "iso").format)
        with self.assertRaises(errors.ImageRejected):
            self.inspect(bytes(iso), "raw")
        with self.assertRaises(errors.ImageRejected):
            self.inspect(bytes(hybrid[:0x8000]) + bytes(MIB), "iso")

    def test_a_qcow2_is_known_by_its_first_kilobytes(self) -> None:
        data = disk_image(self.directory, "qcow2")
        looking = inspection.Inspection(
            "qcow2", inspection.Rules.of(config.CacheConfig(instances_path="/unused"))
        )
        fed = 0
        while looking.finding is None:
            looking.feed(data[fed : fed + 1024])
            fed += 1024
        self.assertLessEqual(fed, 256 * 1024)

    def test_without_strictness_only_the_content_counts(self) -> None:
        data = disk_image(self.directory, "qcow2")
        self.assertEqual("qcow2", self.inspect(data, "raw", strict=False).format)
        with self.assertRaises(errors.ImageRejected):
            self.inspect(data, "raw")

    def test_without_strictness_another_file_is_refused_all_the_same(self) -> None:
        path = self.directory / "overlay"
        files.overlay(path, "/x")
        for strict in (True, False):
            with self.assertRaises(errors.ImageRejected):
                self.inspect(path.read_bytes(), "qcow2", strict=strict)


class TestDigest(unittest.TestCase):
    def hashed(self, expected: model.Digest | None, *chunks: bytes) -> str | None:
        waiter = Waiter(System(name="here"))
        hashing = digest.checking(model.Image("image", digest=expected), waiter, hash_pieces=True)
        self.addCleanup(hashing.close)
        for chunk in chunks:
            hashing.feed(chunk)
        try:
            hashing.finish()
        except errors.ImageRejected as error:
            return error.cause
        return None

    def test_what_agrees_and_what_does_not(self) -> None:
        chunks = [bytes([n]) * 1000 for n in range(50)]
        for algorithm in ("md5", "sha1", "sha256", "sha512", "blake2b", "sha3_256"):
            with self.subTest(algorithm=algorithm):
                value = hashlib.new(algorithm, b"".join(chunks)).hexdigest()
                self.assertIsNone(self.hashed(model.Digest(algorithm, value), *chunks))
                self.assertIsNone(self.hashed(model.Digest(algorithm, value.upper()), *chunks))
                mismatch = self.hashed(model.Digest(algorithm, value), *chunks[1:])
                self.assertIn(value, str(mismatch))

    def test_nothing_to_compare_with_is_no_mismatch(self) -> None:
        self.assertIsNone(self.hashed(None, b"x"))

    def test_no_thread_is_left_whatever_happens(self) -> None:
        with leftovers.no_thread_left():
            hashing = digest.StreamDigest(model.Digest("md5", "0" * 32), Waiter(System(name="here")))
            hashing.feed(b"x")
            hashing.close()
            hashing.close()


class TestSpace(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.cache = CacheStore(config.CacheConfig(instances_path=str(self.instances)), self.host())
        self.cache.start()

    def stage(self, cache: CacheStore | None = None) -> Stage:
        stage = Stage(cache or self.cache, _sha1("x"))
        self.addCleanup(stage.discard)
        stage.write_info()
        return stage

    def reserve(self, stage: Stage, needed: int) -> None:
        Reservation(stage, self.cache, NoEvictor(), Waiter(self.cache.host)).raise_to(needed)

    def test_what_is_reserved_counts_until_it_is_allocated_and_never_twice(self) -> None:
        stage = self.stage()
        self.reserve(stage, 8 * MIB)
        self.assertEqual(8 * MIB, reservations.outstanding(self.cache))
        stage.write(os.urandom(3 * MIB), 0)
        os.fsync(stage.fd)
        self.assertEqual(5 * MIB, reservations.outstanding(self.cache))
        stage.write(os.urandom(8 * MIB), 3 * MIB)
        os.fsync(stage.fd)
        self.assertEqual(0, reservations.outstanding(self.cache))

    def test_reservations_add_up_against_the_free_space(self) -> None:
        free = reservations.free(self.cache)
        self.reserve(self.stage(), free // 2)
        with self.assertRaises(errors.NoSpaceError) as caught:
            self.reserve(self.stage(), free * 2 // 3)
        self.assertIn(str(self.base().parent), str(caught.exception))
        self.assertTrue(caught.exception.next_step)
        self.reserve(self.stage(), free // 4)

    def test_one_that_raises_its_own_reservation_does_not_stand_in_its_own_way(self) -> None:
        free = reservations.free(self.cache)
        stage = self.stage()
        self.reserve(stage, free // 2)
        self.reserve(stage, free * 2 // 3)
        self.reserve(stage, 1)
        self.assertAlmostEqual(free * 2 // 3, reservations.outstanding(self.cache), delta=2 * MIB)

    def test_a_dead_owners_reservation_lapses(self) -> None:
        stage = self.stage()
        self.reserve(stage, 8 * MIB)
        stage.leave()
        self.assertEqual(0, reservations.outstanding(self.cache))

    def test_where_locks_do_not_work_only_time_tells_who_is_dead(self) -> None:
        options = config.CacheConfig(instances_path=str(self.instances))
        unlocked = CacheStore(options, System(locking=False))
        stage = self.stage(unlocked)
        Reservation(stage, unlocked, NoEvictor(), Waiter(unlocked.host)).raise_to(8 * MIB)
        self.assertEqual(8 * MIB, reservations.outstanding(unlocked))
        os.utime(stage.path, (1, 1))
        self.assertEqual(0, reservations.outstanding(unlocked))

    def test_a_stage_is_shut_to_others_until_it_is_complete(self) -> None:
        stage = self.stage()
        self.assertEqual(0o600, os.stat(stage.path).st_mode & 0o777)
        stage.seal()
        self.assertEqual(0o644, os.stat(stage.path).st_mode & 0o777)


class TestSmallFiles(CacheCase):
    def test_a_file_is_replaced_whole_with_the_mode_asked_for(self) -> None:
        path = str(self.directory / "file")
        self.addCleanup(os.umask, os.umask(0o077))
        for data in (b"first", b"", b"x" * 100_000):
            durable.write_file(path, data, mode=0o644)
            self.assertEqual(data, durable.read_file(path))
        self.assertEqual(0o644, os.stat(path).st_mode & 0o777)
        self.assertEqual(["file", "instances"], sorted(os.listdir(self.directory)))

    def test_a_write_that_fails_leaves_the_old_one_and_nothing_else(self) -> None:
        path = self.directory / "directory"
        path.mkdir()
        (path / "inside").touch()
        self.assertRaises(OSError, durable.write_file, str(path), b"data")
        self.assertEqual(["directory", "instances"], sorted(os.listdir(self.directory)))

    def test_what_is_no_file_reads_as_absent(self) -> None:
        os.mkfifo(self.directory / "fifo")
        for name in ("absent", "instances", "absent/below", "fifo"):
            self.assertIsNone(durable.read_file(str(self.directory / name)))
