# SPDX-License-Identifier: Apache-2.0
"""The periodic pass on real directories: what it finds, what it keeps, what it removes, what it says."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Sequence
from typing import Any

import imagecache_lib as ic
from imagecache_lib import dates, errors
from imagecache_lib.store import layout
from imagecache_lib.upkeep.report import VerifyReport
from tests.support import files
from tests.support.cache_case import ID, OTHER_ID, CacheCase, Points, raw_image

NAME = layout.base_name(ID)
DAY = 86400
OLD = 2 * DAY


class UpkeepCase(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.cache_dir = self.instances / "_base"
        self.private = self.cache_dir / ".imagecache"

    def cached(self, image_id: str = ID, *, seconds: float = OLD) -> pathlib.Path:
        """Cache an image, and let it be unused for so long."""
        self.manager().cache_image(image_id)
        return self.unused(image_id, seconds=seconds)

    def unused(self, image_id: str = ID, *, seconds: float = OLD) -> pathlib.Path:
        files.age(self.base(image_id), self.record(image_id), seconds=seconds)
        return self.base(image_id)

    def foreign(self, name: str, content: bytes = b"x" * 4096, *, seconds: float = OLD) -> pathlib.Path:
        """Put a file into the cache as Nova would."""
        self.cache_dir.mkdir(exist_ok=True)
        path = self.cache_dir / name
        path.write_bytes(content)
        files.age(path, seconds=seconds)
        return path

    def verify(
        self, instances: Sequence[ic.Instance] | None = (), *, dry_run: bool = False, **options: Any
    ) -> VerifyReport:
        return self.manager(**options).verify_base_images(instances, dry_run=dry_run)

    def reason(self, report: VerifyReport, name: str = NAME) -> str:
        return next(base.reason for base in report.bases if base.name == name)

    def assertKept(self, path: pathlib.Path, report: VerifyReport, because: str) -> None:
        self.assertTrue(path.exists(), report)
        self.assertIn(because, self.reason(report, path.name))


class TestWhatIsRead(UpkeepCase):
    def test_what_nobody_uses_goes(self) -> None:
        base = self.cached()
        report = self.verify()
        self.assertFalse(base.exists())
        self.assertFalse(self.record().exists())
        self.assertEqual([NAME], [each.name for each in report.evicted])
        self.assertEqual([], list((self.private / "trash").iterdir()))

    def test_every_disk_everywhere_counts(self) -> None:
        base = self.cached()
        for where in (
            "uuid/disk",
            "uuid/disk.rescue",
            "uuid/disk.local",
            "uuid/disk.eph1",
            "uuid/anything",
            "uuid_resize/disk",
            "uuid_del/disk",
            "instance-00000001/disk",
            "uuid/snapshots/deep/er/one.snap",
            "snapshots/abc/disk.delta",
            "loose-disk",
        ):
            with self.subTest(where):
                path = self.instances / where
                files.overlay(path, str(base))
                self.unused()
                self.assertKept(base, self.verify(), str(path))
                path.unlink()

    def test_every_way_to_write_a_reference_counts(self) -> None:
        base = self.cached()
        as_json = {"driver": "raw", "file": {"driver": "file", "filename": f"/mnt/{NAME}"}}
        for backing in (
            f"../_base/{NAME}",
            f"/other/mount/point/_base/{NAME}",
            f"file:{base}",
            "json:" + json.dumps(as_json),
        ):
            with self.subTest(backing):
                files.overlay(self.instances / "uuid" / "disk", backing)
                self.unused()
                self.assertKept(base, self.verify(), "uuid/disk")

    def test_shared_ephemeral_and_swap_bases_in_use_stay(self) -> None:
        for name in ("swap_512", "ephemeral_10_40d1d2c", f"{NAME}_20", f"{NAME}_sm"):
            with self.subTest(name):
                base = self.foreign(name)
                files.overlay(self.instances / "uuid" / "disk.eph1", str(base))
                self.assertKept(base, self.verify(), "disk.eph1")
                (self.instances / "uuid" / "disk.eph1").unlink()
                files.age(base, seconds=OLD)
                self.verify()
                self.assertFalse(base.exists())

    def test_a_chain_through_files_elsewhere_is_followed(self) -> None:
        base = self.cached()
        outside = self.directory / "snapshots"
        files.overlay(outside / "one", str(base))
        files.overlay(outside / "two", "json:" + json.dumps({"file": {"filename": str(outside / "one")}}))
        files.overlay(self.instances / "uuid" / "disk", "../../snapshots/two", backing_format="qcow2")
        self.assertKept(base, self.verify(), "uuid/disk")

    def test_symbolic_links_are_followed_and_loops_end(self) -> None:
        base = self.cached()
        elsewhere = self.directory / "elsewhere"
        files.overlay(elsewhere / "uuid" / "disk", str(base))
        (self.instances / "uuid").symlink_to(elsewhere / "uuid")
        (elsewhere / "uuid" / "again").symlink_to(self.instances)
        (self.instances / "loop").symlink_to("loop")
        (self.instances / "nowhere").symlink_to("/nonexistent")
        report = self.verify()
        self.assertKept(base, report, "disk")
        self.assertEqual((), report.problems)

    def test_what_lay_behind_a_link_that_leads_nowhere_now_stays(self) -> None:
        base = self.cached()
        elsewhere = self.directory / "elsewhere"
        files.overlay(elsewhere / "uuid" / "disk", str(base))
        (self.instances / "uuid").symlink_to(elsewhere / "uuid")
        self.verify()
        elsewhere.rename(self.directory / "unmounted")
        self.unused()
        report = self.verify()
        self.assertKept(base, report, "uuid/disk")
        self.assertIn("leads nowhere", report.problems[0])

    def test_hard_links_count(self) -> None:
        base = self.cached()
        os.link(base, self.directory / "mine")
        self.assertKept(base, self.verify(), "hard link")

    def test_what_the_driver_reports_counts(self) -> None:
        base, swap = self.cached(), self.foreign("swap_64")
        ephemeral, resized = self.foreign("ephemeral_5_40d1d2c"), self.foreign(f"{NAME}_10")
        (self.instances / "uuid").mkdir()
        instance = ic.Instance("uuid", "here", images=(ID,), swap_mb=64, ephemerals=(ic.Ephemeral(5),))
        report = self.verify([instance])
        for path in (base, swap, ephemeral, resized):
            self.assertKept(path, report, "instance uuid on here")
        self.assertLess(time.time() - base.stat().st_mtime, 60, "its age begins anew, for Nova too")

    def test_a_disk_in_the_making_counts_and_is_removed_when_its_maker_is_dead(self) -> None:
        base = self.cached()
        path = self.instances / "uuid" / f".disk.{'0' * 32}.new"
        files.overlay(path, str(base))
        self.assertKept(base, self.verify(), path.name)
        files.age(path, seconds=OLD)
        self.verify()
        self.assertFalse(path.exists())
        self.unused()
        self.verify()
        self.assertFalse(base.exists())

    def test_what_a_guest_writes_never_stops_eviction(self) -> None:
        for content in (b"QFI\xfb" + b"\xff" * 600, b"QFI\xfb", b"QFI\xfb" + bytes(8192), b"", b"\0" * 512):
            with self.subTest(content[:8]):
                base = self.cached()
                (self.instances / "uuid").mkdir(exist_ok=True)
                (self.instances / "uuid" / "disk").write_bytes(content)
                report = self.verify()
                self.assertFalse(base.exists())
                self.assertEqual((), report.problems)

    def test_a_broken_header_keeps_the_names_that_are_near_it(self) -> None:
        base = self.cached()
        (self.instances / "uuid").mkdir()
        (self.instances / "uuid" / "disk").write_bytes(b"QFI\xfb" + b"\xff" * 9000 + os.fsencode(base))
        self.assertKept(base, self.verify(), "uuid/disk")

    def test_a_disk_that_is_pinned_raw_counts_by_the_names_in_it_and_no_more(self) -> None:
        base, other = self.cached(), self.cached(OTHER_ID)
        between = self.directory / "elsewhere" / "between"
        files.overlay(between, other)
        for instance, backing in (("a", base), ("b", between)):
            disk = self.instances / instance / "disk"
            files.overlay(disk, backing)
            (disk.parent / "disk.info").write_text(json.dumps({str(disk): "raw"}))
        report = self.verify()
        self.assertKept(base, report, "a/disk")
        self.assertFalse(other.exists(), "a path that its guest may have written was followed")
        self.assertEqual((), report.problems)

    def test_a_torn_disk_info_pins_nothing(self) -> None:
        base = self.cached()
        disk = self.instances / "uuid" / "disk"
        files.overlay(disk, str(base))
        (disk.parent / "disk.info").write_text(json.dumps({str(disk): "raw"})[:-3])
        self.assertKept(base, self.verify(), "uuid/disk")

    def test_a_disk_that_vanishes_or_a_pipe_in_its_place_stops_nothing(self) -> None:
        base = self.cached()
        directory = self.instances / "uuid"
        files.overlay(directory / "disk", "/elsewhere")
        os.mkfifo(directory / "console.pipe")
        self.points.at("references:known", (directory / "disk").unlink)
        self.verify()
        self.assertFalse(base.exists())

    def test_a_directory_renamed_while_others_are_read_is_not_missed(self) -> None:
        for known in (True, False):
            with self.subTest(known=known):
                for name in ("abc", "def", "ghi"):
                    (self.instances / name).mkdir()
                base = self.cached()
                listed = [entry.name for entry in os.scandir(self.instances) if len(entry.name) == 3]
                first, last = self.instances / listed[0], self.instances / listed[-1]
                (first / f".x.{'0' * 32}.new").write_bytes(b"")
                files.overlay(last / "disk", str(base))
                # The last one gets another name when the first is read, and the listing has the old one; and
                # in the second reading, if there is one, again.
                self.points = Points()
                renamed = self.instances / f"{last.name}_resize"
                self.points.at("references:unfinished", lambda old=last, new=renamed: old.rename(new))  # type: ignore[misc]
                self.points.at("references:unfinished", lambda old=last, new=renamed: new.rename(old))  # type: ignore[misc]
                instances = [ic.Instance(last.name, "there")] if known else []
                self.assertKept(base, self.verify(instances), "/disk")
                for path in self.instances.glob("???*/*"):
                    if "_base" not in path.parts:
                        path.unlink()
                for directory in (first, self.instances / listed[1], renamed):
                    directory.rmdir()

    def test_a_directory_that_is_renamed_away_and_back_while_it_is_read_is_not_missed(self) -> None:
        for name in ("abc", "def"):
            (self.instances / name).mkdir()
        base = self.cached()
        listed = [entry.name for entry in os.scandir(self.instances) if len(entry.name) == 3]
        first, last = self.instances / listed[0], self.instances / listed[-1]
        (first / f".x.{'0' * 32}.new").write_bytes(b"")
        files.overlay(last / "disk", str(base))
        # It is away as it is to be read, and back when the directory above is listed again.
        self.away_and_back(last, looks=2)
        self.assertKept(base, self.verify(), "/disk")

    def test_a_disk_that_is_renamed_away_and_back_while_it_is_read_is_not_missed(self) -> None:
        base = self.cached()
        directory = self.instances / "uuid"
        directory.mkdir()
        disk = directory / "disk"
        for turn in range(100):
            unfinished = directory / f".x.{turn:032x}.new"
            # Whatever order a filesystem lists names in, there is one that comes first.
            if turn % 2:
                unfinished.write_bytes(b"")
            files.overlay(disk, str(base))
            unfinished.write_bytes(b"")
            if [entry.name for entry in os.scandir(directory)] == [unfinished.name, disk.name]:
                break
            unfinished.unlink()
            disk.unlink()
        self.away_and_back(disk, looks=2)
        self.assertKept(base, self.verify(), "/disk")

    def test_what_is_listed_and_never_found_is_told_by_its_name_and_keeps_every_base(self) -> None:
        base = self.cached()
        root = self.directory / "root"
        directory, away = root / "abc", self.directory / "away"
        root.mkdir()
        away.mkdir()

        def toggle(point: str) -> None:
            # It is there as the root is listed, and away as it is to be read.
            if point == "references:directory":
                old, new = (directory, away) if directory.exists() else (away, directory)
                old.rename(new)

        keeper = self.manager(host=self.host(trace=toggle), disk_roots=(str(root),))
        report = keeper.verify_base_images([])
        self.assertKept(base, report, "is listed, and is not found")
        self.assertIn(str(directory), report.problems[0])

    def away_and_back(self, path: pathlib.Path, *, looks: int) -> None:
        """Rename something when an unfinished disk is read, and back at a later look at a directory, in two
        readings.

        :param looks: the number of that look.
        """
        away = path.with_name(f"{path.name}_resize")

        def rename() -> None:
            path.rename(away)
            for _look in range(looks - 1):
                self.points.at("references:directory", lambda: None)
            self.points.at("references:directory", lambda: away.rename(path))

        for _reading in range(2):
            self.points.at("references:unfinished", rename)


class TestWhatCannotBeTold(UpkeepCase):
    def test_no_report_keeps_everything(self) -> None:
        base = self.cached()
        self.assertKept(base, self.verify(None), "the driver could not tell")

    def test_a_reported_instance_without_a_directory_keeps_its_images_and_no_others(self) -> None:
        base, other = self.cached(), self.cached(OTHER_ID)
        report = self.verify([ic.Instance("gone", "here", images=(ID,))])
        self.assertKept(base, report, "used by instance gone on here")
        self.assertIn("Instance gone is on this host and has no directory", report.problems[0])
        self.assertIn("disk_roots", report.problems[0])
        self.assertFalse(other.exists())
        self.assertEqual((), self.verify([ic.Instance("gone", "elsewhere")]).problems)

    def test_a_tree_too_deep_to_be_read_keeps_the_images_of_its_instance_and_no_others(self) -> None:
        base, other = self.cached(), self.cached(OTHER_ID)
        files.make_deep(self.instances / "deep", os.pathconf(self.instances, "PC_PATH_MAX"))
        report = self.verify([])
        self.assertKept(base, report, "nested so deep")
        self.assertRegex(report.problems[0], f"below {self.instances}/deep are .*remove them, or move them")
        report = self.verify([ic.Instance("deep", "here", images=(ID,))])
        self.assertTrue(base.exists())
        self.assertFalse(other.exists())
        self.assertIn("the images of instance deep stay", report.problems[0])
        self.unused()
        self.verify([ic.Instance("deep", "here")])
        self.assertFalse(base.exists(), "an instance that was booted from a volume uses none")

    def test_a_missing_disk_root_keeps_everything_and_stays_remembered(self) -> None:
        base = self.cached()
        second = self.directory / "second"
        second.mkdir()
        roots = (str(self.instances), str(second))
        self.verify(disk_roots=roots)
        self.assertFalse(base.exists())
        base = self.cached()
        second.rmdir()
        report = self.verify(disk_roots=roots)
        self.assertKept(base, report, str(second))

    def test_a_torn_or_unknown_pin_keeps(self) -> None:
        pin = self.private / "pins" / f"{NAME}.json"
        for content in (
            "",
            "{",
            "[]",
            '{"image_id": 7, "pins": []}',
            '{"image_id": "x", "pins": [{"owner": 1}]}',
        ):
            with self.subTest(content):
                base = self.cached()
                pin.write_text(content)
                self.assertKept(base, self.verify(), "unreadable")

    def test_a_pin_beside_a_torn_one_does_not_free_it(self) -> None:
        base = self.cached()
        (self.private / "pins" / f"{NAME}.json").write_text("{")
        manager = self.manager()
        manager.pin(ID, owner="me")
        manager.unpin(ID, owner="me")
        self.assertKept(base, self.verify(), "unreadable")

    def test_pins_keep_until_they_expire(self) -> None:
        base = self.cached()
        self.manager().pin(ID, owner="roll-out", expires=time.time() + 1000)
        self.assertKept(base, self.verify(), "pinned by roll-out until")
        self.manager().pin(ID, owner="roll-out", expires=time.time() - 1)
        self.unused()  # a pin keeps it fresh too, or a Nova beside us would remove it
        self.verify()
        self.assertFalse(base.exists())

    def test_a_torn_record_counts_as_none(self) -> None:
        base = self.cached()
        self.record().write_text("{")
        files.age(self.record(), seconds=OLD)
        self.verify()
        self.assertFalse(base.exists())
        self.assertFalse(self.record().exists())

    def test_a_bad_image_id_in_the_report_is_a_problem_and_hides_nothing_else(self) -> None:
        base, other = self.cached(), self.cached(OTHER_ID)
        for bad in (None, "", "a\nb", "\ud800", 7):
            with self.subTest(repr(bad)):
                instance = ic.Instance("one", "elsewhere", images=(bad, ID))  # type: ignore[arg-type]
                report = self.verify([instance], dry_run=True)
                self.assertEqual("used by instance one on elsewhere", self.reason(report))
                self.assertEqual([other.name], [each.name for each in report.evicted])
                self.assertIn("instance one uses an image", report.problems[0])
        self.assertTrue(base.exists())

    def test_a_bad_directory_in_the_report_is_a_problem_and_vouches_for_nothing(self) -> None:
        self.cached()
        (self.instances / "uuid").mkdir()
        for bad in (None, "", ".", "..", "../..", "/etc", "a\0b", "\ud800", 7, "x" * 256):
            with self.subTest(repr(bad)):
                instance = ic.Instance("uuid", "here", directories=(bad,))  # type: ignore[arg-type]
                report = self.verify([instance], dry_run=True)
                self.assertIn(f"reports {errors.shown(bad)} as a directory", report.problems[0])
                self.assertEqual([NAME], [each.name for each in report.evicted])
                # As the only name there is, it would make up a directory for an instance without one.
                instance = ic.Instance(bad, "here")  # type: ignore[arg-type]
                report = self.verify([instance], dry_run=True)
                self.assertIn("has no directory", " ".join(report.problems))
                self.assertEqual([NAME], [each.name for each in report.evicted])

    def test_an_id_in_another_form_than_text_keeps_its_image(self) -> None:
        base = self.cached()
        forms: tuple[Any, ...] = (uuid.UUID(ID), ID.encode(), pathlib.PurePath(ID))
        for id in forms:
            with self.subTest(type(id)):
                instance = ic.Instance(id, "there", images=(id,), directories=(id,))
                self.assertKept(base, self.verify([instance]), f"used by instance {ID} on there")
                self.assertKept(base, self.manager().prune(None, older_than=0), "used by instance")

    def test_whatever_is_reported_can_be_read_by_the_next_pass(self) -> None:
        self.cached()
        odd: tuple[Any, ...] = ([1], {}, None, 1.5, 10**5000, object(), "\ud800")
        for each in odd:
            with self.subTest(type(each)):
                self.verify([ic.Instance(each, each, images=(each,), directories=(each,))])
                again = self.manager().prune(None, older_than=0, dry_run=True)
                self.assertNotIn("what the last pass saw", " ".join(again.problems))


class TestWhatGoes(UpkeepCase):
    def test_last_use_is_the_later_of_the_base_and_its_record(self) -> None:
        base = self.cached()
        files.age(self.record(), seconds=DAY - 100)
        self.assertKept(base, self.verify(), "too young by 1 min")
        files.age(self.record(), seconds=OLD)
        files.age(base, seconds=DAY - 100)
        self.assertKept(base, self.verify(), "too young by 1 min")

    def test_legacy_resized_bases_go_sooner(self) -> None:
        resized, original = self.foreign(f"{NAME}_20", seconds=4000), self.foreign(NAME, seconds=4000)
        self.verify()
        self.assertEqual((False, True), (resized.exists(), original.exists()))

    def test_ages_are_measured_by_the_filesystem_and_not_by_the_host(self) -> None:
        for skew in (-100 * DAY, 100 * DAY):
            base = self.cached(seconds=DAY / 2)
            host = self.host(clock=lambda skew=skew: time.time() + skew)
            report = self.manager(host=host).verify_base_images([])
            self.assertKept(base, report, "too young")

    def test_a_time_that_lies_ahead_does_not_keep_a_base_for_years(self) -> None:
        base = self.cached(seconds=-365 * DAY)
        self.verify()
        self.assertLess(abs(time.time() - base.stat().st_mtime), 60)

    def test_nothing_goes_where_removing_is_off(self) -> None:
        base = self.cached()
        report = self.verify(remove_unused_base_images=False, max_cache_size=1)
        self.assertKept(base, report, "remove_unused_base_images is off")

    def test_what_a_crash_left_in_the_trash_is_put_back_or_removed(self) -> None:
        for used in (True, False):
            with self.subTest(used=used):
                base = self.cached()
                if used:
                    files.overlay(self.instances / "uuid" / "disk", str(base))
                directory = self.private / "trash" / f"{NAME}.{'1' * 32}"
                directory.mkdir()
                base.rename(directory / "base")
                dry = self.verify(dry_run=True)
                report = self.verify()
                self.assertEqual(used, base.exists())
                self.assertFalse(directory.exists())
                self.assertEqual(dry.bases, report.bases)
                if used:
                    (self.instances / "uuid" / "disk").unlink()
                    self.unused()

    def test_the_trash_gives_everything_back_where_removing_is_off(self) -> None:
        base = self.cached()
        directory = self.private / "trash" / f"{NAME}.{'1' * 32}"
        directory.mkdir()
        base.rename(directory / "base")
        self.verify(remove_unused_base_images=False)
        self.assertTrue(base.exists())

    def test_an_eviction_that_was_killed_is_undone_at_the_next_start(self) -> None:
        base = self.cached()
        child = os.fork()
        if child == 0:
            self.points.at("evict:renamed", lambda: os._exit(9))
            try:
                self.verify()
            finally:
                os._exit(1)
        self.assertEqual(9, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        self.assertFalse(base.exists())
        self.manager().get_disk_usage()
        self.manager().pin(OTHER_ID, owner="start")
        self.assertTrue(base.exists())

    def test_a_record_that_a_killed_eviction_left_goes_later(self) -> None:
        class Killed(BaseException):
            pass

        def kill() -> None:
            raise Killed

        self.cached()
        self.points.at("evict:unlinked", kill)
        with self.assertRaises(Killed):
            self.verify()
        self.assertTrue(self.record().exists())
        self.verify()
        self.assertFalse(self.record().exists())

    def test_a_second_reading_that_is_interrupted_puts_back_what_the_pass_took(self) -> None:
        class Interrupt(BaseException):
            pass

        for error in (Interrupt(), OSError(24, "Too many open files"), MemoryError()):

            def interrupt(error: BaseException = error) -> None:
                raise error

            bases = [self.cached(), self.cached(OTHER_ID)]
            inodes = [base.stat().st_ino for base in bases]
            self.points.at("evict:renamed", lambda: None)
            self.points.at("evict:renamed", lambda: None)
            self.points.at("references:known", lambda: None)
            self.points.at("references:known", interrupt)
            with self.assertRaises((Interrupt, errors.ImageCacheError, MemoryError)):
                self.verify()
            self.assertEqual(inodes, [base.stat().st_ino for base in bases])
            self.assertEqual([], list((self.private / "trash").iterdir()))

    def test_an_announced_eviction_that_was_killed_leaves_nothing(self) -> None:
        base = self.cached()
        directory = self.private / "trash" / f"{NAME}.{'1' * 32}"
        directory.mkdir()
        files.age(directory, seconds=OLD)
        self.verify()
        self.assertFalse(directory.exists())
        self.assertFalse(base.exists())

    def test_a_dry_run_says_what_the_pass_does_and_changes_nothing(self) -> None:
        self.cached()
        self.cached(OTHER_ID)
        self.foreign("swap_64")
        files.overlay(self.instances / "uuid" / "disk", str(self.base(OTHER_ID)))
        self.verify(None)
        self.unused()
        self.unused(OTHER_ID)
        with self.leaves_nothing():
            dry = self.verify(dry_run=True)
        report = self.verify()
        self.assertEqual(dry.bases, report.bases)
        self.assertEqual({NAME, "swap_64"}, {base.name for base in report.evicted})

    def test_a_leased_base_stays(self) -> None:
        base = self.cached()
        with self.manager().fetch_or_reuse(ID):
            self.unused()
            dry = self.verify(dry_run=True)
            report = self.verify()
            self.assertKept(base, report, "leased")
            self.assertEqual(dry.bases, report.bases)

    def test_leftovers_of_nova_go_after_a_day_if_its_lock_is_free(self) -> None:
        old, fresh = self.foreign(f"{NAME}.part"), self.foreign(f"{NAME}.converted", seconds=3600)
        strange = self.foreign("notes.txt.part")
        report = self.verify()
        self.assertEqual((False, True, True), (old.exists(), fresh.exists(), strange.exists()))
        self.assertIn("notes.txt.part", report.problems[0])

    def test_what_is_not_ours_stays_as_it_is(self) -> None:
        self.cached()
        for name in ("README", NAME[:39], f"{NAME}.part.bak", "swap_x"):
            self.foreign(name)
        (self.cache_dir / layout.base_name("dir")).mkdir()
        (self.cache_dir / layout.base_name("link")).symlink_to("/etc/hostname")
        before = {path.name for path in self.cache_dir.iterdir()} - {NAME}
        self.verify()
        self.assertEqual(before, {path.name for path in self.cache_dir.iterdir()})

    def test_evict_by_hand_heeds_references_but_not_ages(self) -> None:
        base = self.cached(seconds=0)
        files.overlay(self.instances / "uuid" / "disk", str(base))
        with self.assertRaisesRegex(errors.BackendError, "uuid/disk"):
            self.manager().evict_image(ID)
        (self.instances / "uuid" / "disk").unlink()
        self.manager().evict_image(ID)
        self.assertFalse(base.exists())

    def test_pressure_spares_the_young(self) -> None:
        base, other = self.cached(seconds=60), self.cached(OTHER_ID, seconds=2 * 3600)
        report = self.verify(max_cache_size=1)
        self.assertKept(base, report, "too young")
        self.assertFalse(other.exists())

    def test_a_spawn_between_the_readings_keeps_its_base(self) -> None:
        for locking, points in ((True, ["verify:read"]), (False, ["verify:read", "evict:announced"])):
            for point in points:
                with self.subTest((locking, point)):
                    base = self.cached()
                    target = self.target(instance=f"{locking}-{point.replace(':', '')}")
                    spawner = self.manager(host=self.host(locking=locking, trace=lambda _point: None))
                    self.points.at(point, lambda t=target, s=spawner: s.create_disk(ID, t))  # type: ignore[misc]
                    report = self.manager(host=self.host(locking=locking)).verify_base_images([])
                    self.assertTrue(base.exists(), report)
                    self.assertEqual(raw_image(1)[:64], base.read_bytes()[:64])
                    os.unlink(target)

    def test_a_record_of_another_file_does_not_make_a_base_look_used(self) -> None:
        self.cached()
        os.utime(self.record())
        report = self.verify(dry_run=True)
        self.assertIn("too young", self.reason(report))
        new = self.foreign(f"{NAME}.converted", raw_image(3), seconds=0)
        files.age(new, seconds=OLD)
        os.rename(new, self.base())  # as Nova does
        os.utime(self.record())
        report = self.verify(dry_run=True)
        self.assertEqual([NAME], [each.name for each in report.evicted])


class TestFilesystemOfItsOwn(UpkeepCase):
    def test_what_mkfs_left_in_the_caches_filesystem_is_no_problem(self) -> None:
        base = self.cached()
        (base.parent / "lost+found").mkdir(mode=0o700)
        self.assertEqual((), self.verify().problems)
        self.assertFalse(base.exists())
        (base.parent / "lost+found.old").mkdir()
        self.assertIn("lost+found.old", self.verify().problems[0])


class TestSharedStorage(UpkeepCase):
    def on(self, name: str, **options: object) -> ic.ImageCacheManager:
        return self.manager(host=self.host(name=name), **options)  # type: ignore[arg-type]

    def test_a_base_goes_once_every_host_has_looked(self) -> None:
        base = self.cached()
        self.on("there").verify_base_images(None)
        report = self.verify()
        self.assertFalse(base.exists())
        self.assertIn("until these hosts have looked too: there", self.reason(report))
        self.assertEqual((), report.problems, "nobody was silent yet")
        self.assertEqual(1, len(os.listdir(self.private / "trash")))
        self.assertTrue(self.on("there").verify_base_images([]).evicted)
        self.assertEqual([], os.listdir(self.private / "trash"))

    def test_another_hosts_disk_puts_it_back(self) -> None:
        base = self.cached()
        roots = self.directory / "theirs"
        roots.mkdir()
        there = self.on("there", disk_roots=(str(roots),))
        there.verify_base_images(None)
        files.overlay(roots / "uuid" / "disk", str(base))
        self.unused()
        self.verify()
        self.assertFalse(base.exists())
        there.verify_base_images([])
        self.assertTrue(base.exists())
        self.assertEqual([], os.listdir(self.private / "trash"))

    def test_a_spawn_elsewhere_between_plan_and_unlink_is_safe(self) -> None:
        base = self.cached()
        there = self.manager(host=self.host(name="there", trace=lambda _point: None))
        there.verify_base_images(None)
        self.unused()
        target = self.target()
        self.points.at("evict:read", lambda: there.create_disk(ID, target))
        self.verify()
        self.assertTrue(base.exists())
        self.assertEqual(1, self.source.opens)

    def test_a_silent_host_is_a_problem_until_it_is_forgotten(self) -> None:
        self.cached()
        self.cached(OTHER_ID)
        self.on("silent").verify_base_images(None)
        for image in (ID, OTHER_ID):
            self.unused(image)
        self.verify()
        (told,) = self.verify().problems
        held = sum(path.stat().st_blocks * 512 for path in (self.private / "trash").glob("*/base"))
        self.assertIn(dates.size(held), told)
        self.assertIn("silent", told)
        host_id = told.split("imagecache host forget ")[1].strip()
        self.manager().forget_host(host_id)
        self.assertEqual(2, len(self.verify().evicted))

    def test_a_torn_host_file_keeps(self) -> None:
        base = self.cached()
        (self.private / "hosts" / f"{'deadbeef' * 4}.json").write_text("{")
        report = self.verify()
        self.assertFalse(base.exists())
        self.assertIn("deadbeef", self.reason(report))
        self.assertEqual(1, len(os.listdir(self.private / "trash")))

    def test_a_copy_of_a_host_file_is_no_host_to_wait_for(self) -> None:
        self.cached()
        hosts = self.private / "hosts"
        (own,) = hosts.glob("*.json")
        for name in ("backup.json", f"{own.stem}.bak.json", f"copy of {own.name}"):
            shutil.copyfile(own, hosts / name)
        (evicted,) = self.verify().evicted
        self.assertEqual(NAME, evicted.name)
        self.assertEqual([], os.listdir(self.private / "trash"))
        (registered,) = self.manager().list_hosts()
        self.assertEqual(own.stem, registered.id)

    def test_novas_registry_is_kept_fresh_if_there_is_one(self) -> None:
        registry = self.instances / "compute_nodes"
        self.verify()
        self.assertFalse(registry.exists())
        registry.write_text(json.dumps({"nova-host": 12.5, "here": 1.0}))
        self.verify()
        found = json.loads(registry.read_text())
        self.assertEqual(12.5, found["nova-host"])
        self.assertLess(abs(time.time() - found["here"]), 60)
        registry.write_text('{"nova-')
        self.verify()
        self.assertEqual('{"nova-', registry.read_text())
