# SPDX-License-Identifier: Apache-2.0
"""Processes of three hosts on one directory, some with broken locks, some killed: no base in use is lost.

``IMAGECACHE_STRESS_SECONDS`` makes it longer, ``IMAGECACHE_STRESS_SEED`` makes other choices.
"""

from __future__ import annotations

import os
import pathlib

from tests.support import stress


def test_nothing_in_use_is_lost_and_nothing_leaks(tmp_path: pathlib.Path) -> None:
    seconds = float(os.environ.get("IMAGECACHE_STRESS_SECONDS", "15"))
    seed = int(os.environ.get("IMAGECACHE_STRESS_SEED", "1"))
    kills = stress.run([tmp_path, tmp_path, tmp_path], seconds=seconds, seed=seed)
    assert kills
