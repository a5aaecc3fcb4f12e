# SPDX-License-Identifier: Apache-2.0
"""The model of many hosts agrees with what few real ones took, and its figures hold."""

from __future__ import annotations

import unittest

import pytest

from benchmarks import relay_model
from benchmarks.relay_model import Fleet
from tests.support import campaign

#: Sixteen real hosts in namespaces, as ``benchmarks/relay.py`` measured them: seconds until the last one, and
#: until half of them, had the image. One link takes 10.07 seconds.
_CHAIN_LAST, _TROUBLE_MEDIAN = 11.7, 14.0
_LAB = Fleet(hosts=16, size=24 * 2**20, link=20e6, origin=40e6, heads=1, noticed=0.2)


class TestModel(unittest.TestCase):
    def test_a_chain_takes_as_long_as_it_was_measured(self) -> None:
        outcome = relay_model.run(_LAB)
        self.assertAlmostEqual(_CHAIN_LAST, outcome.last, delta=0.15 * _CHAIN_LAST)
        self.assertAlmostEqual(1.0, outcome.origin, places=2)
        self.assertEqual(0, outcome.moved)

    def test_a_chain_in_trouble_takes_as_long_as_it_was_measured(self) -> None:
        trouble = Fleet(**{**vars(_LAB), "slow": {2: 0.2}, "dying": {5: 5.0}})
        outcome = relay_model.run(trouble)
        self.assertAlmostEqual(_TROUBLE_MEDIAN, outcome.median, delta=0.2 * _TROUBLE_MEDIAN)
        self.assertEqual(14, len(outcome.sound()))

    def test_thirteen_hundred_hosts_have_an_image_within_ninety_seconds(self) -> None:
        outcome = relay_model.run(Fleet(hosts=1300, size=1_700_000_000))
        self.assertEqual(1300, len(outcome.times))
        self.assertLess(outcome.last, 90)
        self.assertAlmostEqual(2.0, outcome.origin, places=1)

    @pytest.mark.campaign
    def test_every_host_that_lives_has_the_image_though_some_are_slow_late_or_dead(self) -> None:
        """The whole has ten thousand hosts, as the documentation does."""
        hosts, sites = campaign.pick(sample=(300, 3), whole=(10_000, 40))
        sound = Fleet(hosts=hosts, size=500_000_000, sites=sites, wan=1e9, origin=sites * 1e9)
        odd = sound.with_faults(0.02)
        with_faults = relay_model.run(odd)
        self.assertEqual(set(range(hosts)) - set(odd.dying), set(with_faults.times) - set(odd.dying))
        self.assertLess(with_faults.last, 3 * relay_model.run(sound).last)
        # Those that lost the host before them are no flight to the image service.
        self.assertLess(with_faults.origin, 1.1 * sound.heads * sites)


if __name__ == "__main__":
    unittest.main()
