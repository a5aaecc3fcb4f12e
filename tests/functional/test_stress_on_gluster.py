# SPDX-License-Identifier: Apache-2.0
"""Two hosts on a real network filesystem, each with its own view and its own caches of it."""

from __future__ import annotations

import pathlib

import pytest

from tests.lab import gluster
from tests.support import campaign, stress


@pytest.mark.campaign
@pytest.mark.parametrize("seed", campaign.pick(sample=range(1, 3), whole=range(1, 11)))
def test_nothing_in_use_is_lost_and_nothing_leaks(tmp_path: pathlib.Path, seed: int) -> None:
    seconds = campaign.seconds(sample=10.0)
    with gluster.mounted_twice(tmp_path) as (one, two):
        assert stress.run([one, two], seconds=seconds, seed=seed)
