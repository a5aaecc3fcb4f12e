# SPDX-License-Identifier: Apache-2.0
"""A sample of the campaign of mutants: each is accepted with the right bytes or refused."""

from __future__ import annotations

import os
import pathlib
import tempfile
import unittest

import pytest

from tests.campaigns import mutant_seeds, mutants
from tests.support.campaign import pick

SEED = int(os.environ.get("IMAGECACHE_SEED", "1"))


@pytest.mark.campaign
class TestMutants(unittest.TestCase):
    def setUp(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.seeds = mutant_seeds.make(pathlib.Path(directory))
        self.tally = mutants.Tally()

    def test_parsers_accept_or_reject(self) -> None:
        count = pick(sample=200, whole=100_000)
        mutants.run_parsers(count, SEED, self.seeds, self.tally)
        self.assertEqual(0, self.tally.failures, f"seed {SEED}")
        for format in ("qcow2", "vmdk", "vpc", "vhdx", "vdi"):
            for outcome in ("accepted", "rejected"):
                self.assertGreater(self.tally.outcomes[f"header of {format} {outcome}"], 0, format)

    def test_the_library_stores_what_other_programs_read(self) -> None:
        count = pick(sample=4, whole=500)
        mutants.run_library(count, SEED, self.seeds, self.tally)
        self.assertEqual(0, self.tally.failures, f"seed {SEED}")
        kinds = {seed.kind for seed in self.seeds}
        self.assertEqual(len(kinds) * count, sum(self.tally.outcomes.values()))
