# SPDX-License-Identifier: Apache-2.0
"""What a crash leaves where no pass used to look, and what is never this library's to remove."""

from __future__ import annotations

import os
import pathlib
import signal
import stat
import subprocess
import sys
import textwrap

import imagecache_lib as ic
from imagecache_lib.system import atomic_file
from tests.support import files
from tests.support.cache_case import ID, OTHER_ID, CacheCase

DAY = 86400

#: Kills itself when a file is complete under its temporary name.
KILLED = """
import os, signal, sys
import imagecache_lib as ic
from imagecache_lib.testing.sources import FakeSource
instances, what, target, backend = sys.argv[1:]
def trace(point):
    if point == "disk:made":
        os.kill(os.getpid(), signal.SIGKILL)
config = ic.CacheConfig(instances_path=instances)
host = ic.System(name="here", trace=trace)
cache = ic.ImageCacheManager(config, FakeSource({"image": bytes(2**20)}), backend, host=host, observers=[])
if what == "file":
    cache.fetch_file("image", target)
else:
    cache.create_disk("image", target)
"""


class LeftoverCase(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.outside = self.directory / "outside"
        self.outside.mkdir()
        self.stage = self.instances / "_base" / ".imagecache" / "stage"

    def killed(self, what: str, target: pathlib.Path, backend: str = "raw") -> list[pathlib.Path]:
        """Let a process be killed while it makes a file. Returns what is left beside the target."""
        words = [sys.executable, "-c", KILLED, str(self.instances), what, str(target), backend]
        ended = subprocess.run(words, check=False, timeout=120)
        self.assertEqual(-signal.SIGKILL, ended.returncode)
        return sorted(target.parent.iterdir())

    def passes(self) -> None:
        self.manager(stage_idle_seconds=0).verify_base_images(())


class TestOutsideOfTheRoots(LeftoverCase):
    def test_what_a_killed_process_made_there_goes(self) -> None:
        for what, backend in (("file", "qcow2"), ("disk", "raw")):
            (left,) = self.killed(what, self.outside / "thing", backend)
            self.assertTrue(left.name.endswith(".new"))
            self.passes()
            self.assertEqual([], list(self.outside.iterdir()))
            self.assertEqual([], self.in_flight())

    def test_a_note_waits_for_a_filesystem_that_is_not_mounted(self) -> None:
        self.killed("file", self.outside / "thing")
        elsewhere = self.directory / "unmounted"
        self.outside.rename(elsewhere)
        self.passes()
        elsewhere.rename(self.outside)
        self.passes()
        self.assertEqual([], list(self.outside.iterdir()))

    def test_nothing_is_noted_once_a_file_is_made_or_given_up(self) -> None:
        manager = self.manager()
        manager.fetch_file(ID, str(self.outside / "kernel"))
        self.assertEqual([], self.in_flight())
        with self.assertRaises(ic.DiskExistsError):
            manager.fetch_file(ID, str(self.outside / "kernel"))
        self.assertEqual([], self.in_flight())
        self.assertEqual(["kernel"], os.listdir(self.outside))

    def test_a_note_leads_to_no_other_file(self) -> None:
        self.manager().cache_image(ID)
        for path in (self.outside / f".x.{'1' * 32}.new", self.outside / "precious"):
            path.write_bytes(b"precious")
            files.age(path, seconds=5 * DAY)
            (self.stage / f"{'0' * 32}.outside").write_bytes(os.fsencode(path))
            self.passes()
            self.assertTrue(path.exists())

    def test_torn_notes_go(self) -> None:
        self.manager().cache_image(ID)
        for data in (b"", b"relative", b"/", b"\xff\xfe", b"/" + b"x" * 5000):
            (self.stage / f"{'0' * 32}.outside").write_bytes(data)
            self.passes()
            self.assertEqual([], self.in_flight(), data)


class TestForeignFiles(LeftoverCase):
    def test_a_file_that_only_has_such_a_name_stays(self) -> None:
        (self.instances / "link").symlink_to(self.outside)
        path = self.outside / f".report.{'a' * 32}.new"
        path.write_bytes(b"not ours")
        files.age(path, seconds=5 * DAY)
        self.passes()
        self.assertTrue(path.exists())

    def test_what_was_made_here_goes_from_behind_a_link(self) -> None:
        (self.instances / "link").symlink_to(self.outside)
        self.killed("disk", self.instances / "link" / "disk", "qcow2")
        self.passes()
        self.assertEqual([], list(self.outside.iterdir()))

    def test_what_was_made_here_goes_from_the_roots(self) -> None:
        target = pathlib.Path(self.target())
        self.assertEqual(1, len(self.killed("disk", target)))
        self.passes()
        self.assertEqual([], list(target.parent.iterdir()))

    def test_a_disk_says_that_it_was_made_here(self) -> None:
        disk = self.manager(backend="raw").create_disk(ID, self.target())
        self.assertRegex(os.getxattr(disk.target, atomic_file.MADE_MARK), b"^[0-9a-f]{8}$")

    def test_what_a_disk_says_of_itself_takes_no_block_of_its_own(self) -> None:
        disk = self.manager().create_disk(ID, self.target())
        empty = pathlib.Path(self.target("empty"))
        empty.touch()
        for name in os.listxattr(disk.target):
            os.setxattr(empty, name, os.getxattr(disk.target, name))
        self.assertEqual(2, len(os.listxattr(empty)))
        self.assertEqual(0, empty.stat().st_blocks)


class TestSillyRenames(LeftoverCase):
    def setUp(self) -> None:
        super().setUp()
        manager = self.manager()
        manager.create_disk(ID, self.target())
        self.entry = (
            self.instances / "_base" / ".imagecache" / "trash" / f"{self.base(OTHER_ID).name}.{'a' * 32}"
        )
        self.entry.mkdir()
        self.silly = [self.entry / ".nfs000000000000000100000001", self.stage / ".nfs00000000000000020000"]
        for path in self.silly:
            path.write_bytes(b"what a client that died had open")
            files.age(path, seconds=2 * DAY)

    def test_what_a_dead_client_left_goes_after_a_day(self) -> None:
        files.age(self.entry, seconds=2 * DAY)
        self.passes()
        self.passes()
        self.assertEqual([False, False], [path.exists() for path in self.silly])
        self.assertFalse(self.entry.exists())

    def test_a_base_that_was_unlinked_today_stays_for_who_has_it_open(self) -> None:
        self.passes()
        self.assertTrue(self.silly[0].exists())

    def test_a_file_on_which_a_program_holds_a_lock_stays(self) -> None:
        files.age(self.entry, seconds=2 * DAY)
        script = textwrap.dedent(
            """
            import fcntl, sys
            files = [open(path, "r+b") for path in sys.argv[1:]]
            for file in files:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 100)
            print("locked", flush=True)
            sys.stdin.read()
            """
        )
        words = [sys.executable, "-c", script, *map(str, self.silly)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None and holder.stdin is not None
            self.assertEqual(b"locked\n", holder.stdout.readline())
            self.passes()
            self.assertEqual([True, True], [path.exists() for path in self.silly])
            holder.stdin.close()

    def test_other_dot_files_stay(self) -> None:
        for name in (".nfs", ".nfsx", ".nfs12.bak"):
            (self.stage / name).write_bytes(b"")
            files.age(self.stage / name, seconds=2 * DAY)
            self.passes()
            self.assertTrue((self.stage / name).exists())


class TestModes(LeftoverCase):
    def test_no_directory_is_open_to_all_whatever_the_umask(self) -> None:
        script = textwrap.dedent(
            """
            import os, sys
            os.umask(int(sys.argv[2], 8))
            import imagecache_lib as ic
            from imagecache_lib.testing.sources import FakeSource
            for locks in (None, sys.argv[1] + "/run/more/locks"):
                config = ic.CacheConfig(instances_path=sys.argv[1], lock_path=locks)
                cache = ic.ImageCacheManager(config, FakeSource({"image": bytes(2**20)}), "raw", observers=[])
                cache.create_disk("image", sys.argv[1] + f"/disk-{locks is None}")
                cache.pin("image", owner="o")
                cache.verify_base_images(())
            """
        )
        for umask in ("000", "077"):
            instances = self.directory / umask
            instances.mkdir(mode=0o755)
            subprocess.run([sys.executable, "-c", script, str(instances), umask], check=True)
            for parent, directories, names in os.walk(instances):
                for name in directories:
                    mode = stat.S_IMODE(os.stat(os.path.join(parent, name)).st_mode)
                    private = ".imagecache" in os.path.join(parent, name)
                    self.assertEqual(0o700 if private else 0o755, mode, os.path.join(parent, name))
                for name in names:
                    mode = stat.S_IMODE(os.stat(os.path.join(parent, name)).st_mode)
                    self.assertFalse(mode & 0o022, os.path.join(parent, name))


class TestWrongClocks(LeftoverCase):
    def test_what_a_clock_that_was_ahead_dated_goes_an_hour_after_it_was_seen(self) -> None:
        target = pathlib.Path(self.target())
        left = self.killed("disk", target)
        self.manager().cache_image(OTHER_ID)
        stage = self.stage / ("0" * 32)
        for path in (stage, stage.with_suffix(".json"), stage.with_suffix(".new")):
            path.write_bytes(b"{}")
        dated = [*left, stage]
        for path in dated:
            files.age(path, seconds=-365 * DAY)
        self.manager().verify_base_images(())
        self.assertEqual([True, True], [path.exists() for path in dated])
        for path in dated:
            self.assertLess(path.stat().st_mtime, self.host().clock() + 60)
            files.age(path, seconds=2 * 3600)
        self.manager().verify_base_images(())
        self.assertEqual([False, False], [path.exists() for path in dated])


class TestOddEntries(LeftoverCase):
    def test_nothing_that_was_put_into_the_trash_by_hand_stops_a_call(self) -> None:
        manager = self.manager()
        trash = self.instances / "_base" / ".imagecache" / "trash"
        manager.cache_image(OTHER_ID)
        name = self.base().name
        os.mkfifo(trash / f"{name}.{'1' * 32}")
        (trash / f"{name}.{'2' * 32}").symlink_to("nowhere")
        (trash / f"{name}.{'3' * 32}").symlink_to(self.outside)
        (trash / f"{name}.{'4' * 32}" / "base").mkdir(parents=True)
        before = sorted(os.listdir(trash))
        disk = manager.create_disk(ID, self.target())
        self.assertEqual("qcow2", disk.format)
        manager.verify_base_images(())
        manager.evict_image(OTHER_ID)
        self.assertEqual(before, sorted(os.listdir(trash)))

    def test_a_version_that_is_none_is_refused_and_said(self) -> None:
        self.manager().cache_image(ID)
        version = self.instances / "_base" / ".imagecache" / "version"
        for data in (b"9" * 5000, b"", b"-1", "²".encode(), b"1 2", b"\xff"):
            version.write_bytes(data)
            with self.assertRaises(ic.ConfigError):
                self.manager().cache_image(ID)
            found = [each.text for each in self.manager().preflight()]
            self.assertTrue([text for text in found if "states no version" in text], data)
