# SPDX-License-Identifier: Apache-2.0
"""Sixteen processes want one image that is not in the cache, at the same moment."""

from __future__ import annotations

import contextlib
import time

from benchmarks import figures
from benchmarks.figures import Group, Row, Sample
from benchmarks.lab import Lab, settle

_MANY = 16
ONE = "1 process"
CROWD = f"{_MANY} processes"


def measure(lab: Lab) -> tuple[Group, list[Row]]:
    group = Group(
        "crowd",
        f"{_MANY} processes, one cold image (zlib qcow2)",
        "From the moment at which all processes, their imports done, are told to begin to the return of the "
        "last, each with a disk of its own. One process is measured the same way.",
    )
    with contextlib.ExitStack() as stack:
        shared = lab.home / "crowd/instances"
        crowd = [
            stack.enter_context(lab.ours(f"crowd-{number}", instances=shared)) for number in range(_MANY)
        ]

        def run(count: int) -> Sample:
            for member in crowd:
                member.ask("forget")
            settle()
            before = len(lab.glance.downloads(lab.images["zlib"]))
            began = time.monotonic()
            for member in crowd[:count]:
                member.begin("spawn", image_id=lab.images["zlib"], size=lab.data.virtual_size)
            answers = [member.answer() for member in crowd[:count]]
            return {
                "seconds": max(answer["ended"] for answer in answers) - began,
                "downloads": len(lab.glance.downloads(lab.images["zlib"])) - before,
                "cpu": sum(answer["cpu"] for answer in answers),
                "first": min(answer["ended"] for answer in answers) - began,
            }

        competitors = {ONE: lambda: run(1), CROWD: lambda: run(_MANY)}
        figures.by_turns(group, competitors, lab.scale.repetitions, lab.tell)
    downloads = max(sample["downloads"] for sample in group.series[CROWD])
    return group, [
        figures.compare(group, f"{_MANY} processes, one cold image", CROWD, ONE, 1.1),
        Row("downloads of that image", str(downloads), "1", downloads, 1, group.key),
    ]
