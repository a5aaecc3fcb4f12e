# SPDX-License-Identifier: Apache-2.0
"""Calls that may never return, such as a look at a path on a mount that does not answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sized
from typing import TypeVar

from imagecache_lib.system import threads

T = TypeVar("T")

#: How long a call may take, in seconds.
LIMIT = 3.0


class Bounded:
    """Makes calls that are given up after a while. Safe to share between threads.

    Each is made in a thread of its own. While one that was given up has not come back, no other is begun, so
    that they do not gather.

    :ivar limit: seconds that a call may take without getting on.
    """

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit = limit
        self._lock = threads.lock()
        self._given_up: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def is_stuck(self) -> bool:
        """Whether a call that was given up has not come back."""
        return self._given_up is not None and self._given_up.is_alive()

    def call(self, function: Callable[[], T], *, progress: Sized = ()) -> list[T]:
        """Return what a function returns, as a list of one.

        Returns an empty list if it raised, or did not return within the limit.

        :param progress: grows as the function gets on, which then has that much time again.
        :raises BackendError: no thread can be started.
        """
        if self._process != os.getpid():
            self._given_up, self._process = None, os.getpid()
        with self._lock:
            if self.is_stuck:
                return []
            answers: list[T] = []
            thread = threads.start(lambda: answers.append(function()), name="imagecache-bounded")
            seen = -1
            while thread.is_alive() and seen < len(progress):
                seen = len(progress)
                thread.join(self.limit)
            self._given_up = thread if thread.is_alive() else None
            return answers
