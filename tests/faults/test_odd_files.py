# SPDX-License-Identifier: Apache-2.0
"""One small file that is not what it should be stops no more than it is about, and loses nothing."""

from __future__ import annotations

import os
import pathlib
import random
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

from tests.campaigns import odd_files
from tests.support import campaign, needs


@pytest.mark.campaign
def test_whatever_lies_in_a_files_place_does_no_harm(record_property: Callable[[str, Any], None]) -> None:
    needs.root()  # to make a device
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    chance = random.Random(campaign.SEED)
    wrong: list[str] = []
    worlds = 0
    with tempfile.TemporaryDirectory(prefix="imagecache-", dir=where) as home:
        (first := pathlib.Path(home, "first")).mkdir()
        for place in odd_files.World(first).places():
            few = chance.sample(sorted(odd_files.ODDITIES), 1)
            for oddity in campaign.pick(sample=few, whole=sorted(odd_files.ODDITIES)):
                worlds += 1
                (directory := pathlib.Path(home, str(worlds))).mkdir()
                world = odd_files.World(directory)
                world.replace(place, oddity)
                wrong += [f"{place}, {oddity}: {each}" for each in world.wrong()]
    print(f"{worlds} caches, {len(wrong)} faults, seed {campaign.SEED}")  # noqa: T201
    record_property("caches", worlds)
    assert not wrong, "\n\n".join(wrong[:10])
