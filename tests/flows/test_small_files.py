# SPDX-License-Identifier: Apache-2.0
"""Small files and odd words: none stops more than it is about, and none makes less be kept than before."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.store import history, trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import durable, locks
from imagecache_lib.system.trace import TracePoint
from tests.flows.test_upkeep import NAME, UpkeepCase
from tests.support import files, leftovers
from tests.support.cache_case import ID, OTHER_ID

DAY = 86400


class SmallFilesCase(UpkeepCase):
    def store(self) -> CacheStore:
        return CacheStore(ic.CacheConfig(instances_path=str(self.instances)), self.host())

    def comes_back(self, call: Callable[[], object]) -> None:
        """Check that a call returns, or raises, and does not wait for ever."""
        done = threading.Event()

        def run() -> None:
            call()
            done.set()

        threading.Thread(target=run, daemon=True).start()
        self.assertTrue(done.wait(30), "it does not come back")


class TestNovasRegistry(SmallFilesCase):
    def setUp(self) -> None:
        super().setUp()
        self.cached()
        self.registry = self.instances / "compute_nodes"

    def assertWaits(self, problem: str) -> None:
        report = self.verify()
        self.assertIn("until these hosts have looked too", self.reason(report))
        (told,) = self.verify().problems
        self.assertIn(problem, told)
        self.assertEqual(1, len(os.listdir(self.private / "trash")))

    def assertGoes(self) -> None:
        self.verify()
        self.assertEqual([], os.listdir(self.private / "trash"))

    def test_one_that_is_torn_may_name_any_host(self) -> None:
        # So it is while Nova writes it: Nova truncates it first.
        for torn in (b"", b'{"nova-', b"[]", b"\xff"):
            with self.subTest(torn):
                self.registry.write_bytes(torn)
                self.assertWaits(f"{self.registry} is damaged")
        self.registry.unlink()
        self.assertGoes()

    def test_one_that_is_no_file_may_name_any_host(self) -> None:
        self.registry.symlink_to("nowhere")
        self.assertWaits("compute_nodes cannot be read")
        self.registry.unlink()
        self.registry.mkdir()
        self.assertWaits("compute_nodes is damaged")

    def test_a_host_lives_whose_entry_does_not_say_when_it_was_written(self) -> None:
        odd: tuple[object, ...] = ("yesterday", None, [], float("nan"), 10**4000)
        for entry in odd:
            with self.subTest(str(entry)[:9]):
                self.registry.write_text(json.dumps({"nova-only": entry}))
                self.assertWaits("nova-only")

    def test_a_clock_that_runs_ahead_makes_no_other_host_look_silent(self) -> None:
        now = self.base().parent.stat().st_mtime
        self.registry.write_text(json.dumps({"nova-only": now}))
        report = self.verify(host=self.host(clock=lambda: now + 3 * DAY))
        self.assertIn("nova-only", self.reason(report))

    def test_what_another_host_writes_meanwhile_is_not_lost(self) -> None:
        self.registry.write_text(json.dumps({"nova-only": 1.0}))
        lock = self.instances / "locks" / "nova-storage-registry-lock"
        others = [{"nova-only": 2.0, "another": 3.0}]

        def clock() -> float:
            # Under the lock the time is asked for between reading and writing. Locks do not lock here.
            if lock.exists() and others:
                self.registry.write_text(json.dumps(others.pop()))
            return 4.0

        self.verify(host=self.host(clock=clock, locking=False))
        found = json.loads(self.registry.read_text())
        self.assertEqual({"nova-only": 2.0, "another": 3.0, "here": 4.0}, found)

    def test_a_pass_does_not_wait_for_its_lock_for_long(self) -> None:
        self.registry.write_text(json.dumps({"nova-only": 1.0}))
        lock = str(self.instances / "locks" / "nova-storage-registry-lock")
        looks: Iterator[int] = iter(range(1000))
        with locks.without_waiting(lock, host=self.host()) as got:
            self.assertTrue(got)
            self.verify(host=self.host(monotonic=lambda: float(next(looks))))
        self.assertLess(next(looks), 20)


class TestNames(SmallFilesCase):
    def test_what_a_pass_says_is_one_line_of_text_whatever_files_are_called(self) -> None:
        base = self.cached()
        odd = "od\nd \x1b[31m\udcff"
        files.overlay(self.instances / odd / "disk", base)
        (self.cache_dir / odd).write_bytes(b"")
        report = self.verify()
        told = [*report.problems, *(each.reason for each in report.bases)]
        self.assertEqual([], [each for each in told if not each.isprintable()])
        self.assertIn(r"od\nd \x1b[31m\udcff", self.reason(report))
        self.assertIn(r"od\nd \x1b[31m\udcff", report.problems[0])


class TestPipes(SmallFilesCase):
    def test_one_in_the_place_of_a_file_in_flight_is_not_waited_for(self) -> None:
        self.cached()
        stage = self.private / "stage" / ("ab" * 16)
        os.mkfifo(stage)
        note = {"name": NAME, "reserved": 4096, "record": None}
        note["fetcher"] = {"host": "h", "pid": 1, "received": 0, "total": None}
        stage.with_suffix(".json").write_text(json.dumps(note))
        self.comes_back(self.manager().get_space)
        self.comes_back(lambda: self.spawn(self.manager(), OTHER_ID))


class TestDisksToForget(SmallFilesCase):
    def test_a_path_that_is_not_absolute_is_refused(self) -> None:
        # An empty one, of a variable that is not set, would forget every disk.
        base = self.cached()
        disk = self.instances / "uuid" / "disk"
        files.overlay(disk, base)
        self.verify()
        for path in ("", "uuid", "./uuid"):
            with self.subTest(path), self.assertRaisesRegex(errors.ConfigError, "no absolute path"):
                self.manager().forget_disks(path)
        self.assertEqual(1, self.manager().forget_disks(str(disk.parent)))


class TestLongFiles(SmallFilesCase):
    def test_one_that_is_longer_than_any_is_not_read_to_its_end(self) -> None:
        path = self.directory / "long"
        path.touch()
        os.truncate(path, 10 * 2**30)
        self.assertEqual(2**24, len(durable.read_file(str(path), limit=2**30) or b""))
        self.assertEqual(2**20, len(durable.read_file(str(path), limit=2**20) or b""))


class TestPins(SmallFilesCase):
    def test_an_owner_that_is_none_is_refused(self) -> None:
        manager = self.manager()
        for owner in ("", "\udcff", None, 3, b"me"):
            with self.subTest(repr(owner)), self.assertRaisesRegex(errors.ConfigError, "can own no pin"):
                manager.pin(ID, owner=owner)  # type: ignore[arg-type]
            with self.subTest(repr(owner)), self.assertRaisesRegex(errors.ConfigError, "can own no pin"):
                manager.unpin(ID, owner=owner)  # type: ignore[arg-type]
        self.assertEqual((), manager.list_pins())

    def test_an_end_that_is_no_time_is_refused(self) -> None:
        # Written down, it would make the pin one that cannot be read, which holds for ever.
        manager = self.manager()
        odd: tuple[object, ...] = ("tomorrow", True, [], {})
        for end in odd:
            with self.subTest(end), self.assertRaisesRegex(errors.ConfigError, "cannot end at"):
                manager.pin(ID, owner="me", expires=end)  # type: ignore[arg-type]
            with self.subTest(end), self.assertRaisesRegex(errors.ConfigError, "cannot end at"):
                manager.cache_image(ID, pin_until=end)  # type: ignore[arg-type]
        self.assertEqual((), manager.list_pins())


class TestHistory(SmallFilesCase):
    def test_an_old_entry_that_cannot_be_removed_keeps_no_other(self) -> None:
        self.cached()
        kept = self.private / "history" / "directory"
        kept.mkdir()
        old = [self.private / "history" / f"{number:032x}" for number in range(20)]
        for path in old:
            path.write_bytes(b"\n")
        for path in (kept, *old):
            files.age(path, seconds=61 * DAY)
        self.verify()
        self.assertEqual([], [path.name for path in old if path.exists()])

    def test_what_a_clock_that_was_ahead_dated_goes_with_time(self) -> None:
        self.cached()
        store = self.store()
        ahead = self.private / "history" / ("0" * 32)
        ahead.write_bytes(b"\n")
        files.age(ahead, seconds=-3650 * DAY)
        now = store.filesystem_now()
        history.sweep(store, now=now)
        history.sweep(store, now=now + 61 * DAY)
        self.assertFalse(ahead.exists())

    def test_lines_that_lie_ahead_are_put_aside(self) -> None:
        self.cached()
        (own,) = (self.private / "history").iterdir()
        line = json.loads(own.read_bytes().split(b"\n")[1])
        for at in (line["at"] + 3650 * DAY, float("inf"), float("nan")):
            own.write_text(f"\n{json.dumps({**line, 'at': at})}\n")
            self.verify(None)
            self.assertFalse(own.exists())
            self.assertTrue(self.manager().history(ID))


class TestLastReport(SmallFilesCase):
    def test_one_of_wrong_types_keeps_everything_until_the_next_one(self) -> None:
        base = self.cached()
        self.verify([ic.Instance("uuid", "there", images=(ID,))])
        (kept,) = (self.private / "hosts").glob("*.scan")
        written = json.loads(kept.read_text())
        for bad in (
            ["uuid", "there", [], [], 0, ["x"]],
            ["uuid", "there", [], [], 0, [float("nan")]],
            [{}, "there", [], [], 0, []],
            ["uuid", "there", "images", [], 0, []],
        ):
            with self.subTest(bad):
                kept.write_text(json.dumps({**written, "report": [bad]}))
                with self.assertRaisesRegex(errors.BackendError, "is damaged"):
                    self.manager().evict_image(ID)
        self.assertTrue(base.exists())


class TestTrash(SmallFilesCase):
    def test_the_record_of_a_base_that_got_the_same_inode_stays(self) -> None:
        self.cached()
        record = self.record()
        found = json.loads(record.read_text())
        newer = json.dumps({**found, "base_id": "cd" * 16})
        self.points.at(TracePoint.EVICT_UNLINKED, lambda: record.write_text(newer))
        self.verify()
        self.assertEqual(newer, record.read_text())

    def test_a_file_in_the_place_of_the_spare_directory_becomes_no_base(self) -> None:
        self.cached()
        spare = self.private / "spare"
        if spare.is_dir():
            spare.rmdir()
        spare.write_bytes(b"")
        entry = trash.TrashEntry(NAME, str(self.private / "trash" / f"{NAME}.{'0' * 32}"))
        with self.assertRaises(NotADirectoryError):
            os.rename(f"{spare}/", entry.directory)  # what an eviction on a full filesystem does
        self.verify()
        self.assertEqual(b"", spare.read_bytes())


class TestObservers(SmallFilesCase):
    def test_one_that_is_interrupted_leaves_nothing_in_flight(self) -> None:
        """At each event of a spawn and an eviction, as a green thread's timeout may end it."""
        calls: dict[str, Callable[[ic.ImageCacheManager], object]] = {
            "spawn": self.spawn,
            "evict": lambda manager: manager.verify_base_images([]),
        }
        for name, call in calls.items():
            for number in range(100):
                with self.subTest(name, number=number):
                    self.unused() if self.base().exists() else self.cached()
                    if name == "spawn":
                        self.manager(remove_unused_original_minimum_age_seconds=0).evict_image(ID)
                    told = _Interrupts(number)
                    config = ic.CacheConfig(instances_path=str(self.instances), num_retries=0)
                    manager = ic.ImageCacheManager(config, self.source, host=self.host(), observers=(told,))
                    try:
                        call(manager)
                    except Interrupt:
                        pass
                    else:
                        break
                    self.assertEqual([], self.in_flight())
                    self.assertEqual([], os.listdir(self.private / "trash"))
                    self.assertEqual([], leftovers.open_below(self.cache_dir))
            else:
                self.fail("there are too many events")


class Interrupt(BaseException):
    """As the timeout of a green thread."""


class _Interrupts:
    """An observer that is interrupted at one event."""

    def __init__(self, number: int) -> None:
        self._left = number

    def __call__(self, event: events.Event) -> None:
        self._left -= 1
        if self._left < 0:
            raise Interrupt
