# SPDX-License-Identifier: Apache-2.0
"""What the library takes from the machine it runs on, gathered so that it can be injected."""

from __future__ import annotations

import dataclasses
import random
import socket
import time
from collections.abc import Callable
from typing import Any

from imagecache_lib.system.trace import TracePoint


def _no_trace(_point: TracePoint) -> None:
    """Do nothing at a trace point."""


def _execute(*command: str, **options: Any) -> tuple[str, str]:
    """Run a command with oslo.concurrency, which is imported when the first one is run."""
    from oslo_concurrency import processutils

    out, err = processutils.execute(*command, **options)
    return str(out), str(err)


def _boot_id() -> str:
    """Return the kernel's random id of its current run, from /proc/sys/kernel/random/boot_id (random(4))."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


# Looked up when they are called and not when this module is imported: a program may patch them in between, as
# eventlet does, and a sleep of before would hold up all of its threads.


def _clock() -> float:
    return time.time()


def _monotonic() -> float:
    return time.monotonic()


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _random() -> float:
    return random.random()  # noqa: S311  it spreads load, and guards nothing


@dataclasses.dataclass(frozen=True)
class System:
    """Clocks, sleep, chance, name, subprocess runner and trace points of the host.

    :param name: the host's name as the driver reports it in :class:`~imagecache_lib.Instance`.
    :param boot_id: random id of the kernel's current run; empty if it cannot be told.
    :param clock: epoch seconds, for deadlines. Ages are measured against the filesystem's clock instead.
    :param monotonic: seconds since any moment, for durations: no operator or program can set this clock.
    :param sleep: takes seconds.
    :param random: uniform in [0, 1), so that hosts that failed together do not come back together.
    :param execute: runs a command: :func:`oslo_concurrency.processutils.execute` or what behaves like it.
    :param trace: called with a :class:`~imagecache_lib.system.trace.TracePoint` as execution reaches it.
        Tests stop there to make an interleaving happen; in production it does nothing.
    :param locking: whether file locks lock. False is only for tests of the third promise: locks save work,
        they do not carry safety.
    :param stale_names: whether the kernel may answer for a name from what it knew, though another host has
        changed it; or None if the type of the filesystem tells.
    """

    name: str = dataclasses.field(default_factory=socket.gethostname)
    boot_id: str = dataclasses.field(default_factory=_boot_id)
    clock: Callable[[], float] = _clock
    monotonic: Callable[[], float] = _monotonic
    sleep: Callable[[float], None] = _sleep
    random: Callable[[], float] = _random
    execute: Callable[..., tuple[str, str]] = _execute
    trace: Callable[[TracePoint], None] = _no_trace
    locking: bool = True
    stale_names: bool | None = None


#: The name that drivers written before release 0.1 use. It goes with the release after.
Host = System
