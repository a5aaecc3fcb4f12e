# SPDX-License-Identifier: Apache-2.0
"""Two hosts on a real network filesystem, each with its own view and its own caches of it."""

from __future__ import annotations

import os
import pathlib

import pytest

from tests.lab import gluster
from tests.support import stress


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_in_use_is_lost_and_nothing_leaks(tmp_path: pathlib.Path, seed: int) -> None:
    seconds = float(os.environ.get("IMAGECACHE_STRESS_SECONDS", "10"))
    with gluster.mounted_twice(tmp_path) as (one, two):
        assert stress.run([one, two], seconds=seconds, seed=seed)
