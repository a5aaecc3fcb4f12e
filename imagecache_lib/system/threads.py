# SPDX-License-Identifier: Apache-2.0
"""Starting threads, which a service's limit of tasks may not allow."""

from __future__ import annotations

import threading

from imagecache_lib import errors


def start(thread: threading.Thread) -> None:
    """Start a thread.

    :raises BackendError: the kernel allows no more: pthread_create(3) reports EAGAIN for a limit of tasks
        (RLIMIT_NPROC, ``TasksMax`` of systemd.resource-control(5)) and for a lack of memory.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise errors.BackendError(
            f"no thread can be started: {error}",
            next_step="raise the service's limit of tasks, or find out what uses it up; another host may do"
            " it",
        ) from error
