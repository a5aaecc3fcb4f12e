# SPDX-License-Identifier: Apache-2.0
"""Rules that every eviction plan keeps, whatever is in the cache."""

from __future__ import annotations

import dataclasses
import random
import unittest

from hypothesis import given
from hypothesis import strategies as st

from imagecache_lib.store import layout
from imagecache_lib.upkeep import policy
from imagecache_lib.upkeep.inventory import Entry
from imagecache_lib.upkeep.references import References

NOW = 2_000_000.0

names = st.integers(0, 30).map(lambda number: layout.base_name(str(number)))
entries = st.builds(
    Entry,
    name=st.one_of(
        names, names.map(lambda name: f"{name}_20"), st.sampled_from(["swap_1", "ephemeral_1_0706d66"])
    ),
    kind=st.just(layout.Kind.UNKNOWN),
    allocated=st.integers(0, 1000),
    apparent=st.integers(0, 1000),
    last_use=st.floats(NOW - 200_000, NOW + 200_000),
    links=st.integers(1, 3),
).map(lambda entry: dataclasses.replace(entry, kind=layout.classify(entry.name)))
inventories = st.lists(entries, unique_by=lambda entry: entry.name, max_size=20)
references = st.builds(
    References,
    users=st.dictionaries(names, st.just("used by somebody"), max_size=10),
    unknown=st.one_of(st.none(), st.none(), st.just("a disk cannot be read")),
)
limits = st.builds(
    policy.Limits,
    remove=st.booleans(),
    original_age=st.sampled_from([0, 3600, 86400]),
    resized_age=st.sampled_from([0, 3600]),
    floor_age=st.sampled_from([0, 60, 3600]),
    max_size=st.integers(0, 5000),
    free_low=st.integers(0, 2000),
    free_high=st.integers(2000, 4000),
)
spaces = st.builds(
    policy.Space, used=st.integers(0, 20_000), free=st.integers(0, 5000), wanted=st.integers(0, 3000)
)


class TestPlans(unittest.TestCase):
    @given(inventories, references, limits, spaces)
    def test_nothing_goes_that_is_needed_or_too_young(
        self, found: list[Entry], needed: References, allowed: policy.Limits, space: policy.Space
    ) -> None:
        plan = policy.plan(found, needed, allowed, now=NOW, space=space)
        self.assertEqual(sorted(entry.name for entry in found), [each.entry.name for each in plan.decisions])
        for victim in plan.victims:
            entry = victim.entry
            self.assertTrue(allowed.remove)
            self.assertIsNone(needed.unknown)
            self.assertNotIn(entry.name, needed.users)
            self.assertEqual(1, entry.links)
            self.assertGreaterEqual(NOW - entry.last_use, min(allowed.age(entry), allowed.floor_age))
            self.assertTrue(victim.reason)

    @given(inventories, references, limits, spaces, st.randoms(use_true_random=False))
    def test_the_order_of_the_listing_does_not_matter(
        self,
        found: list[Entry],
        needed: References,
        allowed: policy.Limits,
        space: policy.Space,
        order: random.Random,
    ) -> None:
        shuffled = list(found)
        order.shuffle(shuffled)
        self.assertEqual(
            policy.plan(found, needed, allowed, now=NOW, space=space),
            policy.plan(shuffled, needed, allowed, now=NOW, space=space),
        )

    @given(inventories, references, limits, spaces)
    def test_a_second_plan_after_the_first_was_carried_out_is_empty(
        self, found: list[Entry], needed: References, allowed: policy.Limits, space: policy.Space
    ) -> None:
        first = policy.plan(found, needed, allowed, now=NOW, space=space)
        gone = {victim.entry.name for victim in first.victims}
        freed = sum(victim.entry.allocated for victim in first.victims)
        left = [entry for entry in found if entry.name not in gone]
        now_space = policy.Space(space.used - freed, space.free + freed, max(0, space.wanted - freed))
        second = policy.plan(left, needed, allowed, now=NOW, space=now_space)
        self.assertEqual((), second.victims)

    @given(inventories, references, limits)
    def test_without_pressure_everything_old_and_unneeded_goes_and_nothing_else(
        self, found: list[Entry], needed: References, allowed: policy.Limits
    ) -> None:
        allowed = dataclasses.replace(allowed, max_size=0, free_low=0)
        plan = policy.plan(found, needed, allowed, now=NOW)
        expected = {
            entry.name
            for entry in found
            if allowed.remove
            and policy.needed(entry, needed) is None
            and NOW - entry.last_use >= allowed.age(entry)
        }
        self.assertEqual(expected, {victim.entry.name for victim in plan.victims})

    @given(inventories, references, limits, spaces)
    def test_pressure_takes_the_least_recently_used_and_no_more_than_it_must(
        self, found: list[Entry], needed: References, allowed: policy.Limits, space: policy.Space
    ) -> None:
        plan = policy.plan(found, needed, allowed, now=NOW, space=space)
        calm = policy.plan(found, needed, dataclasses.replace(allowed, max_size=0, free_low=0), now=NOW)
        aged = {victim.entry.name for victim in calm.victims}
        extra = sorted(
            (victim.entry for victim in plan.victims if victim.entry.name not in aged),
            key=lambda entry: (entry.last_use, entry.name),
        )
        could = [
            each.entry
            for each in plan.decisions
            if not each.evict
            and policy.needed(each.entry, needed) is None
            and NOW - each.entry.last_use >= allowed.floor_age
        ]
        pressure, _why = space.pressure(allowed)
        pressure -= sum(victim.entry.allocated for victim in calm.victims)
        if extra:
            newest = (extra[-1].last_use, extra[-1].name)
            self.assertTrue(all((entry.last_use, entry.name) > newest for entry in could))
            self.assertGreater(pressure - sum(entry.allocated for entry in extra[:-1]), 0, "one too many")
        if could and allowed.remove:
            self.assertLessEqual(pressure - sum(entry.allocated for entry in extra), 0, "too few")
