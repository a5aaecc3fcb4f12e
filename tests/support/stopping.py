# SPDX-License-Identifier: Apache-2.0
"""Processes that are stopped, and are known to be: a signal to another process, or to another thread of
one's own, has been sent when :func:`os.kill` returns, and takes effect a while later."""

from __future__ import annotations

import os
import pathlib
import signal


def stop(pid: int) -> None:
    """Stop another process, and return once none of its threads runs any more.

    :raises ProcessLookupError: it has ended.
    """
    os.kill(pid, signal.SIGSTOP)
    while not _is_stopped(pid):
        os.sched_yield()


def _is_stopped(pid: int) -> bool:
    # The state follows the name, which is in parentheses and may hold any character: proc_pid_stat(5).
    threads = list(pathlib.Path(f"/proc/{pid}/task").glob("*/stat"))
    states = {thread.read_text().rpartition(")")[2].split()[0] for thread in threads}
    if not states - {"Z", "X"}:
        raise ProcessLookupError(f"process {pid} has ended")
    return states <= {"T", "t", "Z", "X"}
