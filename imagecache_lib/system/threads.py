# SPDX-License-Identifier: Apache-2.0
"""Starting threads, which a service's limit of tasks may not allow, and locks between them."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

from imagecache_lib import errors

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


def start(target: Callable[..., object], *args: Any, name: str, daemon: bool = True) -> threading.Thread:
    """Start a thread. It begins only if this returns: whoever is interrupted here has nothing to end.

    There is a new one for each try: since Python 3.13 one that could not be started cannot be started later.

    :param target: what the thread calls, with the arguments ``args``.
    :param name: of the thread.
    :param daemon: whether the process does not wait for it when it ends.
    :raises BackendError: the kernel allows no more: pthread_create(3) reports EAGAIN for a limit of tasks
        (RLIMIT_NPROC, ``TasksMax`` of systemd.resource-control(5)) and for a lack of memory.
    """
    may_begin: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def begin() -> None:
        if may_begin.get():
            target(*args)

    thread = threading.Thread(target=begin, name=name, daemon=daemon)
    try:
        # It waits until the thread runs, so that a signal's handler is most likely to raise here.
        thread.start()
        may_begin.put(True)
    except RuntimeError as error:
        raise errors.BackendError(
            f"no thread can be started: {error}",
            next_step="raise the service's limit of tasks, or find out what uses it up; another host may do"
            " it",
        ) from error
    except BaseException:
        may_begin.put(False)
        raise
    return thread


def join(thread: threading.Thread) -> None:
    """Wait until a thread that was told to end has ended, if it can end meanwhile.

    As the interpreter ends, every daemon thread stays where it is, while what was never closed is closed: a
    lease that the process still held. Since Python 3.13 a wait for such a thread has no end. A thread cannot
    wait for itself either, and the garbage collector, which runs in any thread, may let it close what it
    works for.
    """
    if not sys.is_finalizing() and thread is not threading.current_thread():
        thread.join()


class Pool:
    """Threads that call functions: as many as are wanted, or else as many as there can be, and at least one.

    The first is started at once, so that what has begun does not fail for want of it; the others when there
    is something for them to do. The process does not wait for them when it ends. At the end of a ``with``
    statement all calls are waited for.

    :param most: number of threads that are wanted.
    :param name: of each.
    :raises BackendError: not even one can be started.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=True)

    def submit(self, function: Callable[[], _T]) -> Future[_T]:
        """Have a function called, and return what it will return or raise."""
        future: Future[_T] = Future()
        with self._lock:
            self._unfinished += 1
            if len(self._threads) < min(self._unfinished, self._most):
                with contextlib.suppress(errors.BackendError):  # those that are there do it, one by one
                    self._start()
        self._calls.put((future, function))
        return future

    def close(self, *, drop: bool = False, wait: bool = False) -> None:
        """Let the threads end once everything is called.

        :param drop: whether to cancel what no thread has begun.
        :param wait: whether to wait for them.
        """
        if drop:
            with contextlib.suppress(queue.Empty):
                while (call := self._calls.get_nowait()) is not None:
                    call[0].cancel()
        for _thread in self._threads:
            self._calls.put(None)
        for thread in self._threads if wait else ():
            join(thread)

    def _start(self) -> None:
        self._threads.append(start(self._work, name=self._name))

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            if future.set_running_or_notify_cancel():
                try:
                    result = function()
                except BaseException as error:
                    self._is_free()
                    future.set_exception(error)
                else:
                    self._is_free()
                    future.set_result(result)
                    del result
            del call, future, function  # nothing is kept alive while this thread waits

    def _is_free(self) -> None:
        # Before the result is there: whoever waits for it finds this thread free.
        with self._lock:
            self._unfinished -= 1
