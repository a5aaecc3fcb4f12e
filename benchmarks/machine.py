# SPDX-License-Identifier: Apache-2.0
"""On what, and with what, was measured."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable

#: Load average, for each processor, above which the machine counts as busy.
_BUSY = 0.25
_LOOK_EVERY = 5.0

_LIBRARIES = (
    "imagecache-lib",
    "deflate",
    "zstandard",
    "requests",
    "urllib3",
    "oslo.concurrency",
    "oslo.utils",
)


def becomes_idle(seconds: float, tell: Callable[[str], None]) -> bool:
    """Wait until nothing else keeps the machine busy. Returns False if it was busy all the time.

    :param seconds: to wait at most.
    """
    most, ends = _BUSY * (os.cpu_count() or 1), time.monotonic() + seconds
    while (load := os.getloadavg()[0]) > most:
        if time.monotonic() >= ends:
            return False
        tell(f"waiting for an idle machine: load average {load:.2f}, wanted {most:.2f}")
        time.sleep(_LOOK_EVERY)
    return True


def describe(
    home: pathlib.Path, nova_python: pathlib.Path, glance_requirements: pathlib.Path
) -> dict[str, str]:
    """Return facts about the machine and the versions, by name.

    :param home: where was measured.
    """
    versions = []
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    glance = [line for line in glance_requirements.read_text().splitlines() if "==" in line]
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} in use",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "filesystem": _filesystem(home),
        "load average before": f"{os.getloadavg()[0]:.2f}",
        "Python": platform.python_version(),
        "libraries": ", ".join(versions),
        "Nova": _said(
            nova_python,
            "-c",
            "import importlib.metadata as m, platform;"
            "print(m.version('nova'), 'on Python', platform.python_version())",
        ),
        "Glance": ", ".join(line.replace("==", " ") for line in glance),
        "qemu-img": _said("qemu-img", "--version").removeprefix("qemu-img version "),
        "cp": _said("cp", "--version"),
    }


def _said(*command: str | pathlib.Path) -> str:
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return out.splitlines()[0].strip()


def _processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _filesystem(path: pathlib.Path) -> str:
    """Return type and options of the filesystem that holds a path."""
    best, found = "", "unknown"
    for line in pathlib.Path("/proc/mounts").read_text().splitlines():
        _device, where, kind, options = line.split()[:4]
        if path.is_relative_to(where) and len(where) >= len(best):
            best, found = where, f"{kind} ({options})"
    return found
