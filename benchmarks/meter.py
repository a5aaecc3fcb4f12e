# SPDX-License-Identifier: Apache-2.0
"""What a piece of work took. Standard library only: Nova's environment loads it too."""

from __future__ import annotations

import os
import time
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")


class Meter:
    """Counts from its making on."""

    def __init__(self) -> None:
        self._machine = _machine_busy()
        self._times = os.times()
        self.began = time.monotonic()

    def read(self) -> dict[str, Any]:
        """Return seconds of wall clock, and of processor time: own, of children, and of the whole machine."""
        ended, times = time.monotonic(), os.times()
        return {
            "seconds": ended - self.began,
            "ended": ended,
            "cpu": times.user + times.system - self._times.user - self._times.system,
            "cpu_children": times.children_user
            + times.children_system
            - self._times.children_user
            - self._times.children_system,
            "cpu_machine": _machine_busy() - self._machine,
        }


def peak_memory() -> int:
    """Return the most bytes that were ever resident in this process.

    VmHWM belongs to the address space that exec(2) made; ru_maxrss would include the parent that forked.
    """
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say VmHWM")


def allocated(path: str) -> int:
    """Return the bytes that a file takes on disk."""
    return os.stat(path).st_blocks * 512


def _machine_busy() -> float:
    with open("/proc/stat") as stat:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, stat.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS
