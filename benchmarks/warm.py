# SPDX-License-Identifier: Apache-2.0
"""An image that is in the cache becomes an instance disk."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import statistics
import uuid

from benchmarks import figures, serving
from benchmarks.cold import NOVA, OURS
from benchmarks.figures import Group, Row, Sample
from benchmarks.lab import Lab, command, settle
from imagecache_lib.store import layout
from tests.lab import filesystems

CP_REFLINK = "cp --reflink=always"
CP_SPARSE = "cp --sparse=always"


def measure_overlay(lab: Lab) -> tuple[Group, list[Row]]:
    """qcow2: an overlay on the base."""
    group = Group(
        "warm-qcow2",
        "Warm spawn, qcow2 overlay",
        "In each competitor's own process, from the call to its return; each run is the median of many "
        "spawns into new directories, which are made outside of the timing.",
    )
    image, size = lab.images["zlib"], lab.data.virtual_size
    counts = (20, 3) if lab.scale.quick else (200, 10)
    with lab.ours("warm") as ours, lab.nova("warm-nova") as nova:
        for competitor in (ours, nova):
            competitor.ask("spawn", image_id=image, size=size)
        competitors = {
            OURS: functools.partial(_many, ours, image, counts[0], size),
            NOVA: functools.partial(_many, nova, image, counts[1], size),
        }
        figures.by_turns(group, competitors, lab.scale.repetitions, lab.tell)
    return group, [figures.compare(group, "warm spawn, qcow2 overlay", OURS, NOVA, 1 / 100)]


def measure_reflink(lab: Lab) -> tuple[Group, list[Row]]:
    """raw on xfs: a reflink of the base, large and small."""
    group = Group(
        "warm-reflink",
        "Warm spawn, raw, reflink on xfs",
        "Ours: in its own process, from the call to its return. cp: from start to end of the process. Each "
        "run is the median of 20. xfs on a loop device.",
    )
    home, image = lab.home / "xfs", lab.images["raw"]
    home.mkdir()
    small = lab.glance.upload(_small_file(lab))
    mkfs = ["mkfs.xfs", "-q", "-m", "reflink=1,crc=1"]
    with contextlib.ExitStack() as stack:
        mount_point = stack.enter_context(filesystems.loop_mounted(home, 8 * 2**30, mkfs))
        instances = mount_point / "instances"
        ours = stack.enter_context(lab.ours("reflink", backend="raw", instances=instances))
        for each in (image, small):
            ours.ask("spawn", image_id=each, keep=False)
        base = instances / "_base" / layout.base_name(image)
        competitors = {
            OURS: functools.partial(_many, ours, image, 20),
            CP_REFLINK: functools.partial(_copies, base, mount_point, 20, "--reflink=always"),
            f"{OURS}, 64 MiB image": functools.partial(_many, ours, small, 20),
        }
        figures.by_turns(group, competitors, lab.scale.repetitions, lab.tell)
    return group, [
        figures.compare(group, "warm spawn, raw with reflink (xfs)", OURS, CP_REFLINK, 1.5),
        figures.compare(group, "the same, large image against small", OURS, f"{OURS}, 64 MiB image", None),
    ]


def measure_copy(lab: Lab) -> tuple[Group, list[Row]]:
    """raw without reflink: a sparse copy of the base."""
    group = Group(
        "warm-copy",
        "Warm spawn, raw, no reflink",
        "Ours: in its own process, from the call to its return. cp: from start to end of the process. The "
        "base is in the page cache; neither syncs.",
    )
    image = lab.images["raw"]
    with lab.ours("copy", backend="raw") as ours:
        ours.ask("spawn", image_id=image, keep=False)
        base = lab.home / "copy/instances/_base" / layout.base_name(image)
        competitors = {
            OURS: functools.partial(_many, ours, image, 1),
            CP_SPARSE: functools.partial(_copies, base, lab.home, 1, "--sparse=always"),
        }
        figures.by_turns(group, competitors, lab.scale.repetitions, lab.tell)
    return group, [figures.compare(group, "warm spawn, raw without reflink", OURS, CP_SPARSE, 1.0)]


def _many(competitor: serving.Competitor, image_id: str, count: int, size: int | None = None) -> Sample:
    settle()
    answer = competitor.ask("warm", image_id=image_id, count=count, size=size)
    return {**answer, "seconds": statistics.median(answer["each"])}


def _copies(base: pathlib.Path, directory: pathlib.Path, count: int, how: str) -> Sample:
    settle()
    each = []
    for _ in range(count):
        target = directory / f"copy-{uuid.uuid4()}"
        each.append(command("cp", how, base, target)["seconds"])
        target.unlink()
    return {"each": each, "seconds": statistics.median(each)}


def _small_file(lab: Lab) -> pathlib.Path:
    path = lab.home / "small.raw"
    with lab.data.files["raw"].path.open("rb") as whole:
        path.write_bytes(whole.read(64 * 2**20))
    return path
