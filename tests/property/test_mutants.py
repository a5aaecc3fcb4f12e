# SPDX-License-Identifier: Apache-2.0
"""A sample of the campaign of mutants: parsers accept or reject, and do nothing else."""

from __future__ import annotations

import os
import pathlib
import random
import tempfile
import unittest

from tests.campaigns import mutants

_WHOLE = os.environ.get("IMAGECACHE_CAMPAIGN") == "1"


class TestMutants(unittest.TestCase):
    def setUp(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.seeds = mutants.seeds(pathlib.Path(directory))

    def test_parsers_accept_or_reject(self) -> None:
        count = 100_000 if _WHOLE else 400
        outcomes = mutants.run_parsers(count, random.Random(1), self.seeds)
        for format in ("qcow2", "vmdk", "vpc", "vhdx", "vdi"):
            self.assertGreater(outcomes.get(f"{format} rejected", 0), 0)

    def test_the_library_stores_what_qemu_img_reads(self) -> None:
        count = 500 if _WHOLE else 6
        outcomes = mutants.run_library(count, random.Random(1), self.seeds)
        self.assertEqual(5 * count, sum(outcomes.values()))
