# SPDX-License-Identifier: Apache-2.0
"""A process that may start no more threads, as where its limit of tasks is used up."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

#: More than the kernel has addresses for: pthread_create(3) ends with EAGAIN.
_TOO_LARGE = 2**50


@contextlib.contextmanager
def no_more_threads() -> Iterator[None]:
    """Let no thread be started during the body, by any thread of this process."""
    before = threading.stack_size(_TOO_LARGE)
    try:
        yield
    finally:
        threading.stack_size(before)
