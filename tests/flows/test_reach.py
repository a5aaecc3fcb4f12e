# SPDX-License-Identifier: Apache-2.0
"""An overlay is made only where the pass will see it: elsewhere its base would go while the disk needs it."""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.store import layout
from imagecache_lib.system import locks
from tests.support import files
from tests.support.cache_case import ID, CacheCase

MIB = 2**20


class TestReach(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.outside = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def make(self, directory: str | os.PathLike[str], **options: Any) -> ic.Disk:
        os.makedirs(directory, exist_ok=True)
        return self.manager(**options).create_disk(ID, os.path.join(directory, "disk"), size=16 * MIB)

    def assert_refused(self, directory: str | os.PathLike[str], **options: Any) -> errors.BackendError:
        with self.assertRaises(errors.BackendError) as caught:
            self.make(directory, **options)
        self.assertEqual(0, self.source.opens)
        self.assertEqual([], [name for name in os.listdir(directory) if "disk" in name])
        return caught.exception

    def assert_protects(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """A disk may be made there, and the pass then keeps its base, however old."""
        self.make(directory, **options)
        for path in (self.base(), self.record()):
            os.utime(path, (0, 0))
        report = self.manager(**options).verify_base_images([])
        self.assertEqual([False], [base.evicted for base in report.bases])

    def test_outside_every_root_nothing_is_fetched(self) -> None:
        error = self.assert_refused(self.outside / "vm")
        for said in (ID, str(self.outside / "vm" / "disk"), str(self.instances), "disk_roots"):
            self.assertIn(said, str(error))

    def test_no_swap_is_made_outside_every_root(self) -> None:
        with self.assertRaises(errors.BackendError):
            self.manager().create_swap(str(self.outside / "swap"), size_mb=1)
        self.assertEqual([], os.listdir(self.outside))

    def test_a_disk_that_stands_alone_may_be_anywhere(self) -> None:
        self.assertIsNone(self.make(self.outside / "vm", backend="raw").base)

    def test_once_it_is_a_disk_root_it_is_fine(self) -> None:
        roots = (str(self.instances), str(self.outside))
        self.assert_protects(self.outside / "vm", disk_roots=roots)

    def test_the_instances_directory_counts_only_if_it_is_a_root(self) -> None:
        self.assert_refused(self.instances / "vm", disk_roots=(str(self.outside),))

    def test_any_depth_below_a_root_is_seen(self) -> None:
        self.assert_protects(self.instances / "a" / "b" / ".c" / "d")

    def test_a_root_itself_is_seen(self) -> None:
        self.assert_protects(self.instances)

    def test_a_root_that_is_a_link_means_what_it_leads_to(self) -> None:
        link = self.outside / "root"
        link.symlink_to(self.instances)
        self.assert_protects(self.instances / "vm", disk_roots=(str(link),))

    def test_a_path_that_leads_into_a_root_is_fine(self) -> None:
        (self.outside / "link").symlink_to(self.instances)
        self.assert_protects(self.outside / "link" / "vm")

    def test_an_instance_directory_may_be_a_link_out_of_its_root(self) -> None:
        (self.outside / "vm").mkdir()
        (self.instances / "vm").symlink_to(self.outside / "vm")
        self.assert_protects(self.instances / "vm" / "snapshots")

    def test_a_disk_beside_what_such_a_link_leads_to_is_refused(self) -> None:
        for name in ("vm", "other"):
            (self.outside / name).mkdir()
        (self.instances / "vm").symlink_to(self.outside / "vm")
        self.assert_refused(os.path.join(self.instances, "vm", "..", "other"))

    def test_no_disk_is_made_among_the_cache_s_own_files(self) -> None:
        self.manager().unpin(ID, owner="nobody")  # makes the directories
        own = ("_base", "_base/vm", "_base/.imagecache/stage")
        for directory in (self.instances / name for name in own):
            with self.subTest(directory):
                self.assertIn("cache's own", str(self.assert_refused(directory)))

    def test_no_disk_is_made_where_the_release_before_looks_for_none(self) -> None:
        """It does not read below the directory of lock files, and would evict the base."""
        instance = pathlib.Path(self.target()).parent
        roots = (str(self.directory),)
        self.assertIn("lock_path", str(self.assert_refused(self.instances / "locks" / "vm")))
        for path in (self.instances, instance):
            with self.subTest(path):
                self.assert_refused(instance, disk_roots=roots, lock_path=str(path))

    def test_no_disk_is_made_among_the_cache_s_own_files_through_a_link(self) -> None:
        self.manager().unpin(ID, owner="nobody")
        (self.instances / "vm").symlink_to(self.base().parent / ".imagecache")
        self.assert_refused(self.instances / "vm")

    def test_an_overlay_that_came_from_elsewhere_is_not_given_a_base_there(self) -> None:
        disk = self.make(self.instances / "vm")
        moved = shutil.move(disk.target, str(self.outside / "disk"))
        with self.assertRaises(errors.BackendError) as caught:
            self.manager().ensure_backing(moved, image_id=ID)
        self.assertIn("disk_roots", str(caught.exception))


class TestRootsOfTheCache(CacheCase):
    """Disk roots that are directories of the cache, too."""

    def assert_disks_are_seen(self, directory: pathlib.Path, **options: Any) -> None:
        manager = self.manager(**options)
        for backend in ("qcow2", "raw"):
            target = str(directory / backend)
            with self.subTest(backend):
                disk = manager.create_disk(ID, target, backend=backend)
                manager.resize_disk(disk, 8 * MIB, backend=backend)
                manager.create_disk(ID, target, if_exists="reuse", backend=backend)
        self.age()
        self.assertEqual((), manager.verify_base_images([]).evicted)
        with self.assertRaises(errors.BaseInUseError):
            manager.evict_image(ID)
        for backend in ("qcow2", "raw"):
            manager.remove_disk(manager.inspect_disk(str(directory / backend)), backend=backend)
        self.age()
        self.assertEqual(1, len(manager.verify_base_images([]).evicted))

    def age(self) -> None:
        for path in (self.base(), self.record()):
            os.utime(path, (0, 0))

    def test_locks_may_lie_among_instances(self) -> None:
        self.assert_disks_are_seen(pathlib.Path(self.target()).parent, lock_path=str(self.instances))

    def test_a_link_to_the_instances_may_be_the_directory_of_locks(self) -> None:
        link = self.directory / "locks"
        link.symlink_to(self.instances)
        self.assert_disks_are_seen(pathlib.Path(self.target()).parent, lock_path=str(link))

    def test_disks_of_other_programs_below_the_directory_of_locks_are_seen(self) -> None:
        instance = pathlib.Path(self.target()).parent
        self.manager().cache_image(ID)
        files.overlay(instance / "disk", self.base())
        for path in (self.instances, instance):
            with self.subTest(path):
                manager = self.manager(disk_roots=(str(self.directory),), lock_path=str(path))
                self.age()
                self.assertEqual((), manager.verify_base_images([]).evicted)
                with self.assertRaises(errors.BaseInUseError):
                    manager.evict_image(ID)
        (instance / "disk").unlink()
        self.age()
        self.assertEqual(1, len(self.manager().verify_base_images([]).evicted))

    def test_a_pass_drops_no_lock_that_this_process_has(self) -> None:
        """POSIX locks, as Nova's, go with the first descriptor of the file that is closed."""
        directory = self.instances / "locks"
        directory.mkdir()
        with open(directory / layout.lock_name("any"), "w") as held:
            fcntl.lockf(held, fcntl.LOCK_EX)
            for path in (directory, self.directory / "elsewhere"):
                self.manager(lock_path=str(path)).verify_base_images([])
            with open(held.name) as other:
                self.assertTrue(locks.is_locked(other.fileno()))

    def test_the_directory_of_locks_may_be_a_disk_root(self) -> None:
        directory = self.instances / "locks"
        directory.mkdir()
        self.assert_disks_are_seen(directory, disk_roots=(str(directory),))


class TestOtherProcesses(CacheCase):
    """Two processes of one host whose configurations name different disk roots."""

    def setUp(self) -> None:
        super().setUp()
        self.outside = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.time = 0.0
        self.other = self.manager(
            disk_roots=(str(self.outside),), host=self.host(monotonic=lambda: self.time)
        )

    def age(self) -> None:
        for path in (self.base(), self.record()):
            os.utime(path, (0, 0))

    def notes(self) -> list[pathlib.Path]:
        return sorted(self.base().parent.glob(".imagecache/hosts/*.roots"))

    def outside_note(self) -> pathlib.Path:
        (note,) = [path for path in self.notes() if str(self.outside) in path.read_text()]
        return note

    def is_kept(self) -> bool:
        self.age()
        (base,) = self.manager().verify_base_images([]).bases
        return not base.evicted

    def test_a_disk_protects_its_base_before_its_own_process_made_a_pass(self) -> None:
        self.other.create_disk(ID, str(self.outside / "disk"))
        self.assertTrue(self.is_kept())

    def test_it_protects_its_base_from_an_eviction_by_name(self) -> None:
        self.other.create_disk(ID, str(self.outside / "disk"))
        self.age()
        with self.assertRaises(errors.BaseInUseError):
            self.manager().evict_image(ID)
        self.assertTrue(self.base().exists())

    def test_a_disk_that_is_made_after_a_pass_and_with_the_note_from_before_counts(self) -> None:
        os.unlink(self.other.create_disk(ID, str(self.outside / "disk")).target)
        self.manager().verify_base_images([])
        noted = self.outside_note().stat()
        self.other.create_disk(ID, str(self.outside / "disk"))
        self.assertEqual(noted.st_ino, self.outside_note().stat().st_ino)
        self.assertTrue(self.is_kept())

    def test_a_process_that_goes_on_says_so_again(self) -> None:
        self.other.create_disk(ID, str(self.outside / "disk"))
        self.manager().verify_base_images([])
        note = self.outside_note()
        os.utime(note, (0, 0))
        (self.outside / "disk").unlink()
        self.manager().verify_base_images([])
        self.time += 3601
        self.other.create_disk(ID, str(self.outside / "later"))
        self.assertGreater(note.stat().st_mtime, 0)
        self.assertTrue(self.is_kept())

    def test_a_process_whose_clock_was_set_back_counts(self) -> None:
        os.unlink(self.other.create_disk(ID, str(self.outside / "disk")).target)
        os.utime(self.outside_note(), (0, 0))
        self.manager().verify_base_images([])
        self.time += 3601
        self.other.create_disk(ID, str(self.outside / "later"))
        os.utime(self.outside_note(), (1, 1))
        self.assertTrue(self.is_kept())

    def test_a_process_says_so_again_when_the_clock_was_set(self) -> None:
        clock = time.time()
        other = self.manager(disk_roots=(str(self.outside),), host=self.host(clock=lambda: clock))
        other.create_disk(ID, str(self.outside / "disk"))
        noted = self.outside_note().stat().st_ino
        other.create_disk(ID, str(self.outside / "later"))
        self.assertEqual(noted, self.outside_note().stat().st_ino)
        clock += 365 * 86400
        other.create_disk(ID, str(self.outside / "latest"))
        self.assertNotEqual(noted, self.outside_note().stat().st_ino)

    def test_the_cache_may_be_removed_beneath_a_process(self) -> None:
        self.other.create_disk(ID, str(self.outside / "disk"))
        shutil.rmtree(self.base().parent)
        self.other.create_disk(ID, str(self.outside / "later"))
        self.assertTrue(self.is_kept())

    def test_an_old_note_is_read_until_there_was_a_pass(self) -> None:
        self.other.create_disk(ID, str(self.outside / "disk"))
        for note in self.notes():
            os.utime(note, (0, 0))
        self.assertTrue(self.is_kept())

    def test_a_root_that_nobody_used_for_long_is_not_read_any_more(self) -> None:
        self.other.create_disk(ID, str(self.outside / "disk"))
        (self.outside / "disk").unlink()
        self.manager().verify_base_images([])
        os.utime(self.outside_note(), (0, 0))
        os.rename(self.outside, f"{self.outside}.away")
        self.addCleanup(os.rename, f"{self.outside}.away", self.outside)
        self.assertEqual((), self.manager().verify_base_images([]).problems)

    def test_a_root_that_cannot_be_read_keeps_everything_until_an_operator_says(self) -> None:
        self.other.cache_image(ID)
        self.other.create_disk(ID, str(self.outside / "disk"))
        os.rename(self.outside, f"{self.outside}.away")
        self.addCleanup(os.rename, f"{self.outside}.away", self.outside)
        self.age()
        report = self.manager().verify_base_images([])
        self.assertEqual([False], [base.evicted for base in report.bases])
        self.assertIn(f"imagecache disk forget {self.outside}", report.problems[0])
        self.manager().forget_disks(str(self.outside))
        self.assertFalse(self.is_kept())

    def test_an_operators_word_counts_however_the_root_and_its_path_are_spelled(self) -> None:
        for number, (root, said) in enumerate(
            (("{0}", "{0}/"), ("{0}", "{0}/."), ("{0}", "/{0}"), ("{0}/", "{0}"), ("{1}/../{2}", "{0}"))
        ):
            path = self.outside / str(number)
            path.mkdir()
            spelled, named = (each.format(path, path, number) for each in (root, said))
            with self.subTest(root=spelled, said=named):
                self.manager(disk_roots=(spelled,)).create_disk(ID, str(path / "disk"))
                self.assertTrue(self.is_kept())
                os.rename(path, f"{path}.away")
                self.assertTrue(self.is_kept())
                self.assertEqual(1, self.manager().forget_disks(named))
                self.assertFalse(self.is_kept())

    def test_a_root_that_is_gone_hides_no_other(self) -> None:
        away = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        for root in (away, self.outside):
            self.manager(disk_roots=(str(root),)).create_disk(ID, str(root / "disk"))
        away.rename(f"{away}.away")
        self.addCleanup(os.rename, f"{away}.away", away)
        self.assertTrue(self.is_kept())
        self.manager().forget_disks(str(away))
        self.age()
        (base,) = self.manager().verify_base_images([]).bases
        self.assertIn(str(self.outside / "disk"), base.reason)

    def test_an_operator_may_take_a_root_back(self) -> None:
        self.other.create_disk(ID, str(self.outside / "disk"))
        self.manager().forget_disks(str(self.outside))
        self.assertFalse(self.is_kept())

    def test_a_process_that_goes_on_after_that_says_so_again(self) -> None:
        self.other.create_disk(ID, str(self.outside / "disk"))
        (self.outside / "disk").unlink()
        for take_away in (lambda: self.manager().forget_disks(str(self.outside)), self.outside_unlink):
            with self.subTest(take_away):
                take_away()
                self.other.create_disk(ID, str(self.outside / "later"))
                self.assertTrue(self.is_kept())
                (self.outside / "later").unlink()

    def outside_unlink(self) -> None:
        self.outside_note().unlink()

    def test_a_root_beside_one_that_is_taken_back_stays(self) -> None:
        more = self.outside / "more"
        more.mkdir()
        self.manager(disk_roots=(str(self.outside / "gone"), str(more))).create_disk(ID, str(more / "disk"))
        self.manager().forget_disks(str(self.outside / "gone"))
        self.assertTrue(self.is_kept())

    def test_a_wider_root_is_not_read_for_ever(self) -> None:
        self.manager(disk_roots=(str(self.directory),)).create_disk(ID, self.target("wide"))
        self.manager().create_disk(ID, self.target())
        self.assertTrue(self.is_kept())
        for note in self.notes():
            os.utime(note, (0, 0))
        (self.directory / "secret").mkdir()
        self.manager().verify_base_images([])
        (scan,) = self.base().parent.glob(".imagecache/hosts/*.scan")
        self.assertNotIn(f'"{self.directory}"', scan.read_text())

    def test_a_damaged_note_keeps_everything_until_its_process_goes_on(self) -> None:
        self.other.create_disk(ID, str(self.outside / "disk"))
        note = self.outside_note()
        for number, damage in enumerate(
            (b"", b"{", b"[" * 100_000, b'"/"', b'[1, null, "relative"]', b"\xff")
        ):
            with self.subTest(number):
                note.write_bytes(damage)
                self.age()
                report = self.manager().verify_base_images([])
                self.assertEqual([False], [base.evicted for base in report.bases])
                self.assertIn(str(note), report.problems[0])
                self.other.create_disk(ID, str(self.outside / f"disk-{number}"))
                self.assertEqual((), self.manager().verify_base_images([]).problems)

    def test_the_own_note_stops_no_pass_of_its_own(self) -> None:
        os.unlink(self.manager().create_disk(ID, self.target()).target)
        (note,) = self.notes()
        note.write_bytes(b"{")
        self.assertFalse(self.is_kept())

    def test_a_directory_in_the_place_of_the_note_stops_no_spawn(self) -> None:
        os.unlink(self.other.create_disk(ID, str(self.outside / "disk")).target)
        note = self.outside_note()
        note.unlink()
        note.mkdir()
        self.other.create_disk(ID, str(self.outside / "disk"))
        self.assertTrue(self.is_kept())
        self.manager().forget_disks("/nowhere")

    def test_the_roots_of_another_host_are_its_own_to_read(self) -> None:
        there = self.manager(host=self.host(name="there"), disk_roots=(str(self.outside),))
        there.create_disk(ID, str(self.outside / "disk"))
        os.rename(self.outside, f"{self.outside}.away")
        self.addCleanup(os.rename, f"{self.outside}.away", self.outside)
        self.assertEqual((), self.manager().verify_base_images([]).problems)
