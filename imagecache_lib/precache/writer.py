# SPDX-License-Identifier: Apache-2.0
"""Brings what a run learns to the database: once a second, in a thread of its own, and only what changed.

A database that fails says nothing about any host. What was learned stays in memory and is tried again; a
database that goes on failing ends the run, and the hosts go on by themselves.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
from collections.abc import Callable, Mapping

from imagecache_lib.precache import job
from imagecache_lib.precache.database import Change, JobDatabase
from imagecache_lib.precache.job_rows import JobDatabaseError
from imagecache_lib.precache.progress import JobProgress, Key
from imagecache_lib.system import threads
from imagecache_lib.system.host import System

LOG = logging.getLogger(__name__)

#: Seconds between two writes.
_INTERVAL = 1.0

#: A database that fails for so many seconds ends the run.
PATIENCE = 60.0


class JobWriter:
    """Stores one run's progress. Used by one thread.

    :param runner: name of the run, which has the job's lease.
    :raises BackendError: no thread can be started.
    """

    def __init__(
        self,
        database: JobDatabase,
        progress: JobProgress,
        runner: str,
        *,
        host: System,
    ) -> None:
        self._database = database
        self._progress = progress
        self._runner = runner
        self._host = host
        self._thread = threads.Pool(1, "imagecache-jobs")
        self._write: concurrent.futures.Future[bool] | None = None
        self._writing: Mapping[Key, job.Cell] = {}
        self._last_write = host.monotonic()
        self._failing_since: float | None = None
        positions = [
            {name: row for row, name in enumerate(names)}
            for names in (progress.job.hosts, progress.job.image_ids)
        ]
        self._hosts, self._images = positions
        #: Whether an operator cancelled the job.
        self.cancelled = progress.job.cancelled

    @property
    def is_busy(self) -> bool:
        """Whether a write is under way."""
        return self._write is not None

    def tick(self, done: Callable[[], None]) -> None:
        """Take note of a write that is over, and begin the next one if it is due.

        :param done: called in another thread once that write is over, well or not.

        :raises LeaseLost: another conductor runs the job.
        :raises ConfigError: the database has been failing for too long.
        """
        if self._write is not None:
            if not self._write.done():
                self._require_patience()
                return
            self._settle(self._write)
        if self._host.monotonic() - self._last_write >= _INTERVAL:
            self._begin().add_done_callback(lambda _write: done())

    def close(self) -> None:
        """Write what is left, trying again while the database fails, and stop.

        :raises LeaseLost, ConfigError: as for :meth:`tick`.
        """
        try:
            while True:
                if self._write is not None:
                    concurrent.futures.wait([self._write])
                    self._settle(self._write)
                if self._failing_since is not None:
                    self._host.sleep(_INTERVAL)
                elif not self._progress.has_changes:
                    return
                self._begin()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Stop the thread, without writing what is left."""
        self._thread.close(drop=True)

    def _begin(self) -> concurrent.futures.Future[bool]:
        self._last_write = self._host.monotonic()
        self._writing = self._progress.take_changes()
        changes = [
            Change(self._hosts[host], self._images[image_id], cell)
            for (host, image_id), cell in self._writing.items()
        ]
        self._write = self._thread.submit(
            functools.partial(self._database.keep, self._progress.job.id, self._runner, changes)
        )
        return self._write

    def _settle(self, write: concurrent.futures.Future[bool]) -> None:
        self._write = None
        try:
            self.cancelled = write.result()
        except JobDatabaseError as error:
            self._progress.put_back(self._writing)
            if self._failing_since is None:
                self._failing_since = self._host.monotonic()
                LOG.warning("What the hosts say is kept in memory and tried again: %s", error)
            self._require_patience(error)
        else:
            if self._failing_since is not None:
                LOG.info("The job database works again")
            self._failing_since = None
        finally:
            self._writing = {}

    def _require_patience(self, error: JobDatabaseError | None = None) -> None:
        if self._failing_since is None or self._host.monotonic() - self._failing_since < PATIENCE:
            return
        raise JobDatabaseError(
            f"job {self._progress.job.id} is left, the job database has been failing for {PATIENCE:.0f} s"
            + (f": {error.cause}" if error is not None else ""),
            path=error.path if error is not None else None,
            next_step="mend the database and resume the job: its hosts go on, and know what they did",
        )
