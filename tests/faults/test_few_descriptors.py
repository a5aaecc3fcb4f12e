# SPDX-License-Identifier: Apache-2.0
"""A process that may open no more files gets the library's errors, and nothing is lost or left."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.campaigns import descriptors, injected
from tests.support import campaign, needs

SEED = campaign.SEED


@pytest.mark.campaign
def test_few_descriptors_do_no_harm(record_property: Callable[[str, Any], None]) -> None:
    needs.root()
    every = [(name, spare) for name in sorted(injected.SCENES) for spare in range(descriptors.MOST)]
    todo = campaign.pick(sample=sorted(random.Random(SEED).sample(every, 30)), whole=every)
    for name in {name for name, _spare in todo}:
        injected.warm_up(name)
    wrong = []
    for name, spare in todo:
        if (found := descriptors.starve(name, spare)) is not None:
            wrong.append(f"{name} with {spare} left: {found}")
    print(f"{len(todo)} calls with few descriptors, {len(wrong)} did harm, seed {SEED}")  # noqa: T201
    record_property("calls", len(todo))
    assert not wrong, "\n\n".join(wrong[:10])
