# SPDX-License-Identifier: Apache-2.0
"""Any system call of any public call may fail: the library's error comes out, and nothing is lost or left."""

from __future__ import annotations

import random

import pytest

from tests.campaigns import injected
from tests.support import campaign, needs

SEED = campaign.SEED


@pytest.mark.campaign
def test_an_error_of_any_system_call_is_the_librarys_and_does_no_harm() -> None:
    needs.root()
    chance = random.Random(SEED)
    wrong: list[str] = []
    count = 0
    if campaign.WHOLE:
        for name in injected.SCENES:
            injected.warm_up(name)
            for fault in injected.faults(name):
                count += 1
                if (found := injected.inject(*fault)) is not None:
                    print(f"{fault}: {found}")  # noqa: T201
                    wrong.append(f"{fault}: {found}")
    else:
        for fault in injected.chosen(48, chance):
            count += 1
            if (found := injected.inject(*fault)) is not None:
                wrong.append(f"{fault}: {found}")
    print(f"{count} errors injected, {len(wrong)} did harm, seed {SEED}")  # noqa: T201
    assert not wrong, "\n\n".join(wrong[:10])


@pytest.mark.campaign
def test_a_kill_at_any_system_call_does_no_harm() -> None:
    needs.root()
    if campaign.WHOLE:
        for name in injected.SCENES:
            injected.warm_up(name)
        places = [place for name in injected.SCENES for place in injected.kills(name)]
    else:
        places = injected.chosen(16, random.Random(SEED), killed=True)
    wrong = [f"{place}: {found}" for place in places if (found := injected.inject(*place)) is not None]
    print(f"{len(places)} kills, {len(wrong)} did harm, seed {SEED}")  # noqa: T201
    assert not wrong, "\n\n".join(wrong[:10])
