# SPDX-License-Identifier: Apache-2.0
"""A cache that is removed, mounted over, copied or restored while a manager runs or before one starts."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import subprocess
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.store import evidence, layout
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.testing.sources import FakeSource
from imagecache_lib.upkeep import scrub
from tests.support.cache_case import ID, OTHER_ID, CacheCase, content_of, disk_image, raw_image


class TestRemovedCache(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.service = self.manager()
        self.spawn(self.service)
        self.turn = 0

    def use(self) -> None:
        """Do what a compute service does."""
        self.turn += 1
        self.assertEqual(raw_image(1), self.spawn(self.service))
        self.service.create_swap(self.target(f"swap{self.turn}"), size_mb=16)
        self.service.pin(ID, owner="operator")
        report = self.service.verify_base_images(())
        self.assertEqual((), report.problems)
        self.assertEqual(["here"], [host.name for host in self.service.list_hosts()])

    def test_a_running_manager_makes_a_removed_cache_anew(self) -> None:
        shutil.rmtree(self.instances / "_base")
        with self.assertLogs("imagecache_lib", "WARNING") as said:
            self.use()
        self.assertIn("preparing it anew", said.output[0])

    def test_a_running_manager_makes_any_part_of_the_cache_anew(self) -> None:
        private = self.instances / "_base" / ".imagecache"
        for part in (private, *sorted(private.iterdir()), self.instances / "locks"):
            with self.subTest(part.name):
                shutil.rmtree(part) if part.is_dir() else part.unlink()
                self.use()

    def test_a_part_that_goes_long_after_the_last_look_is_made_anew(self) -> None:
        now = [0.0]
        self.service = self.manager(host=self.host(monotonic=lambda: now[0]))
        private = self.instances / "_base" / ".imagecache"
        self.use()
        for part in sorted(path for path in private.iterdir() if path.is_dir()):
            with self.subTest(part.name):
                for _look in range(3):
                    now[0] += 10
                    self.assertTrue(self.service.is_cached(ID))
                self.let_clock_go_on(private)
                shutil.rmtree(part)
                self.use()

    def let_clock_go_on(self, changed: pathlib.Path) -> None:
        """Return once a change of a file has another time than the last change of ``changed``."""
        file = self.instances / "clock"
        while True:
            file.touch()
            if file.stat().st_ctime_ns > changed.stat().st_ctime_ns:
                return

    def test_each_call_of_a_running_manager_works_first(self) -> None:
        for call in (
            lambda: self.service.cache_image(ID),
            lambda: self.service.is_cached(ID),
            self.service.list_bases,
            self.service.list_pins,
            self.service.survey,
            self.service.prune,
            self.service.scrub,
            self.service.audit,
            self.service.get_space,
            self.service.get_disk_usage,
            lambda: self.service.evict_image(ID),
            lambda: self.service.explain(ID, ()),
            lambda: self.service.unpin(ID, owner="operator"),
            self.service.preflight,
            lambda: self.service.forget_disks(str(self.instances / "gone")),
        ):
            shutil.rmtree(self.instances / "_base", ignore_errors=True)  # not every call makes it
            call()

    def test_another_cache_in_its_place_is_used(self) -> None:
        base = self.instances / "_base"
        base.rename(self.instances / "old")
        for path in (base, base / ".imagecache"):
            path.mkdir()
        self.use()
        self.assertEqual(b"1\n", (base / ".imagecache" / "version").read_bytes())

    def test_a_later_layout_that_appears_is_refused(self) -> None:
        base = self.instances / "_base"
        base.rename(self.instances / "old")
        (base / ".imagecache").mkdir(parents=True)
        (base / ".imagecache" / "version").write_text("9\n")
        with self.assertRaises(errors.ConfigError):
            self.service.cache_image(ID)

    def test_a_fetch_under_way_begins_anew(self) -> None:
        shutil.rmtree(self.instances / "_base")
        for point in (TracePoint.INGEST_RESERVED, TracePoint.INGEST_SEALED, TracePoint.PUBLISH_LINK):
            with self.subTest(point):
                self.points.at(point, lambda: shutil.rmtree(self.instances / "_base"))
                self.assertEqual(raw_image(1), self.spawn(self.service))
                shutil.rmtree(self.instances / "_base")

    def test_a_disk_whose_base_is_removed_while_it_is_made_gets_a_new_one(self) -> None:
        self.points.at(TracePoint.DISK_MADE, lambda: shutil.rmtree(self.instances / "_base"))
        disk = self.service.create_disk(ID, self.target())
        self.assertEqual(raw_image(1), content_of(disk.target, "qcow2"))

    def test_removed_instances_are_no_reason_to_make_a_cache(self) -> None:
        shutil.rmtree(self.instances)
        with self.assertRaises(errors.ConfigError):
            self.service.cache_image(ID)
        self.assertFalse(self.instances.exists())


class TestCopiedCache(CacheCase):
    """The source is down all the while: it fails whoever asks it, and counts who does."""

    def setUp(self) -> None:
        super().setUp()
        self.manager().cache_image(ID)
        self.before = self.evidence()
        self.down = FakeSource({ID: raw_image(1)})
        self.down.fail_describe(*[errors.SourceError("the service is down") for _turn in range(9)])

    def copy(self, *options: str) -> None:
        """Replace the cache by a copy of it."""
        base, copy = self.instances / "_base", self.directory / "copy"
        subprocess.run(["cp", "-r", *options, base, copy], check=True)
        shutil.rmtree(base)
        copy.rename(base)

    def evidence(self) -> evidence.Record:
        found = evidence.parse(self.record().read_bytes())
        assert found is not None
        return found

    def serves(self, **options: Any) -> ic.ImageCacheManager:
        manager = self.manager(self.down, **options)
        self.assertEqual(raw_image(1), self.spawn(manager))
        self.assertEqual(0, self.down.describes)
        return manager

    def refuses(self) -> None:
        with self.assertRaises(errors.SourceError):
            self.manager(self.down).create_disk(ID, self.target())

    def test_a_copy_without_attributes_serves_without_its_source(self) -> None:
        self.copy("--no-preserve=all")
        manager = self.serves()
        found = self.evidence()
        self.assertIs(evidence.Origin.ADOPTED, found.origin)
        self.assertEqual(self.before.digest, found.digest)
        self.assertEqual(1, self.happened(events.Adopted))
        # What is bound again can be scrubbed, and needs no second look.
        (scrubbed,) = manager.scrub().bases
        self.assertIs(scrub.Verdict.SOUND, scrubbed.verdict)
        self.serves()
        self.assertEqual(1, self.happened(events.Adopted))

    def test_a_copy_with_attributes_serves_without_its_source(self) -> None:
        self.copy("-a")
        self.serves()

    def test_a_base_that_is_restored_beside_its_record_serves_without_its_source(self) -> None:
        backup = self.directory / "backup"
        shutil.copyfile(self.base(), backup)
        self.base().unlink()
        shutil.copyfile(backup, self.base())
        self.serves()

    def test_a_damaged_base_that_is_restored_is_damaged_no_more(self) -> None:
        backup = self.directory / "backup"
        shutil.copyfile(self.base(), backup)
        self.record().write_bytes(dataclasses.replace(self.before, damaged=True).to_json())
        os.replace(backup, self.base())
        self.serves()

    def test_no_certificate_vouches_for_a_copy(self) -> None:
        signed = dataclasses.replace(self.before, certificates=("root",), signed_by="signer")
        self.record().write_bytes(signed.to_json())
        self.copy("--no-preserve=all")
        self.serves()
        self.assertEqual(((), None), (self.evidence().certificates, self.evidence().signed_by))

    def test_a_copy_that_was_inspected_under_older_rules_is_inspected_again(self) -> None:
        self.record().write_bytes(dataclasses.replace(self.before, inspected=1).to_json())
        self.copy("--no-preserve=all")
        self.serves()
        self.assertEqual(evidence.INSPECTION_RULES, self.evidence().inspected)

    def test_a_copy_of_a_kernel_serves_without_its_source(self) -> None:
        self.copy("--no-preserve=all")
        self.manager(self.down).fetch_file(ID, self.target("kernel"))
        self.assertEqual(raw_image(1), pathlib.Path(self.target("kernel")).read_bytes())

    def test_other_content_of_the_same_size_is_not_bound(self) -> None:
        self.copy("--no-preserve=all")
        with open(self.base(), "r+b") as file:
            file.write(b"\0")
        self.refuses()

    def test_a_shorter_copy_is_not_bound(self) -> None:
        self.copy("--no-preserve=all")
        os.truncate(self.base(), 2**20)
        self.refuses()

    def test_a_copy_that_differs_serves_nobody_though_its_source_is_gone(self) -> None:
        self.manager().create_disk(ID, self.target())  # it stays, and stays what it is
        self.copy("--no-preserve=all")
        with open(self.base(), "r+b") as file:
            file.seek(2**21 + 2**19)
            file.write(bytes(4096))
        gone = self.manager(FakeSource({}))
        for _turn in range(2):
            with self.assertRaises(errors.ImageNotFound):
                gone.create_disk(ID, self.target("other"))
        self.assertTrue(self.evidence().damaged)
        self.assertEqual(0, self.happened(events.Adopted))
        self.assertEqual(raw_image(1), self.spawn(self.manager()))

    def test_a_conversion_that_was_copied_and_differs_is_made_anew(self) -> None:
        # Nothing the source says of it tells whether the copy is whole.
        self.source = FakeSource({OTHER_ID: disk_image(self.directory, "qcow2")}, disk_format="qcow2")
        self.manager().cache_image(OTHER_ID)
        self.copy("-a")
        with open(self.base(OTHER_ID), "r+b") as file:
            file.write(bytes(4096))
        self.assertEqual(raw_image(1), self.spawn(self.manager(), OTHER_ID))
        self.assertEqual(2, self.source.opens)

    def test_the_beginning_of_a_copy_serves_nobody_though_its_source_is_gone(self) -> None:
        for options in ("--no-preserve=all", "-a"):
            for size in (1, 2**16 - 1, 2**16, 2**20, 3 * 2**20 - 1):
                with self.subTest(options, size=size):
                    shutil.rmtree(self.instances / "_base")
                    self.manager().cache_image(ID)
                    self.copy(options)
                    os.truncate(self.base(), size)
                    with self.assertRaises(errors.ImageNotFound):
                        self.manager(FakeSource({})).create_disk(ID, self.target("other"))

    def test_a_smaller_file_of_the_image_that_another_program_made_is_adopted(self) -> None:
        self.base().unlink()
        self.base().write_bytes(raw_image(2)[: 2**20])
        self.manager(FakeSource({})).create_disk(ID, self.target("other"))
        self.assertEqual(1, self.happened(events.Adopted))

    def test_nothing_is_bound_by_torn_checksums_or_none(self) -> None:
        self.copy("--no-preserve=all")
        sums = self.record().with_suffix(".sums")
        for content in (sums.read_bytes()[:-1], b""):
            sums.write_bytes(content)
            self.refuses()
        sums.unlink()
        self.refuses()

    def test_another_images_record_binds_nothing(self) -> None:
        self.record().write_bytes(dataclasses.replace(self.before, image_id=OTHER_ID).to_json())
        self.copy("--no-preserve=all")
        self.refuses()

    def test_an_id_of_another_publisher_binds_nothing(self) -> None:
        self.copy("--no-preserve=all")
        os.setxattr(self.base(), layout.ID_ATTRIBUTE, b"0" * 32)
        self.refuses()

    def test_a_crash_after_the_id_leaves_what_can_be_bound(self) -> None:
        self.copy("--no-preserve=all")
        os.setxattr(self.base(), layout.ID_ATTRIBUTE, self.before.base_id.encode())
        self.serves()

    def test_a_caller_who_no_longer_waits_ends_the_reading(self) -> None:
        self.copy("--no-preserve=all")
        manager = self.manager(self.down)
        manager.shutdown()
        with self.assertRaises(errors.CancelledError):
            manager.create_disk(ID, self.target())


class TestPassedOver(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.keeper = self.manager(remove_unused_original_minimum_age_seconds=0)
        self.keeper.create_disk(ID, self.target())
        self.snapshot = self.instances / ".snapshot" / "nightly.0" / "instance-1"

    def remove_but_for(self, copy: pathlib.Path) -> None:
        shutil.copytree(self.instances / "instance-1", copy)
        shutil.rmtree(self.instances / "instance-1")

    def test_snapshots_of_a_filer_keep_no_base(self) -> None:
        for name in (".snapshot", ".zfs"):
            self.remove_but_for(self.instances / "pool" / name / "nightly.0" / "instance-1")
            report = self.keeper.verify_base_images(())
            self.assertEqual((1, ()), (len(report.evicted), report.problems))
            self.keeper.create_disk(ID, self.target())

    def test_a_link_to_snapshots_keeps_no_base(self) -> None:
        self.remove_but_for(self.directory / "elsewhere" / "instance-1")
        (self.instances / ".snapshot").symlink_to(self.directory / "elsewhere")
        self.assertEqual(1, len(self.keeper.verify_base_images(()).evicted))

    def test_a_name_that_the_operator_gives_is_passed_over(self) -> None:
        self.remove_but_for(self.instances / "backups" / "instance-1")
        self.assertEqual(0, len(self.keeper.verify_base_images(()).evicted))
        keeper = self.manager(
            remove_unused_original_minimum_age_seconds=0, passed_over_directories=("backups",)
        )
        # A disk that was seen there is no disk that was removed: only the operator can tell.
        report = keeper.verify_base_images(())
        self.assertEqual(0, len(report.evicted))
        (problem,) = report.problems
        self.assertIn(f"imagecache disk forget {self.instances}/backups", problem)
        self.assertEqual(1, keeper.forget_disks(f"{self.instances}/backups"))
        self.assertEqual(1, len(keeper.verify_base_images(()).evicted))

    def test_a_disk_of_that_name_is_a_disk(self) -> None:
        os.rename(self.target(), self.instances / ".snapshot")
        self.assertEqual((), self.keeper.verify_base_images(()).evicted)

    def test_a_reported_instances_directory_is_read_whatever_its_name(self) -> None:
        os.rename(self.instances / "instance-1", self.instances / "backups")
        keeper = self.manager(
            remove_unused_original_minimum_age_seconds=0, passed_over_directories=("backups",)
        )
        self.assertEqual((), keeper.verify_base_images([ic.Instance("backups", "here")]).evicted)

    def test_no_overlay_is_made_where_it_would_not_be_seen(self) -> None:
        (self.instances / "backups" / "vm").mkdir(parents=True)
        (self.instances / "link").symlink_to(self.instances / "backups")
        manager = self.manager(passed_over_directories=("backups",))
        for place in ("backups/vm", "link/vm"):
            with self.assertRaisesRegex(errors.BackendError, "passed over"):
                manager.create_disk(ID, str(self.instances / place / "disk"))

    def test_a_root_below_such_a_name_is_a_root(self) -> None:
        root = self.directory / ".snapshot" / "root"
        (root / "vm").mkdir(parents=True)
        disk = self.manager(disk_roots=(str(root),)).create_disk(ID, str(root / "vm" / "disk"))
        self.assertEqual("qcow2", disk.format)

    def test_snapshots_of_the_cache_itself_are_no_part_of_it(self) -> None:
        used = self.keeper.get_disk_usage()
        shutil.copytree(self.instances / "_base", self.instances / "_base" / ".snapshot" / "nightly.0")
        self.assertEqual(used, self.keeper.get_disk_usage())
        self.assertEqual((), self.keeper.verify_base_images(()).problems)

    def test_names_that_are_none_are_refused(self) -> None:
        wrong: Any
        for wrong in ("backups", ("",), ("a/b",), ("..",)):
            with self.assertRaisesRegex(errors.ConfigError, "passed_over_directories"):
                ic.CacheConfig(instances_path=str(self.instances), passed_over_directories=wrong)
