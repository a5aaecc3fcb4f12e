# SPDX-License-Identifier: Apache-2.0
"""The whole of ``create_disk`` over the floor: what the machine would need at least for the same work."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator

from benchmarks import figures, loopback, serving
from benchmarks.figures import Group, Row, Sample
from benchmarks.lab import Lab, settle

WHOLE = "imagecache-lib, whole"
FLOOR = "floor"
RECEIVE, DIGEST, INFLATE = "receive", "digest", "inflate"
PLACE = "zeros, sums, writes"
WRITE = "write and sync"

_TIMED = (
    "The image comes from a plain web server on loopback, of which the kernel sends the bytes. Whole: as for "
    "a cold spawn. Parts: each alone on one thread, processor time; to receive counts the server's too, "
    "which has the same processors. Write and sync: as many bytes on the same filesystem, clock. The floor "
    "of a turn is the largest of the parts' sum divided by the processors, the digest alone, and write and "
    "sync. All processes of the group are bound to the processors that its title says."
)

#: Largest ratio to the floor: with the optional inflate, and without.
_TARGET, _TARGET_PLAIN = 1.2, 1.25
_MODELLED = (4, 8, 16)


def measure(
    lab: Lab, kind: str, cores: int, *, extras: bool = True, keep: bool = False
) -> tuple[Group, list[Row]]:
    """Measure one kind of image on some processors.

    :param extras: with the packages that inflate faster.
    :param keep: store the image in the format that it has.
    """
    title = "raw" if kind == "raw" else f"{kind} qcow2{'' if extras else ', no extras'}"
    title += ", stored as it is" if keep else ""
    key = f"floor-{kind}{'' if extras else '-plain'}{'-kept' if keep else ''}-{cores}"
    group = Group(key, f"Over the floor, {title}, {cores} processor{'s' if cores > 1 else ''}", _TIMED)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_bound_to(cores))
        competitors = _competitors(lab, kind, _Way(key, extras, keep), stack)
        figures.by_turns(group, competitors, lab.scale.repetitions, lab.tell)
    parts = [name for name in (RECEIVE, DIGEST, INFLATE, PLACE) if name in group.series]
    group.series[FLOOR] = [
        {"seconds": _floor(group, parts, turn, cores)} for turn in range(len(group.series[WHOLE]))
    ]
    if cores > 1:
        group.notes += _model(group, parts)
    target = (_TARGET if extras else _TARGET_PLAIN) if cores > 1 else None
    name = f"whole over the floor, {title}, {cores} processor{'s' if cores > 1 else ''}"
    spent = group.spread(WHOLE, "cpu_all")
    least = sum(group.spread(part, "cpu").median for part in parts)
    return group, [
        figures.compare(group, name, WHOLE, FLOOR, target),
        Row(
            "the same in processor time, over the parts",
            f"{WHOLE}: {figures.show_seconds(spent.median)}",
            f"parts: {figures.show_seconds(least)}",
            spent.median / least,
            None,
            group.key,
            (spent.least / least, spent.most / least),
        ),
    ]


@dataclasses.dataclass(frozen=True)
class _Way:
    """How the image is brought in, and what the group's files are called."""

    key: str
    extras: bool
    keep: bool


def _competitors(
    lab: Lab, kind: str, way: _Way, stack: contextlib.ExitStack
) -> dict[str, Callable[[], Sample]]:
    file, key = lab.data.files[kind], way.key
    stored = file.path if way.keep else lab.data.files["raw"].path
    server = stack.enter_context(loopback.running(file.path.parent))
    url = server.url(file.path.name)
    listed = lab.home / f"{key}.json"
    listed.write_text(
        json.dumps({kind: {"url": url, "disk_format": file.disk_format, "sha512": file.sha512}})
    )
    plain = [] if way.extras else ["--without-extras"]
    kept = ["--keep-format"] if way.keep else []
    instances = lab.home / key / "instances"
    instances.mkdir(parents=True)
    ours = stack.enter_context(
        serving.Competitor(
            sys.executable,
            "benchmarks.cache_driver",
            *("--instances", str(instances), "--images", str(listed), *plain, *kept),
            log=lab.home / f"{key}.log",
        )
    )
    parts = stack.enter_context(
        serving.Competitor(
            sys.executable, "benchmarks.parts_driver", *plain, log=lab.home / f"{key}-parts.log"
        )
    )

    def with_server(run: Callable[[], Sample]) -> Sample:
        before = server.cpu()
        sample = dict(run())
        sample["cpu_all"] = sample["cpu"] + server.cpu() - before
        return sample

    def prepare() -> None:
        settle()
        parts.ask("touch", directory=str(lab.home), size=lab.data.data + 2**28)

    def whole() -> Sample:
        ours.ask("forget")
        prepare()
        return with_server(functools.partial(ours.ask, "spawn", image_id=kind, size=lab.data.virtual_size))

    def receive() -> Sample:
        sample = dict(with_server(functools.partial(parts.ask, "receive", url=url)))
        return {**sample, "cpu": sample["cpu_all"]}

    def write() -> Sample:
        prepare()
        return parts.ask("write", path=str(stored), directory=str(lab.home))

    def place() -> Sample:
        prepare()
        return parts.ask("place", path=str(stored), directory=str(lab.home), holes=way.keep or kind == "raw")

    found: dict[str, Callable[[], Sample]] = {
        WHOLE: whole,
        RECEIVE: receive,
        DIGEST: functools.partial(parts.ask, "digest", path=str(file.path)),
        PLACE: place,
        WRITE: write,
    }
    if kind in ("zlib", "zstd") and not way.keep:
        found[INFLATE] = functools.partial(parts.ask, "inflate", path=str(file.path))
    return found


@contextlib.contextmanager
def _bound_to(cores: int) -> Iterator[None]:
    """Bind this process to some processors in the body, and what it starts there."""
    before = os.sched_getaffinity(0)
    if len(before) < cores:
        raise serving.CompetitorFailed(f"there are {len(before)} processors, and {cores} are asked for")
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _floor(group: Group, parts: list[str], turn: int, cores: int) -> float:
    cpu = {name: float(group.series[name][turn]["cpu"]) for name in parts}
    return max(sum(cpu.values()) / cores, cpu[DIGEST], float(group.series[WRITE][turn]["seconds"]))


def _model(group: Group, parts: list[str]) -> list[str]:
    """Return what the floor would be with more processors, from the medians of the parts."""
    cpu = {name: group.spread(name, "cpu").median for name in parts}
    bounds = {"the digest": cpu[DIGEST], "write and sync": group.spread(WRITE).median}
    said = []
    for cores in _MODELLED:
        each = {"the parts' sum": sum(cpu.values()) / cores, **bounds}
        most = max(each, key=each.__getitem__)
        said.append(f"{figures.show_seconds(each[most])} on {cores} ({most})")
    return [f"A model from these parts, not measured: the floor would be {', '.join(said)}."]
