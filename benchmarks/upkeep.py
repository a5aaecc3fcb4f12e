# SPDX-License-Identifier: Apache-2.0
"""The periodic pass over many instance directories, of which none may lose its base."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys
import uuid
from collections.abc import Callable

from benchmarks import figures, serving
from benchmarks.cold import NOVA, OURS
from benchmarks.figures import Group, Row, Sample
from benchmarks.lab import Lab, settle
from imagecache_lib.formats.qcow2 import overlay
from imagecache_lib.store import layout

_Run = Callable[[], Sample]

#: What the pass cannot do without.
BARE = "bare loop"

_SIZE = 20 * 2**30
_LARGER = 5
_NOVA_INSTANCES = 50

#: What lies beside a disk, and how much of it.
_OTHER_FILES = {"console.log": 4096, "libvirt.xml": 6000, "disk.config": 16384}


class Fleet:
    """Instance directories with one overlay and four other files each, and the bases of the overlays."""

    def __init__(self, instances: pathlib.Path, bases: int) -> None:
        self.instances = instances
        self._images = [str(uuid.uuid4()) for _ in range(bases)]
        self.directories: list[str] = []
        self.images: list[str] = []
        (instances / "_base").mkdir(parents=True)
        for image in self._images:
            (instances / "_base" / layout.base_name(image)).write_bytes(b"\1" * 4096)

    def grow(self, count: int) -> None:
        """Have so many directories."""
        while len(self.directories) < count:
            image, name = self._images[len(self.directories) % len(self._images)], str(uuid.uuid4())
            directory = self.instances / name
            directory.mkdir()
            disk = directory / "disk"
            fd = os.open(disk, os.O_RDWR | os.O_CREAT, 0o644)
            overlay.write_overlay(fd, _SIZE, str(self.instances / "_base" / layout.base_name(image)), "raw")
            os.close(fd)
            (directory / "disk.info").write_text(json.dumps({str(disk): "qcow2"}))
            for other, size in _OTHER_FILES.items():
                (directory / other).write_bytes(b"x" * size)
            self.directories.append(name)
            self.images.append(image)
        settle()


def measure(lab: Lab) -> tuple[Group, list[Row]]:
    """Measure the pass, per instance."""
    few, many, bases = lab.scale.directories, lab.scale.directories * _LARGER, lab.scale.bases
    nova_count = min(_NOVA_INSTANCES, bases)
    group = Group(
        "verify",
        f"Verify pass, per instance: {few:,} directories, {bases:,} bases",
        "In each competitor's own process, from the call to its return, divided by the number of instances. "
        "A directory holds one overlay and four other files. "
        "The bare loop lists each directory, and opens, stats and reads 4 KiB of each file. "
        f"Nova's pass is over {nova_count} such directories. The first pass of each, which warms the "
        "dentries, is not counted; every base is in use, and nothing is evicted.",
    )
    larger, larger_bare = f"{OURS}, {many:,} directories", f"{BARE}, {many:,} directories"
    fleet = Fleet(lab.home / "verify/instances", bases)
    nova_fleet = Fleet(lab.home / "verify-nova/instances", nova_count)
    fleet.grow(few)
    nova_fleet.grow(nova_count)
    with (
        lab.ours("verify") as ours,
        lab.nova("verify-nova") as nova,
        serving.Competitor(
            sys.executable, "benchmarks.parts_driver", log=lab.home / "verify-parts.log"
        ) as parts,
    ):
        bare: _Run = functools.partial(_look, parts, fleet)
        _pass(ours, fleet)
        _pass(nova, nova_fleet)
        competitors: dict[str, _Run] = {
            OURS: lambda: _pass(ours, fleet),
            NOVA: lambda: _pass(nova, nova_fleet),
            BARE: bare,
        }
        figures.by_turns(group, competitors, lab.scale.repetitions, lab.tell)
        fleet.grow(many)
        _pass(ours, fleet)
        both: dict[str, _Run] = {larger: lambda: _pass(ours, fleet), larger_bare: bare}
        figures.by_turns(group, both, lab.scale.repetitions, lab.tell)
    return group, [
        figures.compare(group, "verify pass, per instance", OURS, NOVA, 1 / 500),
        figures.compare(group, f"the same, {many:,} directories against {few:,}", larger, OURS, None),
        figures.compare(group, f"verify pass over the bare loop, {few:,} directories", OURS, BARE, 2.5),
        figures.compare(group, f"the same, {many:,} directories", larger, larger_bare, 2.5),
    ]


def _pass(competitor: serving.Competitor, fleet: Fleet) -> Sample:
    answer = competitor.ask("verify", image_ids=fleet.images, directories=fleet.directories)
    return {"seconds": answer["seconds"] / len(fleet.directories), "whole": answer["seconds"]}


def _look(parts: serving.Competitor, fleet: Fleet) -> Sample:
    answer = parts.ask("look", directory=str(fleet.instances), names=fleet.directories)
    return {"seconds": answer["seconds"] / len(fleet.directories), "whole": answer["seconds"]}
