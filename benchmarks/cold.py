# SPDX-License-Identifier: Apache-2.0
"""An image that is not in the cache becomes an instance disk."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

from benchmarks import figures, serving
from benchmarks.figures import Group, Row, Sample
from benchmarks.lab import Lab, command, settle

OURS = "imagecache-lib"
OURS_PLAIN = "imagecache-lib, no extras"
NOVA = "Nova 34"
QEMU = "qemu-img convert -t none"
FLOOR = "download + digest"

_TIMED = (
    "In each competitor's own process, after its imports, from the call that asks for the disk to its "
    "return: metadata, download from Glance over loopback, digest, inspection, conversion to raw, "
    "publishing, overlay. Ours returns after fsync of the base; Nova does not sync. qemu-img: from start to "
    "end of the process, the local file in the page cache, the output opened with O_DIRECT. Download: to "
    "nowhere, SHA-512 on a second thread. Dirty pages are written back before each run, and Glance's file is "
    "in the page cache for all."
)

#: Largest ratio to Nova's cold spawn.
_AGAINST_NOVA = {"zlib": 0.29, "zstd": 1 / 2.2, "uncompressed": 1 / 2.2, "raw": 1 / 2.2}


def measure(lab: Lab, kind: str) -> tuple[Group, list[Row]]:
    """Measure cold spawns of one kind of image."""
    file, size = lab.data.files[kind], lab.data.virtual_size
    title = {"raw": "raw"}.get(kind, f"{kind} qcow2")
    group = Group(
        f"cold-{kind}",
        f"Cold spawn, {title}: {figures.show_bytes(file.size)}, {figures.show_bytes(lab.data.data)} of data",
        _TIMED,
    )
    with contextlib.ExitStack() as stack:
        competitors: dict[str, Callable[[], Sample]] = {}

        def add(name: str, competitor: serving.Competitor) -> None:
            stack.enter_context(competitor)
            competitors[name] = functools.partial(_cold, competitor, lab.images[kind], size)

        add(OURS, lab.ours(f"ours-{kind}"))
        if kind in ("zlib", "zstd"):
            add(OURS_PLAIN, lab.ours(f"plain-{kind}", extras=False))
        add(NOVA, lab.nova(f"nova-{kind}"))
        if kind != "raw":
            competitors[QEMU] = functools.partial(_convert, lab, kind)
        floor = stack.enter_context(lab.floor())
        competitors[FLOOR] = functools.partial(
            floor.ask, "download", image_id=lab.images[kind], digest=file.sha512
        )
        figures.by_turns(group, competitors, lab.scale.repetitions, lab.tell)
    return group, _rows(group, lab, kind, title)


def _rows(group: Group, lab: Lab, kind: str, title: str) -> list[Row]:
    rows = [figures.compare(group, f"cold spawn, {title}", OURS, NOVA, _AGAINST_NOVA[kind])]
    if kind == "zlib":
        rows.append(figures.compare(group, "the same against converting alone", OURS, QEMU, 0.8))
        rows.append(figures.compare(group, f"cold spawn, {title}, without extras", OURS_PLAIN, NOVA, None))
        peak = group.spread(OURS, "peak_over_import").most
        rows.append(
            Row(
                "peak memory over imports, that spawn",
                figures.show_bytes(peak),
                "absolute, MiB",
                peak / 2**20,
                48,
                group.key,
                unit="MiB",
            )
        )
    if kind == "raw":
        rows.append(figures.compare(group, "the same against the download with digest", OURS, FLOOR, 1.2))
        ours, data = group.spread(OURS, "allocated").most, lab.data.data
        theirs = group.spread(NOVA, "allocated").most
        rows.append(
            Row(
                f"allocated by that base (Nova: {figures.show_bytes(theirs)})",
                figures.show_bytes(ours),
                f"data: {figures.show_bytes(data)}",
                ours / data,
                1.05,
                group.key,
            )
        )
    return rows


def _cold(competitor: serving.Competitor, image_id: str, size: int) -> Sample:
    competitor.ask("forget")
    settle()
    return competitor.ask("spawn", image_id=image_id, size=size)


def _convert(lab: Lab, kind: str) -> Sample:
    file, target = lab.data.files[kind], lab.home / "converted.raw"
    target.unlink(missing_ok=True)
    settle()
    sample = command(
        "qemu-img", "convert", "-t", "none", "-f", file.disk_format, "-O", "raw", file.path, target
    )
    target.unlink()
    return sample


def measure_maps(lab: Lab) -> tuple[Group, list[Row]]:
    """Measure the memory that the maps of a huge image take, in a process for each run."""
    clusters = lab.scale.map_clusters
    group = Group(
        "maps",
        f"Maps of {clusters * 65536 // 2**30} GiB allocated at 64 KiB clusters",
        "VmHWM of a new process after the decoder took all tables and before any data came, less VmHWM after "
        "imports. Seconds: taking the tables.",
    )

    def run() -> Sample:
        with lab.ours("maps") as competitor:
            return competitor.ask("maps", clusters=clusters, threads=2)

    figures.by_turns(group, {OURS: run}, lab.scale.repetitions, lab.tell)
    peak = group.spread(OURS, "peak_over_import").most
    work = f"peak memory, maps of {clusters * 65536 // 2**30} GiB"
    return group, [
        Row(work, figures.show_bytes(peak), "absolute, MiB", peak / 2**20, 96, group.key, unit="MiB")
    ]
