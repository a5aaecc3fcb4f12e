# SPDX-License-Identifier: Apache-2.0
"""Who gives way to an image that is fetched, and what a reservation does when there is no room."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import unittest

import imagecache_lib as ic
from imagecache_lib import config, errors
from imagecache_lib.store import layout, reservations
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.evictor import Evictor, NoEvictor
from imagecache_lib.store.reservations import Reservation
from imagecache_lib.store.stage import Stage
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter
from imagecache_lib.testing.sources import FakeSource
from imagecache_lib.upkeep import policy
from imagecache_lib.upkeep.inventory import Entry
from imagecache_lib.upkeep.references import References
from tests.support.cache_case import ID, MIB, CacheCase, raw_image

NOW = 1_000_000.0
HUGE = 2**60


def entry(name: str, *, age: float = 7200, allocated: int = 10, links: int = 1) -> Entry:
    return Entry(name, layout.Kind.ORIGINAL, allocated, allocated, NOW - age, links)


def relieved(
    *entries: Entry, wanted: int, references: References | None = None, **limits: float
) -> list[str]:
    """Return who goes."""
    options = policy.Limits(**limits)  # type: ignore[arg-type]
    plan = policy.relieve(entries, references or References({}), options, now=NOW, wanted=wanted)
    assert sorted(each.name for each in entries) == [each.entry.name for each in plan.decisions]
    return [each.entry.name for each in plan.victims]


class TestWhoGivesWay(unittest.TestCase):
    def test_the_least_recently_used_go_first_and_no_more_than_needed(self) -> None:
        bases = [entry("a", age=5000), entry("b", age=9000), entry("c", age=7000)]
        self.assertEqual(["b"], relieved(*bases, wanted=10))
        self.assertEqual(["b", "c"], relieved(*bases, wanted=11))
        self.assertEqual([], relieved(*bases, wanted=0))

    def test_old_ones_stay_too_while_nobody_needs_their_room(self) -> None:
        self.assertEqual(["a"], relieved(entry("a", age=900_000), entry("b", age=800_000), wanted=1))

    def test_young_used_linked_and_unknown_ones_stay(self) -> None:
        self.assertEqual([], relieved(entry("a", age=3599), wanted=HUGE))
        self.assertEqual(["a"], relieved(entry("a", age=3600), wanted=HUGE))
        self.assertEqual([], relieved(entry("a"), wanted=HUGE, references=References({"a": "used"})))
        self.assertEqual([], relieved(entry("a", links=2), wanted=HUGE))
        self.assertEqual([], relieved(entry("a"), wanted=HUGE, references=References({}, unknown="why")))

    def test_other_limits_do_not_count_here(self) -> None:
        bases = [entry("a", age=5000), entry("b", age=9000)]
        self.assertEqual(["b"], relieved(*bases, wanted=10, max_size=1, free_low=HUGE))
        self.assertEqual([], relieved(*bases, wanted=10, remove=False))


class TestReserving(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.cache = CacheStore(config.CacheConfig(instances_path=str(self.instances)), self.host())
        self.cache.start()
        self.stage = Stage(self.cache, self.base().name)
        self.addCleanup(self.stage.discard)
        self.stage.write_info()

    def reserve(self, needed: int, evictor: Evictor) -> None:
        Reservation(self.stage, self.cache, evictor, Waiter(self.cache.host)).raise_to(needed)

    def test_what_is_short_is_asked_for_until_nothing_more_is_freed(self) -> None:
        # So much that what else is written on the filesystem meanwhile is little beside it.
        ballast = [self.directory / "one", self.directory / "another"]
        for path in ballast:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 128 * MIB)
        evictor = Freeing(ballast)
        with self.assertRaises(errors.NoSpaceError):
            self.reserve(HUGE, evictor)
        self.assertEqual(3, len(evictor.asked))
        self.assertTrue(HUGE // 2 < evictor.asked[0] < HUGE)
        self.assertEqual(0, reservations.outstanding(self.cache))

    def test_room_that_is_there_is_not_asked_for(self) -> None:
        evictor = Freeing([])
        self.reserve(4096, evictor)
        self.assertEqual([], evictor.asked)
        self.assertEqual(4096, reservations.outstanding(self.cache))

    def test_nobody_waits_for_room_that_nobody_will_give_back(self) -> None:
        def sleep(_seconds: float) -> None:
            raise AssertionError("there is nobody to wait for")

        cache = CacheStore(self.cache.config, System(sleep=sleep))
        waiter = Waiter(cache.host, deadline=cache.host.clock() + 60)
        with self.assertRaises(errors.NoSpaceError):
            Reservation(self.stage, cache, NoEvictor(), waiter).raise_to(HUGE)


class Freeing(NoEvictor):
    """An evictor that removes one file each time, and notes what it was asked for."""

    def __init__(self, files: list[pathlib.Path]) -> None:
        self.asked: list[int] = []
        self._files = files

    def make_room(self, wanted: int) -> int:
        self.asked.append(wanted)
        if not self._files:
            return 0
        path = self._files.pop()
        freed = path.stat().st_blocks * 512
        path.unlink()
        return freed


class TestReport(CacheCase):
    def test_it_tells_what_is_used_promised_and_in_the_way(self) -> None:
        manager = self.manager(max_cache_size=5, space_minimum_age_seconds=0)
        manager.cache_image(ID)
        report = manager.get_space()
        self.assertEqual(manager.get_disk_usage(), report.used)
        self.assertEqual(self.base().stat().st_blocks * 512, report.reclaimable)
        self.assertEqual((0, 5), (report.reserved, report.limit))
        self.assertGreater(report.free, 0)
        manager.pin(ID, owner="somebody")
        self.assertEqual(0, manager.get_space().reclaimable)
        self.assertTrue(self.base().exists())


class Claiming(FakeSource):
    """Says a length of one image that no filesystem has room for."""

    def describe(self, image_id: str) -> ic.Image:
        image = super().describe(image_id)
        return dataclasses.replace(image, size=HUGE) if image_id == "huge" else image


class TestLengthsThatAreClaimed(CacheCase):
    def test_an_absurd_one_costs_the_cache_nothing(self) -> None:
        source = Claiming({ID: raw_image(1), "huge": raw_image(2)})
        manager = self.manager(source, space_minimum_age_seconds=0, max_virtual_size=HUGE)
        manager.cache_image(ID)
        with self.assertRaises(errors.NoSpaceError):
            manager.cache_image("huge")
        self.assertTrue(manager.is_cached(ID))

    def test_one_beyond_the_largest_disk_is_refused_for_that(self) -> None:
        source = Claiming({ID: raw_image(1), "huge": raw_image(2)})
        with self.assertRaisesRegex(errors.ImageRejected, "absurd"):
            self.manager(source).cache_image("huge")
        self.assertEqual(0, source.opens)
