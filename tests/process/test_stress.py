# SPDX-License-Identifier: Apache-2.0
"""Processes of three hosts on one directory, some with broken locks, some killed: no base in use is lost."""

from __future__ import annotations

import pathlib

import pytest

from tests.support import campaign, stress


@pytest.mark.campaign
@pytest.mark.parametrize("seed", campaign.pick(sample=range(1, 2), whole=range(1, 11)))
def test_nothing_in_use_is_lost_and_nothing_leaks(tmp_path: pathlib.Path, seed: int) -> None:
    seconds = campaign.pick(sample=15.0, whole=600.0)
    kills = stress.run([tmp_path, tmp_path, tmp_path], seconds=seconds, seed=seed)
    assert kills
