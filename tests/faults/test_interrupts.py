# SPDX-License-Identifier: Apache-2.0
"""An interrupt may come anywhere: it comes out, the process goes on, and nothing is lost, left or locked."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.campaigns import injected, interrupted
from tests.support import campaign, needs

SEED = campaign.SEED


@pytest.mark.campaign
def test_an_exception_at_any_line_comes_out_and_does_no_harm(
    record_property: Callable[[str, Any], None],
) -> None:
    needs.root()
    chance = random.Random(SEED)
    wrong: list[str] = []
    open_files = 0
    todo = interrupted.chosen(chance, each=2, most=campaign.pick(sample=30, whole=None))
    for name, line in todo:
        found, left_open = interrupted.interrupt(name, line)
        open_files += left_open
        if found is not None:
            print(f"{name}, {line}: {found}")  # noqa: T201
            wrong.append(f"{name}, {line}: {found}")
    count = len(todo)
    print(  # noqa: T201
        f"{count} interrupts, {len(wrong)} did harm, {open_files} left a descriptor open, seed {SEED}"
    )
    record_property("interrupts", count)
    assert not wrong, "\n\n".join(wrong[:10])
    assert open_files <= count / 20


@pytest.mark.campaign
def test_a_sigint_ends_the_call_and_does_no_harm(record_property: Callable[[str, Any], None]) -> None:
    needs.root()
    chance = random.Random(SEED)
    wrong: list[str] = []
    count = 0
    names = campaign.pick(sample=chance.sample(sorted(injected.SCENES), 6), whole=sorted(injected.SCENES))
    for name in names:
        injected.warm_up(name)
        for _turn in range(campaign.pick(sample=3, whole=100)):
            count += 1
            if (found := interrupted.signalled(name, chance, seconds=0.02)) is not None:
                wrong.append(f"{name}: {found}")
    print(f"{count} signals, {len(wrong)} did harm, seed {SEED}")  # noqa: T201
    record_property("signals", count)
    assert not wrong, "\n\n".join(wrong[:10])
