# SPDX-License-Identifier: Apache-2.0
"""A sample of the campaign of mutants: parsers accept or reject, and do nothing else."""

from __future__ import annotations

import pathlib
import random
import tempfile
import unittest

import pytest

from tests.campaigns import mutants
from tests.support.campaign import pick


@pytest.mark.campaign
class TestMutants(unittest.TestCase):
    def setUp(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.seeds = mutants.seeds(pathlib.Path(directory))

    def test_parsers_accept_or_reject(self) -> None:
        count = pick(sample=400, whole=100_000)
        outcomes = mutants.run_parsers(count, random.Random(1), self.seeds)
        for format in ("qcow2", "vmdk", "vpc", "vhdx", "vdi"):
            self.assertGreater(outcomes.get(f"{format} rejected", 0), 0)

    def test_the_library_stores_what_qemu_img_reads(self) -> None:
        count = pick(sample=6, whole=500)
        outcomes = mutants.run_library(count, random.Random(1), self.seeds)
        self.assertEqual(5 * count, sum(outcomes.values()))
