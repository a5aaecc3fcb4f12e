# SPDX-License-Identifier: Apache-2.0
"""What importing the library costs a driver."""

from __future__ import annotations

import functools
import subprocess
import sys

from benchmarks import figures
from benchmarks.figures import Group, Row, Sample
from benchmarks.lab import Lab

_RUNS = 20
_IMPORT = "import imagecache_lib"
_IN_USE = "import imagecache_lib, manager and Glance source used"
_OSLO = "import oslo_concurrency.processutils"

_STATEMENTS = {
    _IMPORT: "import imagecache_lib",
    _IN_USE: "import imagecache_lib; imagecache_lib.ImageCacheManager; imagecache_lib.GlanceSource",
    _OSLO: "import oslo_concurrency.processutils",
}
_PROGRAM = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"


def measure(lab: Lab) -> tuple[Group, list[Row]]:
    group = Group(
        "imports",
        "Imports",
        "In a fresh interpreter for each run, around the statement alone; the start of the interpreter is "
        "not counted. Names of the package are loaded when they are first used, hence the second line.",
    )
    competitors = {name: functools.partial(_run, statement) for name, statement in _STATEMENTS.items()}
    figures.by_turns(group, competitors, 5 if lab.scale.quick else _RUNS, lambda _line: None)
    return group, [
        figures.compare(group, "importing the package", _IMPORT, _OSLO, 1.2),
        figures.compare(group, "importing it and what a spawn needs", _IN_USE, _OSLO, None),
    ]


def _run(statement: str) -> Sample:
    out = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(statement)], check=True, capture_output=True, text=True
    ).stdout
    return {"seconds": float(out)}
