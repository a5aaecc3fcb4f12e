# SPDX-License-Identifier: Apache-2.0
"""Every interleaving of what shares a cache at its trace points, with locks and with none."""

from __future__ import annotations

import itertools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.campaigns.schedules import World
from tests.support import campaign


@pytest.fixture
def directory() -> Iterator[pathlib.Path]:
    # In memory, where a sync takes no time: it is the order that is tested.
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="imagecache-", dir=where) as path:
        yield pathlib.Path(path)


# A campaign walks all schedules of two actors, and two preemptions of the others: 126,000.
THREE = campaign.pick(sample=3, whole=None)
ONE = campaign.pick(sample=1, whole=2)
NONE = campaign.pick(sample=0, whole=2)


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("names", "cached", "locking", "preemptions"),
    [
        (["spawn-1", "evict"], True, True, THREE),
        (["spawn-1", "evict"], False, True, THREE),
        (["spawn-1", "cache"], False, True, THREE),
        (["spawn-1", "evict"], True, False, THREE),
        (["spawn-1", "evict"], False, False, THREE),
        (["spawn-1", "cache"], False, False, THREE),
        (["spawn-1", "spawn-2", "evict"], True, True, ONE),
        (["spawn-1", "spawn-2", "evict"], True, False, ONE),
        (["spawn-1", "cache", "evict"], False, True, ONE),
        (["spawn-1", "cache", "evict"], False, False, ONE),
        (["spawn-1", "spawn-2", "evict", "cache"], False, True, NONE),
        (["spawn-1", "spawn-2", "evict", "cache"], False, False, NONE),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_no_schedule_loses_or_changes_a_base_in_use(
    directory: pathlib.Path,
    names: list[str],
    cached: bool,
    locking: bool,
    preemptions: int | None,
    record_property: Callable[[str, Any], None],
) -> None:
    _walk(directory, names, locking, preemptions, record_property, cached=cached)


#: Who raced only in random schedules before, and those with whom each is walked.
LATER = ("room", "scrub", "start", "rename")
ALL = ("spawn", "evict", "cache", *LATER)


def _pairs() -> list[list[str]]:
    """Return each of the later actors with each other actor, and with another of its kind."""
    found = [sorted({one, other}) for one in LATER for other in ALL if one != other]
    unique = [list(each) for each in dict.fromkeys(tuple(pair) for pair in found)]
    return [*unique, *([f"{kind}-1", f"{kind}-2"] for kind in LATER if kind != "rename")]


def _threes() -> list[list[str]]:
    """Return all sets of three in which one of the later actors is, and each of those with two spawns."""
    found = [list(each) for each in itertools.combinations(ALL, 3) if set(each) & set(LATER)]
    return [*found, *(["spawn-1", "spawn-2", kind] for kind in LATER)]


PAIRS = campaign.pick(sample=[["spawn", kind] for kind in LATER] + [["evict", "rename"]], whole=_pairs())
THREES = campaign.pick(sample=[["spawn", "evict", "start"], ["spawn", "evict", "rename"]], whole=_threes())


@pytest.mark.campaign
@pytest.mark.parametrize("locking", campaign.pick(sample=[False], whole=[True, False]))
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_no_schedule_of_a_later_actor_and_another_does(
    directory: pathlib.Path, names: list[str], locking: bool, record_property: Callable[[str, Any], None]
) -> None:
    _walk(directory, names, locking, campaign.pick(sample=2, whole=None), record_property)


@pytest.mark.campaign
@pytest.mark.parametrize("locking", campaign.pick(sample=[False], whole=[True, False]))
@pytest.mark.parametrize("names", THREES, ids="+".join)
def test_no_schedule_of_a_later_actor_and_two_others_does(
    directory: pathlib.Path, names: list[str], locking: bool, record_property: Callable[[str, Any], None]
) -> None:
    _walk(directory, names, locking, campaign.pick(sample=1, whole=2), record_property)


def _walk(
    directory: pathlib.Path,
    names: list[str],
    locking: bool,
    preemptions: int | None,
    record_property: Callable[[str, Any], None],
    *,
    cached: bool = True,
) -> None:
    world = World(directory, names, locking=locking)
    world.walk(cached=cached, preemptions=preemptions, most=500_000)
    told = f"{'+'.join(names)}: {world.schedules} schedules, {'with' if locking else 'no'} locks"
    print(f"{told}, {world.diverged} of them not as meant")  # noqa: T201
    record_property("schedules", world.schedules)
