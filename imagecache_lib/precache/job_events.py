# SPDX-License-Identifier: Apache-2.0
"""What happens to a job, told to observers without letting any of them hold it up."""

from __future__ import annotations

import dataclasses
import logging
import queue
from collections.abc import Callable, Sequence

from imagecache_lib.precache import job
from imagecache_lib.system import threads

LOG = logging.getLogger(__name__)

#: Seconds that observers may take at the end of a run to hear what happened.
_LAST_WORDS = 10.0


@dataclasses.dataclass(frozen=True)
class JobEvent:
    """What happens to a job.

    :param kind: ``start``, ``progress`` (a host is done, well or not) or ``end``.
    :param job: the job with its progress so far.
    :param host: the host that is done, for ``progress``, else None.
    :param index: how many hosts are done, those of earlier runs included.
    """

    kind: str
    job: job.Job
    host: str | None = None
    index: int = 0


JobObserver = Callable[[JobEvent], None]


class Teller:
    """Calls observers in a thread of its own: a message bus that takes no messages would hold a run up.

    :param observers: called one after the other; what they raise is logged. Without any there is no thread.
    :raises BackendError: the thread cannot be started.
    """

    def __init__(self, observers: Sequence[JobObserver]) -> None:
        self._observers = tuple(observers)
        self._events: queue.SimpleQueue[JobEvent | None] = queue.SimpleQueue()
        self._thread = threads.start(self._run, name="imagecache-events") if self._observers else None

    def tell(self, event: JobEvent) -> None:
        """Queue an event: the observers are called with it after all earlier events."""
        if self._observers:
            self._events.put(event)

    def close(self) -> None:
        """Wait a limited time for the observers to be called with every event."""
        if self._thread is None:
            return
        self._events.put(None)
        self._thread.join(_LAST_WORDS)
        if self._thread.is_alive():
            LOG.warning("Not all that happened could be told: an observer takes too long")

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            for observer in self._observers:
                try:
                    observer(event)
                except Exception:
                    LOG.exception("An observer failed on %s of job %s", event.kind, event.job.id)
