# SPDX-License-Identifier: Apache-2.0
"""An interrupt may come anywhere: it comes out, the process goes on, and nothing is lost, left or locked."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from imagecache_lib.formats import program
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
    left_open: list[str] = []
    todo = interrupted.chosen(chance, each=2, most=campaign.pick(sample=30, whole=None))
    for name, line in todo:
        found, is_left_open = interrupted.interrupt(name, line)
        if is_left_open:
            left_open.append(f"{name}, {line}")
        if found is not None:
            print(f"{name}, {line}: {found}")  # noqa: T201
            wrong.append(f"{name}, {line}: {found}")
    count = len(todo)
    # Of these no lock is held, which is among the harm.
    told = "".join(f"\n  {each}" for each in left_open)
    did = f"{len(wrong)} did harm, {len(left_open)} left a descriptor open"
    print(f"{count} interrupts, {did}, seed {SEED}{told}")  # noqa: T201
    record_property("interrupts", count)
    record_property("open", len(left_open))
    assert not wrong, "\n\n".join(wrong[:10])


def test_an_interrupt_before_a_program_is_watched_comes_out() -> None:
    """What had not been started yet cannot be waited for, and the error of that hid the interrupt."""
    needs.root()
    source = pathlib.Path(program.__file__).read_text()
    number = source[: source.index("threads.start(self._watch")].count("\n") + 1
    found, _left_open = interrupted.interrupt("preflight", interrupted.Line("formats/program.py", number, 1))
    assert found is None


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
