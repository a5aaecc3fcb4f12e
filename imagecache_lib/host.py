# SPDX-License-Identifier: Apache-2.0
"""What the library takes from the machine it runs on, gathered so that it can be injected."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable


def _no_trace(_point: str) -> None:
    """Do nothing at a trace point."""


@dataclasses.dataclass(frozen=True)
class Host:
    """Clock, sleep, name and trace points of the host.

    :param name: the host's name as the driver reports it in :class:`~imagecache_lib.Instance`.
    :param clock: epoch seconds. Ages are measured against the filesystem's clock instead.
    :param sleep: takes seconds.
    :param trace: called with the name of a point in the protocols as execution reaches it. Tests stop
        there to make an interleaving happen; in production it does nothing.
    :param locking: False makes every file lock a no-op. Only for tests of the third promise: locks save
        work, they do not carry safety.
    """

    name: str = dataclasses.field(default_factory=socket.gethostname)
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    trace: Callable[[str], None] = _no_trace
    locking: bool = True
