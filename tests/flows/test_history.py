# SPDX-License-Identifier: Apache-2.0
"""What happened to a base image can be told for weeks, by any host that shares the cache."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.store import history, layout, recover
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system.trace import TracePoint
from tests.support import files
from tests.support.cache_case import ID, OTHER_ID, CacheCase, raw_image

NAME = layout.base_name(ID)
DAY = 86400


class HistoryCase(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.keeper = self.manager(remove_unused_original_minimum_age_seconds=0)

    def happened_to(self, image: str = ID) -> list[str]:
        return [each.what for each in self.keeper.history(image)]

    @property
    def directory_of_history(self) -> pathlib.Path:
        return self.instances / "_base" / ".imagecache" / "history"

    def cache(self, **options: Any) -> CacheStore:
        config = ic.CacheConfig(instances_path=str(self.instances), **options)
        return CacheStore(config, self.host())


class TestWhatIsTold(HistoryCase):
    def test_a_base_that_came_and_went(self) -> None:
        self.keeper.cache_image(ID)
        self.keeper.verify_base_images(())
        self.assertFalse(self.base().exists())
        self.assertEqual(["fetched", "published", "moved to the trash", "evicted"], self.happened_to())
        evicted = self.keeper.history(ID)[-1]
        self.assertIn("unused since", evicted.why)
        self.assertEqual(("here", os.getpid(), NAME), (evicted.host, evicted.process, evicted.name))

    def test_the_disk_for_which_a_base_was_put_back_is_named(self) -> None:
        self.keeper.cache_image(ID)
        spawning = self.manager(lock_timeout=0.1)
        target = self.target()
        self.points.at(TracePoint.EVICT_RENAME, lambda: spawning.create_disk(ID, target))
        self.keeper.verify_base_images(())
        restored = next(each for each in self.keeper.history(ID) if each.what == "restored")
        self.assertEqual(f"used by the disk {target}", restored.why)

    def test_a_request_that_went_around_the_cache(self) -> None:
        self.keeper.create_disk(ID, self.target())
        fields = json.loads(self.record().read_bytes())
        self.record().write_bytes(json.dumps(fields | {"damaged": True}).encode())
        self.keeper.create_disk(ID, self.target("second"))
        bypassed = next(each for each in self.keeper.history(ID) if each.what == "bypassed")
        self.assertIn("damaged", bypassed.why)
        self.assertEqual(ID, bypassed.image_id)

    def test_an_operator_who_forgot_disks(self) -> None:
        self.keeper.create_disk(ID, self.target())
        self.keeper.verify_base_images(())
        self.keeper.forget_disks(str(self.instances))
        self.assertEqual("forgotten", self.happened_to()[-1])
        self.assertIn(str(self.instances), self.keeper.history(ID)[-1].why)

    def test_the_last_disk_that_a_base_had_is_named_and_why_it_counts_as_removed(self) -> None:
        keeper, instance = self.manager(), ic.Instance("instance-1", "here")
        for name in ("disk", "second"):
            keeper.create_disk(ID, self.target(name))
        keeper.verify_base_images([instance])
        told = []
        for name in ("second", "disk"):
            os.unlink(self.target(name))
            for _pass in range(2):
                keeper.verify_base_images([instance])
            told.append(self.happened_to().count("not referred to any more"))
        self.assertEqual([0, 1], told)
        removed = f"{self.target()} was removed: {os.path.dirname(self.target())} was read without it"
        self.assertIn(removed, keeper.history(ID)[-1].why)

    def test_a_disk_whose_instance_is_not_reported_any_more(self) -> None:
        keeper = self.manager()
        keeper.create_disk(ID, self.target())
        keeper.verify_base_images([ic.Instance("instance-1", "here")])
        os.rename(self.instances / "instance-1", self.directory / "away")
        keeper.verify_base_images([])
        self.assertIn("instance-1 is not in the driver's report", keeper.history(ID)[-1].why)

    def test_only_that_base_is_told_of(self) -> None:
        self.keeper.cache_image(ID)
        self.keeper.cache_image(OTHER_ID)
        self.keeper.create_swap(self.target("swap"), size_mb=16)
        self.assertEqual(["fetched", "published"], self.happened_to(OTHER_ID))
        self.assertEqual(["published"], self.happened_to("swap_16"))
        self.assertEqual(self.keeper.history(ID), self.keeper.history(NAME))
        self.assertEqual((), self.keeper.history("no image of anybody"))

    def test_a_hit_is_not_written_down(self) -> None:
        self.keeper.cache_image(ID)
        before = (next(self.directory_of_history.iterdir())).stat().st_size
        self.spawn(self.keeper)
        self.assertEqual(before, (next(self.directory_of_history.iterdir())).stat().st_size)

    def test_every_host_that_shares_the_cache_is_told_of(self) -> None:
        self.keeper.cache_image(ID)
        other = self.manager(host=self.host(name="there"), remove_unused_original_minimum_age_seconds=0)
        other.verify_base_images(())
        self.keeper.verify_base_images(())
        self.assertEqual(
            [("here", "published"), ("there", "moved to the trash"), ("here", "evicted")],
            [(each.host, each.what) for each in self.keeper.history(ID)][1:],
        )
        self.assertEqual(2, len(list(self.directory_of_history.iterdir())))

    def test_processes_append_at_once(self) -> None:
        self.keeper.cache_image(ID)
        script = textwrap.dedent(
            """
            import sys
            import imagecache_lib as ic
            from imagecache_lib import events
            from imagecache_lib.store import directory, history
            config = ic.CacheConfig(instances_path=sys.argv[1])
            observer = history.HistoryObserver(directory.CacheStore(config, ic.System(name="here")))
            for turn in range(200):
                observer(events.Bypassed(sys.argv[2], reason=f"{sys.argv[3]}.{turn} " + "x" * 900))
            """
        )
        words = [sys.executable, "-c", script, str(self.instances), NAME]
        running = [subprocess.Popen([*words, str(number)]) for number in range(4)]
        self.assertEqual([0] * 4, [each.wait(120) for each in running])
        found = {each.why.split()[0] for each in self.keeper.history(ID) if each.what == "bypassed"}
        self.assertEqual({f"{number}.{turn}" for number in range(4) for turn in range(200)}, found)

    def test_the_first_that_are_told_of_at_once_are_all_there(self) -> None:
        self.keeper.cache_image(ID)
        for turn in range(20):
            shutil.rmtree(self.directory_of_history)
            together = threading.Barrier(6)
            observer = history.HistoryObserver(self.cache())

            def tell(together: threading.Barrier = together, to: history.HistoryObserver = observer) -> None:
                together.wait(60)
                to(events.Bypassed(NAME, reason="at once"))

            telling = [threading.Thread(target=tell) for _number in range(6)]
            for each in telling:
                each.start()
            for each in telling:
                each.join()
            self.assertEqual(["bypassed"] * 6, self.happened_to(), turn)


class TestWhatCannotBeRead(HistoryCase):
    def test_a_torn_line_spoils_no_other(self) -> None:
        self.keeper.cache_image(ID)
        (file,) = self.directory_of_history.iterdir()
        whole = file.read_bytes()
        for torn in (whole[:-20], whole + b'{"at": 1, "na', whole + b"\0" * 4096, whole + b"[" * 100_000):
            file.write_bytes(torn)
            self.keeper.evict_image(ID)
            self.keeper.cache_image(ID)
            found = self.happened_to()
            self.assertEqual(["evicted", "fetched", "published"], found[-3:])
            self.assertEqual("fetched", found[0])

    def test_lines_of_other_kinds_are_passed_over(self) -> None:
        line = dataclasses.asdict(history.Happening(1.0, NAME, "evicted", "", "here", 1, "nova"))
        self.assertIsNotNone(history.parse(json.dumps(line | {"later": 1}).encode()))
        for wrong in ({"at": "now"}, {"name": 1}, {"process": "1"}, {"image_id": 3}, {"why": None}):
            self.assertIsNone(history.parse(json.dumps(line | wrong).encode()))
        for time in ("NaN", "Infinity", "1e300", "1" + "0" * 400):
            text = json.dumps(line | {"at": 0}).replace('"at": 0', f'"at": {time}')
            self.assertIsNone(history.parse(text.encode()), time)
        for data in (b"", b"null", b"[]", b"1", b"\xff", b"{}"):
            self.assertIsNone(history.parse(data))

    def test_a_history_that_cannot_be_written_stops_nothing_and_is_warned_of_once(self) -> None:
        self.keeper.cache_image(ID)
        files_there = self.directory_of_history
        shutil.rmtree(files_there)
        files_there.write_bytes(b"")
        with self.assertLogs("imagecache_lib.store.history", "WARNING") as logged:
            self.assertEqual(raw_image(2), self.spawn(self.keeper, OTHER_ID))
        self.assertEqual(1, len(logged.records))
        self.assertIn(str(files_there), logged.output[0])
        with self.assertRaises(errors.BackendError):
            self.keeper.history(ID)
        files_there.unlink()
        self.keeper.evict_image(ID)
        self.assertEqual("evicted", self.happened_to()[-1])
        shutil.rmtree(files_there)
        files_there.write_bytes(b"")
        with self.assertLogs("imagecache_lib.store.history", "WARNING"):
            self.keeper.evict_image(OTHER_ID)

    def test_no_cache_has_no_history(self) -> None:
        self.assertEqual((), self.keeper.history(ID))


class TestBounds(HistoryCase):
    def fill(self, cache: CacheStore, lines: int) -> None:
        observer = history.HistoryObserver(cache)
        for turn in range(lines):
            observer(events.Bypassed(NAME, reason=f"{turn} " + "x" * 900))

    def test_it_is_bounded_in_size_and_the_newest_stays(self) -> None:
        self.keeper.cache_image(ID)
        lines = 24 * 2**20 // 1100
        self.fill(self.cache(), lines)
        sizes = [file.stat().st_size for file in self.directory_of_history.iterdir()]
        self.assertLess(sum(sizes), 18 * 2**20)
        self.assertGreater(sum(sizes), 10 * 2**20)
        self.assertEqual(f"{lines - 1}", self.keeper.history(ID)[-1].why.split()[0])

    def test_a_reason_of_any_length_is_cut(self) -> None:
        self.keeper.cache_image(ID)
        history.HistoryObserver(self.cache())(events.Bypassed(NAME, reason="x" * 10**6))
        self.assertEqual(1000, len(self.keeper.history(ID)[-1].why))

    def test_what_is_too_old_goes_whichever_host_wrote_it(self) -> None:
        self.keeper.cache_image(ID)
        gone = self.directory_of_history / ("0" * 32)
        gone.write_bytes(b"\n")
        files.age(gone, seconds=61 * DAY)
        self.keeper.verify_base_images(None)
        self.assertFalse(gone.exists())
        self.assertEqual(2, len(self.keeper.history(ID)))

    def test_what_is_young_enough_stays(self) -> None:
        self.keeper.cache_image(ID)
        (file,) = self.directory_of_history.iterdir()
        files.age(file, seconds=59 * DAY)
        self.keeper.verify_base_images(None)
        self.assertEqual(2, len(self.keeper.history(ID)))

    def test_a_host_that_writes_on_lets_its_old_lines_go(self) -> None:
        self.keeper.cache_image(ID)
        now = self.host().clock()
        recover.recover(self.cache(), events.Observers(()))
        self.assertEqual(1, len(list(self.directory_of_history.iterdir())))
        history.sweep(self.cache(), now=now + 31 * DAY)
        (old,) = self.directory_of_history.iterdir()
        self.assertEqual(".old", old.suffix)
        self.assertEqual(2, len(self.keeper.history(ID)))
        history.sweep(self.cache(), now=now + 61 * DAY)
        self.assertEqual((), self.keeper.history(ID))
