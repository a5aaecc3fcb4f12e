# SPDX-License-Identifier: Apache-2.0
"""A lease: who sees it, who waits for it, and how old its base gets."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from typing import Any

import imagecache_lib as ic
from imagecache_lib.spawn.keeper import Keeper
from imagecache_lib.store import layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import holders, locks
from imagecache_lib.system.host import System
from tests.support import files, leftovers
from tests.support.cache_case import ID, CacheCase

DAY = 86400

#: Leases a base, and ends without leaving the lease.
_HOLDER = """
import sys
import imagecache_lib as ic
from imagecache_lib.testing.sources import FakeSource
cache = ic.ImageCacheManager(ic.CacheConfig(instances_path=sys.argv[1]), FakeSource({"image": bytes(512)}))
held = cache.fetch_or_reuse("image")
held.__enter__()
"""


class TestLeases(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.cache = self.manager()
        self.path = self.base()
        self.lock = str(self.instances / "locks" / layout.lock_name(self.path.name))

    def reason(self, report: ic.VerifyReport) -> str:
        return next(base.reason for base in report.bases if base.name == self.path.name)

    def test_what_is_leased_stays_and_what_was_leased_goes(self) -> None:
        with self.cache.fetch_or_reuse(ID):
            self.grow_old()
            report = self.cache.verify_base_images([])
            self.assertEqual([], list(report.evicted))
            self.assertIn("leased", self.reason(report))
            self.assertTrue(self.path.exists())
        self.grow_old()
        self.cache.verify_base_images([])
        self.assertFalse(self.path.exists())

    def test_another_process_sees_it(self) -> None:
        other = self.manager(host=System(name="here"))
        with self.cache.fetch_or_reuse(ID):
            self.grow_old()
            with self.assertRaisesRegex(ic.ImageCacheError, "leased"):
                other.evict_image(ID)

    def test_a_lease_that_begins_while_its_base_is_renamed_away_gets_it_back(self) -> None:
        self.cache.cache_image(ID)
        self.grow_old()
        fd = os.open(self.path, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        # Without its lock file an evictor may come between a lease's look and its mark.
        self.points.at("evict:renamed", lambda: holders.lease(fd, self.cache.host))
        report = self.cache.verify_base_images([])
        self.assertEqual([], list(report.evicted))
        self.assertTrue(self.path.exists())
        self.assertEqual(os.fstat(fd).st_ino, self.path.stat().st_ino)

    def test_nobody_waits_for_a_lease(self) -> None:
        with (
            self.cache.fetch_or_reuse(ID),
            locks.without_waiting(self.lock, host=self.cache.host) as got,
        ):
            self.assertTrue(got)  # what Nova's pass takes, and Nova's code in this process

    def test_a_fetch_keeps_novas_lock(self) -> None:
        seen: list[bool] = []
        self.points.at("ingest:sealed", lambda: seen.append(locks.is_taken(self.lock, host=self.cache.host)))
        self.cache.cache_image(ID)
        self.assertEqual([True], seen)

    def test_a_lasting_lease_keeps_its_base_young(self) -> None:
        cache = self.manager(
            remove_unused_original_minimum_age_seconds=1, remove_unused_resized_minimum_age_seconds=1
        )
        with cache.fetch_or_reuse(ID):
            self.became_young()
            with cache.fetch_or_reuse(ID):
                self.became_young()
            self.became_young()

    def test_a_lease_of_what_is_cached_keeps_its_base_young(self) -> None:
        cache = self.manager(remove_unused_resized_minimum_age_seconds=0)
        cache.cache_image(ID)
        with cache.lease_cached(ID):
            self.became_young()

    def test_a_lease_that_is_dropped_as_it_begins_keeps_nothing_young(self) -> None:
        self.manager().cache_image(ID)
        cache = CacheStore(ic.CacheConfig(instances_path=str(self.instances)), self.host())
        opened = cache.open_base(layout.base_name(ID))
        assert opened is not None
        self.addCleanup(opened.close)
        with leftovers.no_thread_left():
            Keeper(cache, opened).__enter__()  # what an interrupt right after it leaves

    def grow_old(self) -> None:
        files.age(self.path, seconds=2 * DAY)
        files.age(self.record(), seconds=2 * DAY)

    def became_young(self) -> None:
        self.grow_old()
        until = time.monotonic() + 60
        while self.path.stat().st_mtime < time.time() - DAY:
            self.assertLess(time.monotonic(), until, "nothing touches the base")
            time.sleep(0.05)

    def test_a_lease_leaves_no_thread_behind(self) -> None:
        for error in (KeyError, None):
            with leftovers.no_thread_left(), contextlib.suppress(KeyError), self.cache.fetch_or_reuse(ID):
                if error is not None:
                    raise error

    def test_a_process_may_end_with_a_lease(self) -> None:
        command = (sys.executable, "-W", "ignore", "-c", _HOLDER, self.instances)
        ended = subprocess.run(command, timeout=60, stderr=subprocess.PIPE, text=True, check=False)
        self.assertEqual((0, ""), (ended.returncode, ended.stderr))

    def test_an_overlay_starts_no_thread(self) -> None:
        self.cache.cache_image(ID)
        before, seen = set(threading.enumerate()), []
        self.points.at("disk:made", lambda: seen.append(set(threading.enumerate()) - before))
        self.cache.create_disk(ID, self.target())
        self.assertEqual([set()], seen)

    def test_a_lease_survives_that_another_one_of_its_base_ends(self) -> None:
        with self.cache.fetch_or_reuse(ID):
            with self.cache.fetch_or_reuse(ID):
                pass
            self.grow_old()
            self.assertEqual([], list(self.cache.verify_base_images([]).evicted))

    def test_a_dry_run_and_the_survey_say_that_it_is_leased(self) -> None:
        with self.cache.fetch_or_reuse(ID):
            self.grow_old()
            self.assertIn("leased", self.reason(self.cache.verify_base_images([], dry_run=True)))
            kinds = self.kinds(self.cache)
        self.assertIn("leased", kinds)
        self.assertNotIn("elsewhere", kinds)

    def kinds(self, cache: Any) -> list[str]:
        found = next(each for each in cache.survey([]).bases if each.base.name == self.path.name)
        return [reason.code for reason in found.reasons]
