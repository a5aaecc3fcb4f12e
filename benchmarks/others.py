# SPDX-License-Identifier: Apache-2.0
"""The other ways in which a base image comes to be there: made on this host, or left by another program."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable

from benchmarks import figures, serving
from benchmarks.cold import OURS
from benchmarks.figures import Group, Row, Sample
from benchmarks.lab import Lab, command, settle
from imagecache_lib.store import layout

_SWAP_MB, _EPHEMERAL_GB = 512, 10
_ADOPTED, _ADOPTED_BYTES = 100, 4 * 2**20
MKSWAP, MKFS, READ = "truncate and mkswap", "mke2fs", "read and digest"


def measure_generated(lab: Lab, kind: str) -> tuple[Group, list[Row]]:
    """Measure a swap area or an ephemeral disk whose base is not there."""
    group = Group(
        kind,
        f"Cold {kind} disk",
        "Ours: in its own process, from the call to its return, with the base made, synced and published, "
        "and an overlay on it. The program alone: from start to end of the process, on a new file, without a "
        "sync.",
    )
    with lab.ours(kind) as ours:
        alone = functools.partial(_alone, lab.home / f"{kind}.alone", kind)
        name = MKSWAP if kind == "swap" else MKFS
        competitors: dict[str, Callable[[], Sample]] = {
            OURS: functools.partial(_generated, ours, kind),
            name: alone,
        }
        figures.by_turns(group, competitors, lab.scale.repetitions, lab.tell)
    return group, [figures.compare(group, f"cold {kind} disk", OURS, name, None)]


def _generated(ours: serving.Competitor, kind: str) -> Sample:
    ours.ask("forget")
    settle()
    return ours.ask(kind, size=_SWAP_MB if kind == "swap" else _EPHEMERAL_GB)


def _alone(path: pathlib.Path, kind: str) -> Sample:
    settle()
    try:
        if kind == "swap":
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            os.truncate(path, _SWAP_MB * 2**20)
            return command("mkswap", path)
        return command("mke2fs", "-q", "-F", "-t", "ext4", path, f"{_EPHEMERAL_GB}G")
    finally:
        path.unlink(missing_ok=True)


def measure_adoption(lab: Lab) -> tuple[Group, list[Row]]:
    """Measure the first use of base images that another program left, and the first pass over them."""
    size = _ADOPTED_BYTES
    group = Group(
        "adoption",
        f"A directory with {_ADOPTED} base images of {figures.show_bytes(size)} that another program made",
        "In its own process, from the first call to the last return: each base is checked by size and "
        "digest, leased, and let go. Read and digest: SHA-512 of the same files on one thread.",
    )
    left = lab.home / "left"
    left.mkdir()
    images = []
    for number in range(_ADOPTED):
        path = left / layout.base_name(f"image-{number}")
        path.write_bytes(os.urandom(size))
        images.append({"id": f"image-{number}", "path": str(path)})
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(lab.ours("adoption"))
        parts = stack.enter_context(
            serving.Competitor(sys.executable, "benchmarks.parts_driver", log=lab.home / "adoption-parts.log")
        )
        base = lab.home / "adoption/instances/_base"

        def adopt() -> Sample:
            ours.ask("forget")
            shutil.copytree(left, base)
            settle()
            return ours.ask("adopt", images=images)

        def read() -> Sample:
            each = [parts.ask("digest", path=image["path"])["cpu"] for image in images]
            return {"seconds": sum(each), "cpu": sum(each)}

        figures.by_turns(group, {OURS: adopt, READ: read}, lab.scale.repetitions, lab.tell)
        first = Group(
            "first-pass",
            f"The first pass after start, {_ADOPTED} base images without records",
            "In its own process, from the call to its return, by a manager that was just made.",
        )
        figures.by_turns(first, {OURS: functools.partial(_first_pass, ours)}, lab.scale.repetitions, lab.tell)
    took = figures.show_seconds(first.spread(OURS).median)
    group.notes.append(f"The first pass after start over that directory takes {took}.")
    return group, [figures.compare(group, f"adopting {_ADOPTED} base images", OURS, READ, None)]


def _first_pass(ours: serving.Competitor) -> Sample:
    return ours.ask("verify", image_ids=[], directories=[], fresh=True)
