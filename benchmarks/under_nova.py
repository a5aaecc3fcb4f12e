# SPDX-License-Identifier: Apache-2.0
"""Nova's own image cache, and this library in its place, asked through the same calls of Nova's."""

from __future__ import annotations

import functools
from collections.abc import Callable

from benchmarks import figures, serving
from benchmarks.cold import NOVA
from benchmarks.figures import Group, Row, Sample
from benchmarks.lab import Lab, settle
from benchmarks.upkeep import Fleet

ADAPTED = "Nova with imagecache_lib"

_CALLED = (
    "Both in Nova's environment, in a process of their own, through Nova's calls: ``Backend.by_name``, "
    "``Image.cache`` and ``ImageCacheManager.update``, from the call to its return. "
)
_BASES = 20


def measure_first(lab: Lab) -> tuple[Group, list[Row]]:
    """The first boot of an image on a host: its root disk."""
    group = Group("nova-first", "Under Nova, first boot: zlib qcow2", _CALLED + "The cache is empty.")
    image, size = lab.images["zlib"], lab.data.virtual_size

    def first(competitor: serving.Competitor) -> Sample:
        competitor.ask("forget")
        settle()
        return competitor.ask("spawn", image_id=image, size=size)

    return _compare(lab, group, "first boot, under Nova", first)


def measure_second(lab: Lab) -> tuple[Group, list[Row]]:
    """The next boots of an image: its root disk."""
    group = Group(
        "nova-second", "Under Nova, second boot", _CALLED + "The image is cached; each run is a mean of ten."
    )
    image, size = lab.images["zlib"], lab.data.virtual_size

    def next_boots(competitor: serving.Competitor) -> Sample:
        competitor.ask("spawn", image_id=image, size=size)
        settle()
        each = competitor.ask("warm", image_id=image, count=10, size=size)["each"]
        return {"seconds": sum(each) / len(each), "each": each}

    return _compare(lab, group, "second boot, under Nova", next_boots)


def measure_pass(lab: Lab) -> tuple[Group, list[Row]]:
    """The periodic pass over many instances, none of whose bases may go."""
    count = lab.scale.directories // 10
    group = Group(
        "nova-pass",
        f"Under Nova, periodic pass: {count:,} instances, {_BASES} bases",
        _CALLED + "What the database says of block devices is empty for both.",
    )
    fleets: dict[str, Fleet] = {}

    def whole_pass(competitor: serving.Competitor, name: str) -> Sample:
        if name not in fleets:
            fleets[name] = Fleet(lab.home / name / "instances", _BASES)
            fleets[name].grow(count)
        fleet = fleets[name]
        return competitor.ask("verify", image_ids=fleet.images, directories=fleet.directories)

    names = {NOVA: "pass-nova", ADAPTED: "pass-adapted"}
    with lab.nova(names[NOVA]) as nova, lab.adapted(names[ADAPTED]) as adapted:
        competitors = {
            name: functools.partial(whole_pass, competitor, names[name])
            for name, competitor in ((NOVA, nova), (ADAPTED, adapted))
        }
        figures.by_turns(group, competitors, lab.scale.repetitions, lab.tell)
    return group, [figures.compare(group, "periodic pass, under Nova", ADAPTED, NOVA, None)]


def _compare(
    lab: Lab, group: Group, work: str, run: Callable[[serving.Competitor], Sample]
) -> tuple[Group, list[Row]]:
    with lab.nova(f"{group.key}-nova") as nova, lab.adapted(f"{group.key}-adapted") as adapted:
        competitors = {NOVA: functools.partial(run, nova), ADAPTED: functools.partial(run, adapted)}
        figures.by_turns(group, competitors, lab.scale.repetitions, lab.tell)
    return group, [figures.compare(group, work, ADAPTED, NOVA, None)]
