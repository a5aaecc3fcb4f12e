# SPDX-License-Identifier: Apache-2.0
"""Whatever a power cut leaves of an operation, the next start repairs it and every promise holds.

A sample of the states of each operation, and of some pairs of operations. A campaign checks all states of
each operation, and many of each pair.
"""

from __future__ import annotations

import pathlib
import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.campaigns.crashes import PAIRS, SCENES, Crashes
from tests.support import campaign, needs

SEED = campaign.SEED


@pytest.fixture
def directory() -> Iterator[pathlib.Path]:
    needs.root()
    # In memory: what a sync does is what the recording says, and there it takes no time.
    with tempfile.TemporaryDirectory(prefix="imagecache-", dir="/dev/shm") as path:
        yield pathlib.Path(path)


@pytest.mark.campaign
@pytest.mark.parametrize("name", SCENES)
def test_every_state_that_a_power_cut_leaves_is_repaired(
    directory: pathlib.Path, name: str, record_property: Callable[[str, Any], None]
) -> None:
    crashes = Crashes(directory, SCENES[name])
    chance = random.Random(f"{name} {SEED}")
    for present, marks in crashes.everything() if campaign.WHOLE else crashes.some(10, chance):
        crashes.check(present, marks)
    print(f"{name}: {len(crashes.recording.steps)} steps, {crashes.checked} states, seed {SEED}")  # noqa: T201
    record_property("states", crashes.checked)
    assert crashes.checked


@pytest.mark.campaign
@pytest.mark.parametrize(
    "name", campaign.pick(sample=random.Random(SEED).sample(list(PAIRS), 4), whole=list(PAIRS))
)
def test_states_between_two_operations_are_repaired(
    directory: pathlib.Path, name: str, record_property: Callable[[str, Any], None]
) -> None:
    crashes = Crashes(directory, PAIRS[name])
    chance = random.Random(f"{name} {SEED}")
    for present, marks in crashes.some(campaign.pick(sample=10, whole=500), chance):
        crashes.check(present, marks)
    print(f"{name}: {len(crashes.recording.steps)} steps, {crashes.checked} states, seed {SEED}")  # noqa: T201
    record_property("states", crashes.checked)
