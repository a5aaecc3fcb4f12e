# SPDX-License-Identifier: Apache-2.0
"""Odd entries in the place of small files and locks: each keeps what it may mean, and stops nothing else."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.store import layout, pins
from imagecache_lib.system import holders, locks
from imagecache_lib.testing.sources import FakeSource
from tests.flows.test_small_files import SmallFilesCase
from tests.flows.test_upkeep import NAME, OLD
from tests.support import files
from tests.support.cache_case import ID, OTHER_ID, raw_image

OTHER_NAME = layout.base_name(OTHER_ID)


class TestOddEntries(SmallFilesCase):
    """What no program of the cache makes, in the place of what it made."""

    def test_a_link_that_leads_nowhere_instead_of_the_directory_of_pins_pins(self) -> None:
        base = self.cached()
        self.manager().pin(ID, owner="me")
        path = self.private / "pins" / NAME
        oddities: tuple[Callable[[], object], ...] = (lambda: path.symlink_to("nowhere"), path.touch)
        for make in oddities:
            with self.subTest(make):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                make()
                self.assertKept(base, self.verify(), f"its pins cannot be read; make {path} a directory")
                (told,) = self.manager().list_pins()
                self.assertEqual(pins.UNREADABLE, told.pin.owner)
                self.assertIn(pins.STAND_IN, path.with_suffix(".json").read_text(), "for other releases")

    def test_what_lies_beside_a_base_and_cannot_be_removed_does_not_keep_it(self) -> None:
        base = self.cached()
        self.record().unlink()
        self.record().mkdir()
        files.age(self.record(), seconds=OLD)
        self.manager().evict_image(ID)
        self.assertFalse(base.exists())
        self.assertEqual(1, self.happened(events.Evicted))

    def test_no_lock_of_the_whole_cache_stops_it_if_its_file_cannot_be_opened(self) -> None:
        base = self.cached()
        (host,) = self.manager().list_hosts()
        (self.instances / "compute_nodes").write_text("{}")
        names = ["space", "room", f"evict-{host.id[:8]}", *(f"disk-info-{number:x}" for number in range(16))]
        for name in (*(f"imagecache-{each}" for each in names), "storage-registry-lock"):
            path = self.instances / "locks" / f"nova-{name}"
            path.unlink(missing_ok=True)
            path.mkdir()
        self.spawn(self.manager(), OTHER_ID)
        with self.assertRaises(errors.NoSpaceError):
            self.manager(FakeSource({"third": raw_image(3)}), free_space_low=2**60).cache_image("third")
        self.unused()
        self.verify()
        self.assertFalse(base.exists())

    def test_a_directory_in_the_place_of_the_own_host_s_file_is_a_member(self) -> None:
        self.cached()
        disk = self.instances / "uuid" / "disk"
        files.overlay(disk, self.base())
        (host,) = self.manager().list_hosts()
        path = self.private / "hosts" / f"{host.id}.json"
        path.unlink()
        path.mkdir()
        self.spawn(self.manager(), OTHER_ID)
        self.unused(OTHER_ID)
        self.assertIn(str(disk), self.reason(self.verify()))
        self.assertFalse(self.base(OTHER_ID).exists())
        (kept,) = (self.private / "hosts").glob("*.scan")
        self.assertIn(NAME, kept.read_text(), "it is remembered though the roots are not")
        elsewhere = self.manager(host=self.host(name="there"))
        disk.unlink()
        self.verify()  # which finds the base too young
        self.unused()
        self.assertIn("until these hosts have looked too", self.reason(elsewhere.verify_base_images([])))

    def test_a_note_of_what_is_in_flight_that_cannot_be_read_keeps_every_base_and_is_told(self) -> None:
        base = self.cached()
        stage = self.private / "stage" / ("ab" * 16)
        note = stage.with_suffix(".json")
        stage.touch()
        note.symlink_to("nowhere")
        for dry_run in (True, False):
            self.assertKept(base, self.verify(dry_run=dry_run), f"{note} cannot be read")
        note.unlink()
        note.write_text("{")
        held = locks.HeldDescriptor(str(stage), os.O_RDWR)
        owner = holders.OwnerLock(held, self.host())
        for dry_run in (True, False):
            self.assertKept(base, self.verify(dry_run=dry_run), f"{note} cannot be read")
        owner.close()
        self.verify()
        self.assertFalse(base.exists(), "what a dead owner left is never published")

    def test_what_a_pass_saw_and_cannot_write_down_keeps_every_base(self) -> None:
        """The next pass would not know of those disks: what they lie on may not be mounted by then."""
        base, disk = self.cached(), self.instances / "uuid" / "disk"
        self.cached(OTHER_ID)
        self.verify()
        self.cached()
        files.overlay(disk, self.base(OTHER_ID))
        (scan,) = (self.private / "hosts").glob("*.scan")
        scan.unlink()
        scan.mkdir()
        report = self.verify()
        self.assertKept(base, report, f"cannot be remembered: {scan}")
        self.assertIn("move away what is in its place", report.problems[0])
        scan.rmdir()
        self.verify()
        self.assertFalse(base.exists())
        self.assertIn(OTHER_NAME, scan.read_text())

    def test_what_a_pass_saw_and_could_not_write_down_is_known_to_the_next_one_of_its_process(self) -> None:
        manager, volume = self.manager(), self.directory / "volume"
        manager.verify_base_images([])
        base = self.cached()
        files.overlay(volume / "disk", base)
        (self.instances / "uuid").symlink_to(volume)
        (scan,) = (self.private / "hosts").glob("*.scan")
        scan.unlink()
        scan.mkdir()
        manager.verify_base_images([])
        scan.rmdir()
        volume.rename(self.directory / "away")
        for _pass in range(2):
            self.unused()
            manager.verify_base_images([])
            self.assertTrue(base.exists())
            manager = self.manager()  # by then it is written down

    def test_a_report_that_cannot_be_read_is_not_replaced_by_none(self) -> None:
        base = self.cached()
        self.verify([ic.Instance("uuid", "there", images=(ID,))])
        (scan,) = (self.private / "hosts").glob("*.scan")
        scan.write_text("torn")
        self.verify(None)
        self.unused()
        with self.assertRaisesRegex(errors.BaseInUseError, "cannot be read"):
            self.manager().evict_image(ID)
        self.assertTrue(base.exists())

    def test_what_other_releases_read_cannot_be_written_and_stops_nothing(self) -> None:
        self.cached()
        self.verify()
        base = self.cached()
        self.cached(OTHER_ID)
        files.overlay(self.instances / "uuid" / "disk", self.base(OTHER_ID))
        (readings,) = (self.private / "hosts").glob("*.readings")
        readings.unlink()
        readings.mkdir()
        self.verify()
        self.assertFalse(base.exists())

    def test_a_record_of_what_was_seen_that_cannot_be_read_is_not_replaced_by_a_word_about_another_path(
        self,
    ) -> None:
        """It may tell of disks on what is not mounted now, and of what the driver reported."""
        base, volume = self.cached(), self.directory / "volume"
        (self.instances / "uuid").symlink_to(volume)
        files.overlay(volume / "disk", base)
        self.verify()
        volume.rename(self.directory / "away")
        hosts = self.private / "hosts"
        for damaged in ("*.scan", "*.[rs]*n*"):
            for path in hosts.glob(damaged):
                path.write_text("torn")
            with (
                self.subTest(damaged),
                self.assertRaisesRegex(errors.BackendError, "cannot be read") as caught,
            ):
                self.manager().forget_disks("/elsewhere")
            self.assertTrue(str(caught.exception.path).endswith(".scan"), caught.exception)
            self.unused()
            self.verify()
            self.assertTrue(base.exists())

    def test_what_a_pass_sees_while_an_operator_has_other_disks_forgotten_is_remembered(self) -> None:
        base, volume, made = self.cached(), self.directory / "volume", self.directory / "made"
        files.overlay(self.instances / "gone" / "disk", base)
        self.verify()
        files.overlay(made / "disk", base)
        (self.instances / "uuid").symlink_to(volume)

        def see(event: events.Event) -> None:
            if isinstance(event, events.Forgotten):
                made.rename(volume)
                self.verify()

        config = ic.CacheConfig(instances_path=str(self.instances))
        operator = ic.ImageCacheManager(config, self.source, host=self.host(), observers=(see,))
        operator.forget_disks(str(self.instances / "gone"))
        shutil.rmtree(self.instances / "gone")
        volume.rename(self.directory / "away")
        self.unused()
        self.verify()
        self.assertTrue(base.exists())

    def test_what_is_in_the_way_is_named_and_is_to_be_moved_away(self) -> None:
        self.cached()
        manager, target = self.manager(), self.instances / "uuid" / "disk"
        target.parent.mkdir()
        pins_of, lock = self.private / "pins" / NAME, self.instances / "locks" / f"nova-{NAME}"
        spawn = lambda: manager.create_disk(ID, str(target))  # noqa: E731
        oddities: tuple[tuple[pathlib.Path, Callable[[pathlib.Path], object], Callable[[], object]], ...] = (
            (self.record(), os.mkdir, spawn),
            (lock, os.mkdir, spawn),
            (lock, lambda path: path.symlink_to(path), spawn),
            (target.with_name("disk.info"), os.mkdir, spawn),
            (pins_of, lambda path: path.symlink_to("nowhere"), lambda: manager.pin(ID, owner="me")),
            (pins_of, lambda path: path.touch(), lambda: manager.pin(ID, owner="me")),
        )
        for path, make, call in oddities:
            with self.subTest(path.name, make=make):
                path.unlink(missing_ok=True)
                make(path)
                with self.assertRaises(errors.BackendError) as caught:
                    call()
                self.assertEqual(str(path), caught.exception.path)
                self.assertIn("move it away", str(caught.exception.next_step))
                path.rmdir() if path.is_dir() else path.unlink()
        call()

    def test_a_version_that_is_no_file_is_never_taken_for_the_own_one(self) -> None:
        self.cached()
        version = self.private / "version"
        oddities: tuple[Callable[[], object], ...] = (
            version.mkdir,
            lambda: version.symlink_to("nowhere"),
            lambda: os.mkfifo(version),
        )
        for make in oddities:
            version.rmdir() if version.is_dir() else version.unlink()
            make()
            with self.subTest(make), self.assertRaises(errors.ConfigError) as caught:
                self.verify()
            self.assertIn("put a file there in which is 1", str(caught.exception.next_step))


class TestScrubs(SmallFilesCase):
    def damaged(self) -> None:
        with open(self.cached(), "r+b") as file:
            file.write(b"rot")

    def test_checksums_that_cannot_be_read_stop_no_other_check(self) -> None:
        self.damaged()
        self.cached(OTHER_ID)
        sums = self.record(OTHER_ID).with_suffix(".sums")
        sums.unlink()
        sums.symlink_to("nowhere")
        found = {base.name: base.verdict for base in self.manager().scrub(rate=0).bases}
        self.assertEqual(ic.Verdict.DAMAGED, found[NAME])
        self.assertEqual(2, len(found))

    def test_damage_is_told_though_its_lock_cannot_be_opened(self) -> None:
        self.damaged()
        lock = self.instances / "locks" / f"nova-{NAME}"
        lock.unlink(missing_ok=True)
        lock.mkdir()
        (found,) = self.manager().scrub(rate=0).bases
        self.assertEqual(ic.Verdict.DAMAGED, found.verdict)
        self.assertIn("the lock file cannot be opened", str(found.stays))


class TestObserversThatAsk(SmallFilesCase):
    def test_one_that_calls_the_manager_as_that_starts_is_answered(self) -> None:
        self.cached()
        leftover = self.private / "stage" / ("ab" * 16)
        leftover.touch()
        files.age(leftover, seconds=OLD)
        asked = []

        def observe(event: events.Event) -> None:
            if isinstance(event, events.Recovered):
                asked.append(manager.get_space())

        config = ic.CacheConfig(instances_path=str(self.instances))
        manager = ic.ImageCacheManager(config, self.source, host=self.host(), observers=(observe,))
        self.comes_back(manager.list_hosts)
        self.assertTrue(asked)


class TestHostNames(SmallFilesCase):
    def test_one_that_is_no_text_is_a_host_s(self) -> None:
        """The kernel takes any bytes for a name."""
        base = self.cached()
        manager = self.manager(host=self.host(name="h\udcff"))
        self.assertEqual({"here", "h\udcff"}, {host.name for host in manager.list_hosts()})
        self.spawn(manager)
        self.unused()
        manager.verify_base_images([])
        self.assertFalse(base.exists())
