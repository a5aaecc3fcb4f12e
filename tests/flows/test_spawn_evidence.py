# SPDX-License-Identifier: Apache-2.0
"""What a base in the cache serves for: kernels and disks, certificates, and bases that others made."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors, events, model
from imagecache_lib.store import evidence, layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.testing.sources import FakeSource
from tests.support import files
from tests.support.cache_case import ID, MIB, OTHER_ID, CacheCase, content_of, disk_image, raw_image

DATA = raw_image(1)


class TestKernelsAndDisks(CacheCase):
    """The same image id asked for as a file and as a disk: neither ever gets what was made for the other."""

    def setUp(self) -> None:
        super().setUp()
        self.qcow2 = disk_image(self.directory, "qcow2")
        self.source = FakeSource({ID: self.qcow2}, disk_format="qcow2")

    def fetch_file(self, manager: ic.ImageCacheManager, name: str) -> bytes:
        path = self.target(name)
        manager.fetch_file(ID, path)
        return pathlib.Path(path).read_bytes()

    def test_a_file_is_the_bytes_as_they_came(self) -> None:
        manager = self.manager()
        self.assertEqual(self.qcow2, self.fetch_file(manager, "kernel"))
        self.assertEqual(self.qcow2, self.fetch_file(manager, "kernel-2"))
        self.assertEqual(1, self.source.opens)

    def test_an_unused_base_of_the_other_kind_is_evicted(self) -> None:
        manager = self.manager(space_minimum_age_seconds=0)
        for _ in range(2):
            self.assertEqual(self.qcow2, self.fetch_file(manager, f"kernel-{self.source.opens}"))
            self.assertEqual(self.qcow2, self.base().read_bytes())
            self.assertEqual(DATA, self.spawn(manager))
            self.assertEqual(DATA, self.base().read_bytes())
        self.assertEqual((4, 0), (self.source.opens, self.happened(events.Bypassed)))

    def test_a_base_in_use_stays_and_the_request_goes_around_it(self) -> None:
        manager = self.manager(space_minimum_age_seconds=0)
        disk = manager.create_disk(ID, self.target())
        before = self.base().stat()
        self.assertEqual(self.qcow2, self.fetch_file(manager, "kernel"))
        self.assertEqual(before.st_ino, self.base().stat().st_ino)
        self.assertEqual(DATA, content_of(disk.target, "qcow2"))
        self.assertEqual((1, []), (self.happened(events.Bypassed), self.in_flight()))

    def test_a_disk_that_goes_around_the_cache_stands_alone_in_its_backends_format(self) -> None:
        manager = self.manager()
        self.fetch_file(manager, "kernel")
        disk = manager.create_disk(ID, self.target(), size=4 * MIB)
        self.assertEqual(("qcow2", None), (disk.format, disk.base))
        self.assertEqual(disk, manager.inspect_disk(disk.target))
        self.assertEqual((1, self.qcow2), (self.happened(events.Bypassed), self.base().read_bytes()))
        self.base().unlink()
        self.assertEqual(DATA + bytes(MIB), content_of(disk.target, disk.format))

    def test_without_conversion_a_disk_that_goes_around_the_cache_has_its_backends_format(self) -> None:
        for format in ("qcow2", "vmdk", "vdi"):
            with self.subTest(format):
                image = disk_image(self.directory, format)
                source = FakeSource({format: image}, disk_format=format)
                manager = self.manager(source, force_raw_images=False)
                manager.fetch_file(format, self.target(f"kernel-{format}"))
                os.truncate(self.base(format), 4096)  # it does not serve, and is too young to go
                disk = manager.create_disk(format, self.target(format), size=8 * MIB)
                self.assertEqual(("qcow2", None, 8 * MIB), (disk.format, disk.base, disk.virtual_size))
                self.assertEqual(DATA + bytes(5 * MIB), content_of(disk.target, "qcow2"))
                self.assertEqual([], self.in_flight())

    def test_a_lease_for_drivers_and_caching_ahead_never_go_around_the_cache(self) -> None:
        manager = self.manager()
        self.fetch_file(manager, "kernel")
        with self.leaves_nothing(), self.assertRaises(errors.BackendError) as caught:
            manager.cache_image(ID)
        self.assertEqual(ID, caught.exception.image)
        with self.leaves_nothing(), self.assertRaises(errors.BackendError), manager.fetch_or_reuse(ID):
            self.fail("this lease would have been a private copy")

    def test_a_leased_base_is_not_evicted_by_who_waited_for_its_lock_in_vain(self) -> None:
        manager = self.manager(lock_timeout=0.1)
        path = self.target("kernel")
        with manager.fetch_or_reuse(ID) as base:
            manager.fetch_file(ID, path)
            self.assertTrue(os.path.samestat(os.stat(base.path), os.fstat(base.fd or -1)))
        self.assertEqual(self.qcow2, pathlib.Path(path).read_bytes())

    def test_private_copies_do_not_keep_a_base_that_nobody_uses(self) -> None:
        manager = self.manager(space_minimum_age_seconds=0)
        disk = manager.create_disk(ID, self.target())
        stop = self.points.stop_at("disk:made")
        private = self.running(lambda: self.manager().fetch_file(ID, self.target("kernel")))
        stop.wait()
        manager.remove_disk(disk)
        manager.fetch_file(ID, self.target("other"))
        stop.go_on()
        private.result()
        self.assertEqual(1, self.happened(events.Bypassed))

    def test_what_does_not_serve_is_not_put_back_from_the_trash(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        trash = self.base().parent / ".imagecache" / "trash"
        entry = trash / f"{self.base().name}.{'0' * 32}"
        entry.mkdir()
        self.base().rename(entry / "base")
        manager.fetch_file(ID, self.target("kernel"))
        self.assertEqual([entry.name], os.listdir(trash))
        self.assertFalse(self.base().exists())
        # It is the disk's base still: what it serves gets it back.
        manager.create_disk(ID, self.target())
        self.assertEqual([], os.listdir(trash))

    def test_without_conversion_a_disks_base_serves_as_a_file_too(self) -> None:
        manager = self.manager(force_raw_images=False)
        self.spawn(manager)
        self.assertEqual(self.qcow2, self.fetch_file(manager, "kernel"))
        self.assertEqual(1, self.source.opens)


class TestDemands(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.manager().cache_image(ID)

    def test_a_signature_that_nothing_here_verifies_is_never_taken_for_granted(self) -> None:
        certificates = model.Request(trusted_certs=("cert-1",))
        configured = {"enable_certificate_validation": True, "default_trusted_certificate_ids": ("cert-1",)}
        none_named = model.Request(trusted_certs=())
        for request, config in (
            (certificates, {}),
            (none_named, {}),
            (None, {"verify_glance_signatures": True}),
            (None, {"enable_certificate_validation": True}),
            (None, configured),
            (certificates, configured),
        ):
            manager = self.manager(**config)
            for image_id in (ID, OTHER_ID):  # one is in the cache, fetched without any such check
                target = self.target()
                for attempt in (
                    lambda: manager.create_disk(image_id, target, request=request),  # noqa: B023
                    lambda: manager.cache_image(image_id, request=request),  # noqa: B023
                    lambda: manager.fetch_file(image_id, target, request=request),  # noqa: B023
                ):
                    with self.subTest(request=request, config=config, image_id=image_id):
                        with self.leaves_nothing(), self.assertRaises(errors.ConfigError) as caught:
                            attempt()
                        self.assertEqual(image_id, caught.exception.image)
                        self.assertIn("signature", str(caught.exception))
        self.assertEqual(1, self.source.opens)

    def test_a_base_that_was_verified_serves_those_who_demand_that(self) -> None:
        fields = json.loads(self.record().read_bytes())
        self.record().write_bytes(json.dumps(fields | {"certificates": ["cert-1"]}).encode())
        for certificates, serves in ((("cert-1",), True), (("cert-2", "cert-1"), True), (("cert-2",), False)):
            with self.subTest(certificates=certificates):
                request = model.Request(trusted_certs=certificates)
                if serves:
                    self.assertEqual(DATA, self.spawn(self.manager(), request=request))
                else:
                    self.assertRaises(errors.ConfigError, self.spawn, self.manager(), request=request)


class AdoptCase(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.base().parent.mkdir()

    def put(self, data: bytes, image_id: str = ID, *, age: float = 0) -> int:
        path = self.base(image_id)
        path.write_bytes(data)
        if age:
            files.age(path, seconds=age)
        return path.stat().st_ino

    def adopted(self, use_file: bool = False, **config: Any) -> bool:
        """Ask for the image; whether what was there served, and came out right."""
        manager = self.manager(**config)
        inode = self.base().stat().st_ino
        if use_file:
            path = self.target(f"kernel-{len(self.events)}")
            manager.fetch_file(ID, path)
            self.assertEqual(DATA, pathlib.Path(path).read_bytes())
        else:
            self.assertEqual(DATA, self.spawn(manager))
        return self.base().stat().st_ino == inode and not self.source.opens


class TestAdoption(AdoptCase):
    """Bases without our evidence, as Nova leaves them, are checked once, before their first use."""

    def test_a_good_one_serves_without_a_download_and_is_checked_once(self) -> None:
        self.put(DATA)
        self.assertTrue(self.adopted())
        self.assertTrue(self.adopted())
        self.assertEqual((1, 1), (self.happened(events.Adopted), self.source.describes))

    def test_a_lease_on_it_never_claims_a_checked_making(self) -> None:
        self.put(disk_image(self.directory, "qcow2"))
        self.source = FakeSource({ID: self.base().read_bytes()}, disk_format="qcow2", digests=False)
        with self.manager().fetch_or_reuse(ID) as base:
            self.assertEqual((None, "qcow2"), (base.digest, base.format))

    def test_a_kernel_serves_as_a_kernel_and_as_a_disk_once_it_is_inspected_as_one(self) -> None:
        self.put(DATA)
        self.assertTrue(self.adopted(use_file=True))
        self.assertIsNone(json.loads(self.record().read_bytes())["inspected"])
        self.assertTrue(self.adopted())
        self.assertIsNotNone(json.loads(self.record().read_bytes())["inspected"])

    def test_damage_is_never_served(self) -> None:
        flipped = bytearray(DATA)
        flipped[MIB // 2] ^= 1
        for name, damaged in (
            ("truncated", DATA[:MIB]),
            ("flipped", bytes(flipped)),
            ("empty", b""),
            ("longer", DATA + bytes(512)),
            ("zeros", bytes(len(DATA))),
        ):
            for use_file in (True, False):
                with self.subTest(name=name, use_file=use_file):
                    self.base().unlink(missing_ok=True)
                    self.record().unlink(missing_ok=True)
                    self.put(damaged, age=7200)
                    self.assertFalse(self.adopted(use_file))
                    self.assertEqual(DATA, self.base().read_bytes())
                    self.source = FakeSource({ID: DATA})

    def test_damage_that_somebody_refers_to_stays_and_is_not_served(self) -> None:
        self.put(DATA[:MIB], age=7200)
        instance = pathlib.Path(self.target("disk", "old-instance"))
        os.link(self.base(), instance)  # Nova's raw backend with hard links, for one
        self.assertFalse(self.adopted())
        self.assertEqual(DATA[:MIB], instance.read_bytes())
        self.assertTrue(os.path.samefile(instance, self.base()))

    def test_a_converted_one_is_inspected_and_has_the_images_virtual_size(self) -> None:
        qcow2 = disk_image(self.directory, "qcow2")
        self.source = FakeSource({ID: qcow2}, disk_format="qcow2")
        self.put(DATA)
        self.assertTrue(self.adopted())
        path = self.target("kernel")
        self.manager().fetch_file(ID, path)
        self.assertEqual(qcow2, pathlib.Path(path).read_bytes())

    def test_a_converted_one_need_not_look_like_an_image_and_must_not_look_like_another(self) -> None:
        boot_sector = DATA[:446] + bytes(64) + b"\x55\xaa" + DATA[512:]
        self.put(boot_sector)
        qcow2 = disk_image(self.directory, "qcow2", data=boot_sector)
        self.source = FakeSource({ID: qcow2}, disk_format="qcow2")
        self.assertEqual(boot_sector, self.spawn(self.manager()))
        self.assertEqual(0, self.source.opens)
        # An image within an image: whoever reads it by its looks reads another disk.
        self.record().unlink()
        self.put(disk_image(self.directory, "qcow2", data=bytes(64 * MIB)) + bytes(512), age=7200)
        self.assertEqual(boot_sector, self.spawn(self.manager()))
        self.assertEqual(1, self.source.opens)

    def test_content_that_would_be_refused_from_a_source_is_refused_here(self) -> None:
        overlay = bytearray(disk_image(self.directory, "qcow2"))
        overlay[8:20] = (512).to_bytes(8, "big") + (11).to_bytes(4, "big")
        overlay[512:523] = b"/etc/shadow"
        self.put(bytes(overlay), age=7200)
        self.source = FakeSource({ID: DATA}, sizes=False)
        self.assertFalse(self.adopted())
        self.assertEqual(DATA, self.base().read_bytes())

    def test_an_image_that_is_gone_leaves_what_is_here_to_serve(self) -> None:
        self.put(DATA)
        self.source.remove(ID)
        self.assertTrue(self.adopted())

    def test_a_source_without_sizes_and_digests_leaves_the_inspection(self) -> None:
        self.put(DATA)
        self.source = FakeSource({ID: DATA}, sizes=False, digests=False)
        self.assertTrue(self.adopted())

    def test_while_the_source_is_down_nobody_can_tell(self) -> None:
        self.put(DATA)
        self.source.fail_describe(errors.SourceError("down"))
        target = self.target()
        with self.assertRaises(errors.SourceError):
            self.manager().create_disk(ID, target)
        self.assertTrue(self.adopted())

    def test_the_file_keeps_its_name_its_inode_and_its_bytes(self) -> None:
        inode = self.put(DATA)
        self.adopted()
        self.assertEqual((inode, DATA), (self.base().stat().st_ino, self.base().read_bytes()))


class TestEvidenceIsBoundToTheFile(AdoptCase):
    def replace(self, data: bytes) -> None:
        """What Nova does: the same name, another file."""
        new = self.base().with_suffix(".converted")
        new.write_bytes(data)
        files.age(new, seconds=7200)
        os.rename(new, self.base())

    def test_a_base_replaced_behind_our_back_is_adopted_and_never_verified(self) -> None:
        self.manager().cache_image(ID)
        fields = json.loads(self.record().read_bytes())
        self.record().write_bytes(json.dumps(fields | {"certificates": ["cert-1"]}).encode())
        self.replace(DATA)
        request = model.Request(trusted_certs=("cert-1",))
        self.assertRaises(errors.ConfigError, self.spawn, self.manager(), request=request)
        self.assertEqual(DATA, self.spawn(self.manager()))
        self.assertEqual((1, 1), (self.happened(events.Adopted), self.source.opens))
        self.assertRaises(errors.ConfigError, self.spawn, self.manager(), request=request)

    def test_bad_bytes_put_under_a_cached_name_are_not_served(self) -> None:
        self.manager().cache_image(ID)
        self.replace(raw_image(3))
        self.assertEqual(DATA, self.spawn(self.manager()))
        self.assertEqual(2, self.source.opens)

    def test_the_same_inode_number_and_size_do_not_make_it_the_same_file(self) -> None:
        self.manager().cache_image(ID)
        inode, record = self.base().stat().st_ino, self.record().read_bytes()
        for _ in range(200):  # ext4 gives the number out again at once; others may not
            self.base().unlink()
            self.base().write_bytes(raw_image(3))
            os.utime(self.base(), (1, 1))
            if self.base().stat().st_ino == inode:
                break
        fields = json.loads(record) | {"inode": self.base().stat().st_ino}
        self.record().write_bytes(json.dumps(fields).encode())
        self.assertEqual(DATA, self.spawn(self.manager()))
        self.assertEqual(2, self.source.opens)

    def test_a_record_of_another_size_is_none(self) -> None:
        self.manager().cache_image(ID)
        with self.base().open("r+b") as file:
            file.truncate(MIB)
        os.utime(self.base(), (1, 1))
        self.assertEqual(DATA, self.spawn(self.manager()))
        self.assertEqual(2, self.source.opens)

    def test_a_base_that_carries_no_id_is_bound_by_inode_and_size(self) -> None:
        # libvirt gives bases to QEMU's user; then we may not mark them any more.
        self.manager().cache_image(ID)
        os.removexattr(self.base(), layout.ID_ATTRIBUTE)
        fields = json.loads(self.record().read_bytes()) | {"base_id": "", "origin": "adopted"}
        self.record().write_bytes(json.dumps(fields).encode())
        opened = CacheStore(self.manager().config, self.host()).open_base(self.base().name)
        assert opened is not None
        self.addCleanup(opened.close)
        self.assertEqual(DATA, self.spawn(self.manager()))
        self.assertEqual((1, 0), (self.source.opens, self.happened(events.Adopted)))


class TestInspectedWhereItLies(AdoptCase):
    """What lacks nothing but an inspection under today's rules gets one, and keeps its other evidence."""

    def change_record(self, **fields: object) -> None:
        changed = json.loads(self.record().read_bytes()) | fields
        self.record().write_bytes(json.dumps(changed).encode())

    def test_rules_that_changed_cost_no_download_and_no_other_evidence(self) -> None:
        iso = bytes(32769) + b"CD001" + bytes(98304 - 32774)
        qcow2 = disk_image(self.directory, "qcow2")
        for disk_format, data, force_raw in (
            ("raw", DATA, True),
            ("iso", iso, True),
            ("qcow2", qcow2, True),
            ("qcow2", qcow2, False),
        ):
            with self.subTest(disk_format=disk_format, force_raw=force_raw):
                self.source = FakeSource({ID: data}, disk_format=disk_format)
                manager = self.manager(force_raw_images=force_raw)
                disk = manager.create_disk(ID, self.target())
                content, inode = content_of(disk.target, "qcow2"), self.base().stat().st_ino
                self.change_record(certificates=["cert-1"])
                before = json.loads(self.record().read_bytes())
                self.change_record(inspected=0)
                self.source.fail_describe(errors.SourceError("down"))
                request = model.Request(trusted_certs=("cert-1",))
                self.assertEqual(content, self.spawn(self.manager(), request=request))
                self.assertEqual(before, json.loads(self.record().read_bytes()))
                self.assertEqual((inode, 1), (self.base().stat().st_ino, self.source.opens))
                self.assertEqual(0, self.happened(events.Adopted) + self.happened(events.Bypassed))
                manager.remove_disk(disk)
                manager.evict_image(ID)

    def test_content_that_the_rules_refuse_now_is_not_served(self) -> None:
        qcow2 = disk_image(self.directory, "qcow2")
        self.source = FakeSource({ID: qcow2}, disk_format="qcow2")
        manager = self.manager(force_raw_images=False, space_minimum_age_seconds=0)
        manager.cache_image(ID)
        self.change_record(inspected=0)
        with self.base().open("r+b") as file:
            file.seek(8)
            file.write((512).to_bytes(8, "big") + (11).to_bytes(4, "big"))  # a backing file
        self.assertEqual(DATA, self.spawn(manager))
        self.assertEqual((2, qcow2), (self.source.opens, self.base().read_bytes()))

    def spoil(self, data: bytes) -> None:
        """Have what an earlier release took for a disk, and today's does not."""
        self.change_record(inspected=evidence.INSPECTION_RULES - 1)
        with self.base().open("r+b") as file:
            file.write(data)

    def test_text_is_no_disk_any_more_unless_a_digest_vouches_for_it(self) -> None:
        said = b"the image is not here, ask again later\n" * 100
        for digests, served, opens in ((False, DATA, 2), (True, said + DATA[len(said) :], 1)):
            with self.subTest(digests=digests):
                self.source = FakeSource({ID: DATA}, disk_format="raw", digests=digests)
                manager = self.manager(space_minimum_age_seconds=0)
                manager.cache_image(ID)
                self.spoil(said)
                self.assertEqual(served, self.spawn(manager))
                self.assertEqual(opens, self.source.opens)
                manager.evict_image(ID)

    def test_text_is_not_adopted_unless_a_digest_vouches_for_it(self) -> None:
        self.put(b"the image is not here, ask again later\n" * 100)
        self.source = FakeSource({ID: DATA}, digests=False, sizes=False)
        self.assertFalse(self.adopted(space_minimum_age_seconds=0))

    def test_what_was_unpacked_is_inspected_as_the_image_that_it_is(self) -> None:
        packed = pathlib.Path(self.directory, "packed")
        packed.write_bytes(gzip.compress(DATA))
        table = {ID: ic.FileImage(str(packed), disk_format="raw", compression="gzip")}
        manager = self.manager(ic.FileSource(table), space_minimum_age_seconds=0)
        manager.cache_image(ID)
        self.spoil(b"PK\x03\x04")
        self.assertEqual(DATA, self.spawn(manager))

    def test_a_plain_file_that_is_the_disk_that_is_wanted_becomes_one(self) -> None:
        qcow2 = disk_image(self.directory, "qcow2")
        for disk_format, data, force_raw in (("raw", DATA, True), ("qcow2", qcow2, False)):
            with self.subTest(disk_format):
                self.source = FakeSource({ID: data}, disk_format=disk_format)
                manager = self.manager(force_raw_images=force_raw)
                manager.fetch_file(ID, self.target(f"kernel-{disk_format}"))
                self.assertEqual(DATA, self.spawn(manager))
                with manager.fetch_or_reuse(ID) as base:
                    self.assertEqual((disk_format, len(DATA)), (base.format, base.virtual_size))
                    self.assertIsNotNone(base.digest)
                self.assertEqual((1, 0), (self.source.opens, self.happened(events.Bypassed)))
                manager.evict_image(ID)

    def test_a_plain_file_that_is_no_acceptable_disk_is_refused_as_one(self) -> None:
        self.source = FakeSource({ID: DATA}, disk_format="qcow2")
        manager = self.manager()
        manager.fetch_file(ID, self.target("kernel"))
        with self.assertRaises(errors.ImageRejected):
            manager.create_disk(ID, self.target())
        manager.fetch_file(ID, self.target("kernel-2"))

    def test_a_conversion_that_nobody_inspected_proves_nothing_by_its_looks(self) -> None:
        self.source = FakeSource({ID: disk_image(self.directory, "qcow2")}, disk_format="qcow2")
        self.manager(disable_deep_image_inspection=True).cache_image(ID)
        self.assertEqual(DATA, self.spawn(self.manager(space_minimum_age_seconds=0)))
        self.assertEqual(2, self.source.opens)
