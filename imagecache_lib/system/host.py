# SPDX-License-Identifier: Apache-2.0
"""What the library takes from the machine it runs on, gathered so that it can be injected."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class System:
    """Clock, sleep, name, subprocess runner and trace points of the host.

    :param name: the host's name as the driver reports it in :class:`~imagecache_lib.Instance`.
    :param clock: epoch seconds. Ages are measured against the filesystem's clock instead.
    :param sleep: takes seconds.
    :param execute: runs a command: :func:`oslo_concurrency.processutils.execute` or what behaves like it.
    :param trace: called with a :class:`~imagecache_lib.system.trace.TracePoint` as execution reaches it.
        Tests stop there to make an interleaving happen; in production it does nothing.
    :param locking: False makes every file lock a no-op. Only for tests of the third promise: locks save
        work, they do not carry safety.
    """

    name: str = dataclasses.field(default_factory=socket.gethostname)
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    execute: Callable[..., tuple[str, str]] = _execute
    trace: Callable[[TracePoint], None] = _no_trace
    locking: bool = True


#: The name that drivers written before release 0.1 use. It goes with the release after.
Host = System
