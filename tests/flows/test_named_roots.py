# SPDX-License-Identifier: Apache-2.0
"""A disk root of another process that is another directory now: it is not mounted here, or not any more.

A directory that is renamed away, and an empty one in its place, stand for a filesystem that is unmounted.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shlex
import shutil
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.store import layout, named_roots
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.identity import identity_now
from imagecache_lib.store.named_roots import Named, NamedRoots, Noted
from imagecache_lib.store.seen import Identity, LastScan, SeenDirectory, SeenDisk
from imagecache_lib.upkeep.absence import Absence, is_same_root
from imagecache_lib.upkeep.facts import Found, ReadDirectory
from imagecache_lib.upkeep.follow import Follower
from imagecache_lib.upkeep.roots import Roots
from tests.flows.test_upkeep import UpkeepCase
from tests.support import files
from tests.support.cache_case import ID, OTHER_ID

DAY = 86400


class NamedCase(UpkeepCase):
    def setUp(self) -> None:
        super().setUp()
        self.root = self.directory / "root"
        self.away = self.directory / "root.away"
        self.root.mkdir()
        self.other = self.manager(disk_roots=(str(self.root),))

    def spawn_there(self, name: str = "disk", image_id: str = ID) -> pathlib.Path:
        """Let another process make a disk in its disk root."""
        self.other.create_disk(image_id, str(self.root / name))
        return self.root / name

    def unmount(self) -> None:
        self.root.rename(self.away)
        self.root.mkdir()

    def mount(self) -> None:
        shutil.rmtree(self.root)
        self.away.rename(self.root)

    def notes(self) -> list[pathlib.Path]:
        return sorted(self.private.glob("hosts/*.roots"))

    def notes_of_root(self) -> list[pathlib.Path]:
        return [path for path in self.notes() if json.loads(path.read_text())[0] == str(self.root)]

    def marks(self) -> list[pathlib.Path]:
        return list(self.private.glob("hosts/*.seen"))

    def let_pass(self, days: float) -> None:
        """Let what was written down be so many days older than it is."""
        for mark in self.marks():
            mark.write_text(str(float(mark.read_text()) - days * DAY))
        for path in (*self.notes(), *self.marks()):
            then = path.stat().st_mtime - days * DAY
            os.utime(path, (then, then))

    def passes(self, count: int = 1, **options: Any) -> tuple[str, ...]:
        """Make passes, and return the problems that the last one saw."""
        problems: tuple[str, ...] = ()
        for _pass in range(count):
            if self.base().exists():
                self.unused()
            problems = self.verify(**options).problems
        return problems

    def assert_everything_stays(self, problems: tuple[str, ...]) -> None:
        self.assertTrue(self.base().exists())
        self.assertIn(f"the disk root {self.root} is not the directory", problems[0])
        self.assertIn(f"imagecache disk forget {self.root}", problems[0])

    def assert_goes(self, **options: Any) -> None:
        """Eviction goes on: nothing but a disk keeps the base."""
        self.assertEqual((), self.passes(**options))
        self.assertFalse(self.base().exists())


class TestWhatIsLookedAt(NamedCase):
    def identities(self) -> dict[str, Any]:
        return dict(json.loads(note.read_text()) for note in self.notes())

    def test_only_the_disk_root_above_the_disk_is_looked_at(self) -> None:
        roots = (str(self.instances), str(self.root))
        manager = self.manager(disk_roots=roots)
        manager.create_disk(ID, self.target())
        found = self.identities()
        self.assertIsNone(found[str(self.root)])
        self.assertEqual(self.instances.stat().st_ino, found[str(self.instances)][1])
        manager.create_disk(ID, str(self.root / "disk"))
        noted = [json.loads(note.read_text())[1] for note in self.notes_of_root()]
        self.assertIn(self.root.stat().st_ino, [each[1] for each in noted if each is not None])

    def test_a_disk_root_that_is_reached_through_a_link_is_looked_at(self) -> None:
        link = self.directory / "link"
        link.symlink_to(self.root)
        self.manager(disk_roots=(str(link),)).create_disk(ID, str(self.root / "disk"))
        self.assertEqual(self.root.stat().st_ino, self.identities()[str(link)][1])

    def test_a_disk_root_in_which_no_disk_was_made_stops_eviction_for_a_week_at_most(self) -> None:
        roots = (str(self.instances), str(self.root))
        os.unlink(self.manager(disk_roots=roots).create_disk(ID, self.target()).target)
        self.root.rmdir()
        self.assertIn("cannot be read", self.passes()[0])
        self.let_pass(days=30)
        self.assert_goes()

    def test_a_driver_that_makes_its_disks_itself_has_its_disk_roots_looked_at(self) -> None:
        with self.other.fetch_or_reuse(ID):
            files.overlay(self.root / "disk", self.base())
        self.unmount()
        self.assert_everything_stays(self.passes())

    def test_a_disk_that_came_from_another_host_counts_as_one_that_is_made(self) -> None:
        for take in (
            lambda path: self.other.ensure_backing(path, image_id=ID),
            lambda path: self.other.note_use(self.other.inspect_disk(path)),
            lambda path: self.other.create_disk(ID, path, if_exists="reuse"),
        ):
            with self.subTest(take):
                self.other = self.manager(disk_roots=(str(self.root),))
                self.cached()
                files.overlay(self.root / "disk", self.base(), size="4M")
                take(str(self.root / "disk"))
                self.unmount()
                self.assert_everything_stays(self.passes())
                self.manager().forget_disks(str(self.root))
                self.assertEqual([], self.notes_of_root())
                self.mount()
                (self.root / "disk").unlink()


class TestVolumes(NamedCase):
    """A filesystem that was mounted between a disk root and a disk."""

    def setUp(self) -> None:
        super().setUp()
        self.cached()
        self.volume = self.instances / "volume"
        self.volume.mkdir()
        self.note()

    def note(self) -> None:
        cache = CacheStore(self.other.config, self.host())
        named = NamedRoots((str(self.instances),), self.host(), usual=True)
        volumes = {str(self.volume): identity_now(str(self.volume), None)}
        named.note(cache.layout, cache.host_id, {}, volumes)

    def replace(self) -> None:
        self.volume.rename(self.away)
        self.volume.mkdir()

    def test_one_that_is_there_stops_nothing(self) -> None:
        self.assert_goes()

    def test_one_that_is_not_there_any_more_keeps_everything_however_old_the_note_is(self) -> None:
        self.replace()
        self.let_pass(days=30)
        self.assertIn(f"at {self.volume} is not what was mounted there", self.passes(3)[0])
        self.assertTrue(self.base().exists())
        self.manager().forget_disks(str(self.volume))
        self.assert_goes()

    def test_one_whose_place_is_gone_keeps_everything(self) -> None:
        self.volume.rmdir()
        self.assertIn(f"at {self.volume} is not what", self.passes()[0])

    def test_one_that_a_pass_saw_after_all_disks_were_made_is_kept_by_what_that_saw(self) -> None:
        for note in self.notes():
            then = note.stat().st_mtime - 600
            os.utime(note, (then, then))
        self.passes()
        self.replace()
        self.cached()
        self.assert_goes()

    def test_one_in_which_a_disk_was_made_since_a_pass_saw_it_keeps_everything(self) -> None:
        for note in self.notes():
            then = note.stat().st_mtime - 600
            os.utime(note, (then, then))
        self.passes()
        self.note()
        self.replace()
        self.cached()
        self.assertIn(f"at {self.volume} is not what", self.passes()[0])

    def test_one_in_which_a_disk_was_made_since_a_pass_whose_clock_was_ahead_keeps_everything(self) -> None:
        self.passes()
        self.let_pass(days=-1)
        self.note()
        self.replace()
        self.cached()
        self.assertIn(f"at {self.volume} is not what", self.passes()[0])

    def test_one_that_a_pass_saw_keeps_everything_once_what_that_saw_is_an_older_copy_or_gone(self) -> None:
        self.passes()
        remembered = [*self.private.glob("hosts/*.scan"), *self.private.glob("hosts/*.readings")]
        self.assertEqual(2, len(remembered))
        copies = {path: path.read_bytes() for path in remembered}
        for is_gone, forgets in ((False, False), (False, True), (True, False)):
            with self.subTest(is_gone=is_gone, forgets=forgets):
                self.note()
                for note in self.notes():
                    then = note.stat().st_mtime - 600
                    os.utime(note, (then, then))
                self.passes()
                self.replace()
                for path, data in copies.items():
                    path.unlink() if is_gone else path.write_bytes(data)
                    if not is_gone:
                        files.age(path, seconds=600)
                if forgets:  # what is written down anew has today's time
                    self.manager().forget_disks(str(self.directory / "another"))
                self.cached()
                for _pass in range(3):
                    self.assertIn(f"at {self.volume} is not what", self.passes()[0])
                self.volume.rmdir()
                self.away.rename(self.volume)

    def test_a_note_of_one_is_none_of_a_disk_root(self) -> None:
        named = named_roots.of_host(
            layout.Layout(str(self.base().parent), ""),
            CacheStore(self.other.config, self.host()).host_id,
            now=0,
        )
        self.assertEqual({str(self.instances)}, set(named.roots))
        self.assertEqual({True, False}, {each.is_volume for each in named.noted})


class TestAnotherDirectoryLater(NamedCase):
    def test_both_directories_are_known_if_one_is_mounted_over_the_other(self) -> None:
        self.spawn_there()
        self.unmount()
        self.spawn_there("later")
        self.assertEqual(2, len(self.notes_of_root()))
        self.assert_everything_stays(self.passes())
        (self.root / "later").unlink()
        self.mount()
        self.assert_everything_stays(self.passes())

    def test_a_process_that_goes_on_looks_at_each_disk_which_directory_it_is_in(self) -> None:
        self.spawn_there()
        self.manager().forget_disks(str(self.root))
        self.spawn_there("later")
        (noted,) = self.notes_of_root()
        self.unmount()
        self.spawn_there("third")
        self.assertEqual(1, len(set(self.notes_of_root()) - {noted}))

    def test_a_directory_that_stays_is_written_down_once(self) -> None:
        self.spawn_there()
        (note,) = self.notes_of_root()
        before = note.stat()
        self.spawn_there("later")
        after = note.stat()
        self.assertEqual((before.st_ino, before.st_mtime_ns), (after.st_ino, after.st_mtime_ns))


class TestWhatKeeps(NamedCase):
    def test_no_pass_evicts_while_a_disk_root_that_none_has_read_is_another_directory(self) -> None:
        self.spawn_there()
        self.unmount()
        self.assert_everything_stays(self.passes(3))

    def test_an_operator_evicts_none_by_name_then(self) -> None:
        self.spawn_there()
        self.unmount()
        self.unused()
        with self.assertRaises(errors.BaseInUseError) as caught:
            self.manager().evict_image(ID)
        self.assertIn(str(self.root), str(caught.exception))
        self.assertTrue(self.base().exists())

    def test_the_command_that_a_message_advises_can_be_given_to_a_shell(self) -> None:
        self.root = self.directory / "it's $HOME; a root"
        self.root.mkdir()
        self.other = self.manager(disk_roots=(str(self.root),))
        self.spawn_there()
        self.root.rename(self.away)
        (problem,) = self.passes()
        command = problem.partition("run once: ")[2].removesuffix(".")
        self.assertEqual(["imagecache", "disk", "forget", str(self.root)], shlex.split(command))

    def test_a_process_that_names_the_disk_root_itself_evicts_nothing(self) -> None:
        self.spawn_there()
        self.unmount()
        roots = (str(self.root),)
        self.assert_everything_stays(self.passes(3, disk_roots=roots))
        self.mount()
        (self.root / "disk").unlink()
        self.assert_goes(disk_roots=roots)

    def test_a_note_that_no_pass_has_matched_counts_however_old_it_is(self) -> None:
        self.spawn_there()
        self.unmount()
        self.let_pass(days=30)
        self.assert_everything_stays(self.passes(3))
        self.let_pass(days=400)
        self.assert_everything_stays(self.passes(3))

    def test_a_disk_root_that_is_gone_altogether_counts_however_old_the_note_is(self) -> None:
        self.spawn_there()
        self.root.rename(self.away)
        self.let_pass(days=30)
        for _pass in range(3):
            self.assertIn(f"{self.root}, which another process", self.passes()[0])
        self.assertTrue(self.base().exists())

    def test_a_note_that_a_pass_has_matched_lapses(self) -> None:
        self.spawn_there().unlink()
        self.let_pass(days=3)
        self.assertEqual((), self.passes())
        self.cached()
        self.unmount()
        self.assert_everything_stays(self.passes())
        self.let_pass(days=30)
        self.assert_goes()

    def test_a_disk_that_is_made_after_the_last_pass_that_matched_its_note_counts(self) -> None:
        self.spawn_there().unlink()
        self.assertEqual((), self.passes())
        self.spawn_there()
        self.unmount()
        self.assert_everything_stays(self.passes())
        self.let_pass(days=30)
        self.assert_everything_stays(self.passes(3))

    def test_a_pass_that_cannot_read_everything_matches_nothing(self) -> None:
        self.spawn_there()
        (self.root / "link").symlink_to("x" * 300)  # no name of a file is that long
        self.let_pass(days=3)
        self.assertIn("link cannot be read", self.passes()[0])
        self.assertEqual([], self.marks())

    def test_a_disk_that_is_made_after_its_disk_root_was_read_counts_if_that_is_gone_then(self) -> None:
        self.spawn_there()
        self.assertEqual((), self.passes())
        self.spawn_there("later", OTHER_ID)
        self.root.rename(self.away)
        for days in (0, 1, 30):
            self.let_pass(days=days)
            self.unused(OTHER_ID)
            self.passes()
            self.assertTrue(self.base(OTHER_ID).exists())

    def test_what_is_remembered_of_a_disk_root_keeps_its_disks_alone(self) -> None:
        self.spawn_there()
        self.let_pass(days=3)
        self.assertEqual((), self.passes())
        self.root.rename(self.away)
        self.assertEqual(1, len([each for each in self.passes() if "not to be seen" in each]))
        self.cached(OTHER_ID)
        self.passes()
        self.assertTrue(self.base().exists())
        self.assertFalse(self.base(OTHER_ID).exists())

    def test_a_disk_root_with_the_directories_of_all_instances_is_vouched_for(self) -> None:
        self.spawn_there().unlink()
        self.unmount()
        (self.root / "uuid").mkdir()
        report = [ic.Instance("uuid", "here")]
        self.unused()
        self.assertEqual((), self.verify(report).problems)

    def test_a_disk_root_that_was_moved_to_another_filesystem_needs_no_operator(self) -> None:
        self.spawn_there()
        self.assertEqual((), self.passes())
        self.root.rename(self.away)
        shutil.copytree(self.away, self.root)
        self.assertEqual((), self.passes())
        (self.root / "disk").unlink()
        self.assert_goes()


class TestAfterABoot(NamedCase):
    def renumber(self) -> None:
        """Let the device have had another number as the note was written."""
        (note,) = self.notes_of_root()
        root, identity = json.loads(note.read_text())
        identity[0] += 1
        note.write_text(json.dumps([root, identity]))

    def test_a_device_with_another_number_is_known_by_the_id_of_its_filesystem(self) -> None:
        self.spawn_there().unlink()
        self.renumber()
        self.assert_goes()

    def test_a_device_whose_number_is_that_id_is_known_by_when_its_top_was_born(self) -> None:
        before = Identity(device=5, inode=128, fsid=5, born=1_700_000_000_123_456_789)
        after = Identity(device=6, inode=128, fsid=6, born=1_700_000_000_123_456_789)
        self.assertTrue(is_same_root(before, after))
        for other in (
            Identity(device=6, inode=128, fsid=6, born=1_700_000_000_123_456_788),
            Identity(device=6, inode=128, fsid=6, born=0),
            Identity(device=6, inode=129, fsid=6, born=before.born),
            Identity(device=6, inode=128, fsid=7, born=before.born),
        ):
            with self.subTest(other):
                self.assertFalse(is_same_root(before, other))

    def test_a_device_that_is_known_by_what_was_seen_below_its_top_alone_needs_its_note_no_more(self) -> None:
        """Such as one of xfs of version 4, which does not keep when a directory was born."""

        def seen(device: int) -> tuple[SeenDirectory, SeenDirectory]:
            top = SeenDirectory("/root", Identity(device, 128, device))
            return top, SeenDirectory("/root/vm", Identity(device, 131, device), top)

        def identity(directory: SeenDirectory) -> Identity:
            assert directory.identity is not None
            return directory.identity

        before, below = seen(5)
        now = seen(6)
        disk = SeenDisk("/root/vm/disk", ("name",), below)
        last = LastScan({disk.path: disk}, {before.path: identity(before)})
        found = Found((), {"/root": identity(now[0])}, tuple(ReadDirectory(each, {}) for each in now), {})
        roots = Roots(
            found,
            last,
            Named((Noted("note", "/root", identity(before), is_seen=False),)),
            absence=Absence(last, found, None),
            report=(),
            host_name="here",
            follower=Follower(),
        )
        self.assertEqual([], list(roots.unknown()))
        self.assertEqual(["note"], roots.notes_retired)

    def test_a_disk_root_that_is_mounted_later_than_the_first_pass_heals_by_itself(self) -> None:
        for what in ("", "a file", "a disk of its own"):
            with self.subTest(what):
                self.spawn_there()
                self.unmount()
                (self.root / "file").write_text(what)
                self.assert_everything_stays(self.passes(2))
                self.assert_everything_stays(self.passes(2, disk_roots=(str(self.root),)))
                (self.root / "file").unlink()
                self.mount()
                self.assertEqual((), self.passes())
                self.assertTrue(self.base().exists())
                (self.root / "disk").unlink()
                self.assert_goes()


class TestOrdinaryLife(NamedCase):
    def test_an_operator_may_take_a_disk_root_back(self) -> None:
        self.spawn_there()
        self.unmount()
        self.assert_everything_stays(self.passes())
        self.manager().forget_disks(str(self.root))
        self.assert_goes()

    def test_a_disk_root_that_was_formatted_anew_is_taken_back_and_used_again(self) -> None:
        self.spawn_there()
        self.unmount()
        self.assert_everything_stays(self.passes())
        self.manager().forget_disks(str(self.root))
        self.spawn_there()
        self.assertEqual((), self.passes())
        self.assertTrue(self.base().exists())
        (self.root / "disk").unlink()
        self.assert_goes()

    def test_a_process_that_starts_again_with_other_disk_roots_stops_no_eviction(self) -> None:
        self.spawn_there().unlink()
        later = self.directory / "later"
        later.mkdir()
        os.unlink(self.manager(disk_roots=(str(later),)).create_disk(ID, str(later / "disk")).target)
        self.assert_goes()

    def test_processes_with_the_usual_disk_root_do_not_stop_each_other(self) -> None:
        for number in range(2):
            self.manager().create_disk(ID, self.target(f"disk-{number}"))
        self.assertEqual((), self.passes())
        self.assertEqual(1, len(self.notes()))
        for disk in self.instances.glob("instance-1/disk-*"):
            disk.unlink()
        self.assert_goes()


class TestNotes(NamedCase):
    def test_a_damaged_note_keeps_everything_however_old_it_is(self) -> None:
        self.spawn_there().unlink()
        (note,) = self.notes_of_root()
        for damage in ("", "{", '["relative", null]', '["/", [1]]', '["/", 7]', '["/a"]', "[null, null]"):
            with self.subTest(damage):
                note.write_text(damage)
                self.assertIn(str(note), self.passes(2)[0])
                files.age(note, seconds=30 * DAY)
                self.assertIn(str(note), self.passes(2)[0])
                self.assertTrue(self.base().exists())

    def test_notes_that_lapsed_are_removed(self) -> None:
        self.spawn_there().unlink()
        self.let_pass(days=3)
        self.assertEqual((), self.passes())
        self.assertEqual(1, len(self.notes_of_root()))
        self.assertEqual(1, len(self.marks()))
        self.let_pass(days=30)
        self.passes()
        self.assertEqual([], self.notes_of_root())
        self.assertEqual([], self.marks())

    def test_a_note_that_no_pass_has_matched_is_not_removed(self) -> None:
        self.spawn_there()
        self.unmount()
        self.let_pass(days=30)
        self.passes(3)
        self.assertEqual(1, len(self.notes_of_root()))

    def test_a_mark_that_is_torn_says_nothing(self) -> None:
        self.spawn_there().unlink()
        self.let_pass(days=3)
        self.passes()
        (mark,) = self.marks()
        self.cached()
        self.unmount()
        for torn in ("", "17", "x", "nan"):
            mark.write_text(torn)
            files.age(*self.notes(), seconds=30 * DAY)
            self.assert_everything_stays(self.passes())

    def test_a_note_that_was_removed_is_written_again_by_a_process_that_goes_on(self) -> None:
        self.spawn_there().unlink()
        self.let_pass(days=3)
        self.passes()
        self.let_pass(days=30)
        self.passes()
        with contextlib.suppress(FileNotFoundError):
            self.base().unlink()
        self.spawn_there()
        self.unmount()
        self.assert_everything_stays(self.passes())
