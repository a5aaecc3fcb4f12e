# SPDX-License-Identifier: Apache-2.0
"""What the command costs before it does anything: the processor time of the shortest of all."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys

from benchmarks import figures, meter
from benchmarks.figures import Group, Row, Sample
from benchmarks.lab import Lab

_RUNS = 20
_LIST = "imagecache image list"
_NOTHING = "an interpreter that does nothing"


def measure(lab: Lab) -> tuple[Group, list[Row]]:
    """Measure the processor time of listing an empty cache."""
    group = Group(
        "command",
        "Start of the command",
        "Processor time, user and system, from the start of the process to its end; there is no base image. "
        "As in an installation, the modules are compiled to bytecode already.",
    )
    instances = lab.home / "command"
    instances.mkdir()
    program = pathlib.Path(sys.executable).with_name("imagecache")
    arguments = [str(program), "--instances-path", str(instances), "image", "list", "--format", "value"]
    bytecode = lab.home / "bytecode"
    competitors = {
        _LIST: functools.partial(_run, arguments, bytecode),
        _NOTHING: functools.partial(_run, [sys.executable, "-c", "pass"], bytecode),
    }
    _run(arguments, bytecode)
    figures.by_turns(group, competitors, 5 if lab.scale.quick else _RUNS, lambda _line: None)
    spent = group.spread(_LIST)
    return group, [
        Row(
            f"{_LIST}, processor time",
            figures.show_seconds(spent.median),
            "absolute, s",
            spent.median,
            0.25,
            group.key,
            (spent.least, spent.most),
            unit="s",
        )
    ]


def _run(arguments: list[str], bytecode: pathlib.Path) -> Sample:
    """Run a program.

    :param bytecode: directory of compiled modules, whatever this process was told of writing them.
    """
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(bytecode)}
    measured = meter.Meter()
    subprocess.run(arguments, check=True, capture_output=True, env=environment)
    return {"seconds": measured.read()["cpu_children"]}
