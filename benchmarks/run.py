# SPDX-License-Identifier: Apache-2.0
"""Measure everything side by side in one run and write the results down: ``make bench``.

Needs root (loop mounts, a network namespace) and some 30 GiB of disk, all of it freed at the end. Its
directory is made below the user's cache directory, which should lie on the disk that is of interest.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks import (
    cold,
    commands,
    crowd,
    floors,
    imports,
    lab,
    link,
    machine,
    others,
    report,
    serving,
    under_nova,
    upkeep,
    warm,
)
from benchmarks.figures import Group, Row
from tests.lab import environment
from tests.support import needs

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_DOCUMENTED = _ROOT / "doc/source/reference/benchmarks"
_QUICK = _ROOT / "build/benchmarks"

#: Seconds that the run waits for the machine to become idle. It then runs all the same, and says so.
_IDLE_WITHIN = 600

#: Nothing begins later than so many seconds after the machine was idle, so that a run ends within 35 minutes.
_LATEST_START = 30 * 60

_Scenario = Callable[[lab.Lab], tuple[Group, list[Row]]]

_SCENARIOS: dict[str, _Scenario] = {
    "cold-zlib": functools.partial(cold.measure, kind="zlib"),
    "cold-zstd": functools.partial(cold.measure, kind="zstd"),
    "cold-uncompressed": functools.partial(cold.measure, kind="uncompressed"),
    "cold-raw": functools.partial(cold.measure, kind="raw"),
    "floor-zlib-2": functools.partial(floors.measure, kind="zlib", cores=2),
    "floor-zlib-plain-2": functools.partial(floors.measure, kind="zlib", cores=2, extras=False),
    "floor-zstd-2": functools.partial(floors.measure, kind="zstd", cores=2),
    "floor-uncompressed-2": functools.partial(floors.measure, kind="uncompressed", cores=2),
    "floor-raw-2": functools.partial(floors.measure, kind="raw", cores=2),
    "floor-zlib-1": functools.partial(floors.measure, kind="zlib", cores=1),
    "floor-uncompressed-1": functools.partial(floors.measure, kind="uncompressed", cores=1),
    "floor-zlib-kept-2": functools.partial(floors.measure, kind="zlib", cores=2, keep=True),
    "link": link.measure,
    "maps": cold.measure_maps,
    "warm-qcow2": warm.measure_overlay,
    "warm-reflink": warm.measure_reflink,
    "warm-copy": warm.measure_copy,
    "crowd": crowd.measure,
    "verify": upkeep.measure,
    "nova-first": under_nova.measure_first,
    "nova-second": under_nova.measure_second,
    "nova-pass": under_nova.measure_pass,
    "swap": functools.partial(others.measure_generated, kind="swap"),
    "ephemeral": functools.partial(others.measure_generated, kind="ephemeral"),
    "adoption": others.measure_adoption,
    "imports": imports.measure,
    "command": commands.measure,
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--quick", action="store_true", help="little data, few runs: does it work?")
    parser.add_argument("--only", nargs="+", choices=list(_SCENARIOS), default=list(_SCENARIOS))
    parser.add_argument("--output", type=pathlib.Path, help="directory of the results")
    options = parser.parse_args(arguments)
    needs.root()
    scale = lab.Scale.small() if options.quick else lab.Scale.full()
    results = _measure(scale, options.only)
    output = options.output or (_QUICK if options.quick else _DOCUMENTED)
    report.write(results, output)
    print(report.targets(results.rows))
    print(f"{results.seconds:.0f} s; everything: {output}/results.md")
    return 1 if results.failures else 0


def _measure(scale: lab.Scale, names: Sequence[str]) -> report.Results:
    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f}  {line}", flush=True)

    groups: list[Group] = []
    rows: list[Row] = []
    failures: dict[str, str] = {}
    cache = environment.cache_directory()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=cache) as home:
        path = pathlib.Path(home)
        # Before anything runs here: the load average is one of the facts.
        busy = not machine.becomes_idle(0 if scale.quick else _IDLE_WITHIN, tell)
        ready = time.monotonic()
        facts = machine.describe(path, lab.nova_environment(), _ROOT / "tests/lab/glance-requirements.txt")
        with lab.running(path, scale, tell) as running:
            for name in names:
                if time.monotonic() - ready > _LATEST_START:
                    failures[name] = "no time was left"
                    continue
                try:
                    group, found = _SCENARIOS[name](running)
                except (serving.CompetitorFailed, subprocess.SubprocessError) as error:
                    # The others are worth having all the same.
                    tell(f"{name}: {error}")
                    failures[name] = str(error).strip().splitlines()[-1]
                    continue
                groups.append(group)
                rows += found
    return report.Results(facts, groups, rows, scale.quick, busy, time.monotonic() - began, failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
