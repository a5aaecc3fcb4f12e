# SPDX-License-Identifier: Apache-2.0
"""Processes of three hosts on one directory, with locks or without, some killed: nothing in use is lost.

A campaign lets them work with each of ten seeds, by default for ten minutes.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import campaign, stress

SEED = campaign.SEED


@pytest.mark.campaign
@pytest.mark.parametrize("locking", stress.LOCKING)
@pytest.mark.parametrize("seed", range(SEED, SEED + campaign.pick(sample=1, whole=10)))
def test_nothing_in_use_is_lost_and_nothing_leaks(
    tmp_path: pathlib.Path, seed: int, locking: str, record_property: Callable[[str, Any], None]
) -> None:
    seconds = campaign.seconds(sample=8.0)
    kills = stress.run([tmp_path, tmp_path, tmp_path], seconds=seconds, seed=seed, locking=locking)
    print(f"{locking}: {kills} processes killed, seed {seed}")  # noqa: T201
    record_property("kills", kills)
    assert kills
