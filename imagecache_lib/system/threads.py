# SPDX-License-Identifier: Apache-2.0
"""Starting threads, which a service's limit of tasks may not allow, and locks between them."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from imagecache_lib import errors

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

_T = TypeVar("_T")

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def lock() -> AbstractContextManager[bool]:
    """Return a lock between threads, which its holder may take again.

    A forked child has none of its parent's threads but the one that forked. What another one held is free
    there: nobody would give it back. So what a lock protects must be right at every moment, or made anew by
    whoever takes the lock next.
    """
    made = threading.RLock()
    _locks.add(made)
    return made


def _free_in_child() -> None:
    for each in list(_locks):
        if each.acquire(blocking=False):  # it is free, or this thread's own
            each.release()
        else:
            # As the standard library does with its own: a lock of Python's own making could be taken by an
            # interrupted thread that never enters the body of its ``with``.
            each._at_fork_reinit()


os.register_at_fork(after_in_child=_free_in_child)


def start(thread: threading.Thread) -> None:
    """Start a thread.

    :raises BackendError: the kernel allows no more: pthread_create(3) reports EAGAIN for a limit of tasks
        (RLIMIT_NPROC, ``TasksMax`` of systemd.resource-control(5)) and for a lack of memory.
    """
    with _starting():
        thread.start()


def submit(pool: Executor, function: Callable[..., _T], *arguments: object) -> Future[_T]:
    """Have a pool that has one thread at most call a function, and return what it will return.

    :raises BackendError: as :func:`start`.
    """
    with _starting():
        return pool.submit(function, *arguments)


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise errors.BackendError(
            f"no thread can be started: {error}",
            next_step="raise the service's limit of tasks, or find out what uses it up; another host may do"
            " it",
        ) from error
