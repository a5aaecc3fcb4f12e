# SPDX-License-Identifier: Apache-2.0
"""The sqlite file that a job database writes: its engine, and that it and its log stay what they were.

In WAL mode SQLite keeps two files beside the database as long as a connection is open: the log ``-wal``, and
its index ``-shm`` (sqlite.org/walformat.html). It never looks at their names again. Where they are removed,
for example by a clean-up, it goes on with the files that have no name any more: another process does not see
what is committed from then on, and what one of the two wrote gets lost. So their names are looked at before
and after each transaction that writes, and before each that reads.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import sqlite3
import threading
from collections.abc import Iterator

from imagecache_lib.precache import engines, job_file
from imagecache_lib.precache.job_rows import JobDatabaseError
from imagecache_lib.precache.retries import AnswerLost
from imagecache_lib.system.maker import leave_to_parent

LOG = logging.getLogger(__name__)

_LOG = "-wal"
_INDEX = "-shm"

#: Seconds, beside those for other processes, to wait for other threads.
_TURN = 10.0


class _Loss(enum.Enum):
    """What befell a file beside the database."""

    REMOVED = "removed"
    REPLACED = "replaced"


class EmbeddedFile:
    """An sqlite file in use. Safe to share between threads.

    :param path: absolute path of the file, which is made when it is missing.
    :param busy: seconds to wait for another process that holds it.
    :ivar engine: makes connections to it.
    """

    def __init__(self, path: str, busy: float) -> None:
        job_file.require_file(path)
        self._path = path
        self._busy = busy
        self._same = job_file.SameFile(path)
        self.engine = engines.embedded(path, busy)
        # One transaction of this process at a time: none may be under way while another log is taken.
        self._alone = threading.Lock()
        #: A connection that uses the same log as those of the engine, for as long as they do.
        self._held: sqlite3.Connection | None = None
        #: Device and inode of the files beside the database that connections use, by suffix.
        self._seen: dict[str, tuple[int, int]] = {}

    def close(self) -> None:
        """Close all connections. The last one of a file merges its log into it."""
        with self._turn():
            self.engine.dispose()
            self._let_go()
            self._same.forget()

    def begin_anew(self) -> None:
        """Use no connection and no lock of the process of which this one is a forked child."""
        engines.begin_anew(self.engine)
        leave_to_parent(self._held)
        self._held, self._seen = None, {}
        self._alone = threading.Lock()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Have what the body commits be in the files that other processes see.

        :raises AnswerLost: what was committed is in a log that has no name any more, and cannot be had now.
        :raises JobDatabaseError: the file is gone, or was replaced; or another thread does not end.
        :raises sqlite3.Error, OSError: the log cannot be replaced.
        """
        with self.reading():
            yield
            try:
                self._mend()
            except JobDatabaseError as error:
                raise AnswerLost(error.cause, path=error.path, next_step=error.next_step) from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Have the body read the files that other processes see.

        :raises JobDatabaseError, sqlite3.Error, OSError: as for :meth:`writing`.
        """
        with self._turn(), self._same.required():
            self._mend()
            yield
            self._hold()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        # Not for ever: a transaction of another thread may hang with the disk.
        alone = self._alone  # a forked child in the body has another one
        if not alone.acquire(timeout=self._busy + _TURN):
            raise JobDatabaseError(
                "another thread of this process does not come to the end of its transaction",
                path=self._path,
                next_step="check the database's disk",
            )
        try:
            yield
        finally:
            alone.release()

    # -- the log -------------------------------------------------------------------------------------

    def _hold(self) -> None:
        """Remember the log that the engine's connections use, and keep a connection of our own to it."""
        if self._held is None:
            self._held = engines.connected(self._path, self._busy)
        for suffix in (_LOG, _INDEX):
            # With a rollback journal there is none.
            if suffix not in self._seen and os.path.exists(self._path + suffix):
                self._held.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()  # which opens them
                self._seen[suffix] = _identity(self._path + suffix)

    def _let_go(self) -> None:
        self._seen = {}
        if self._held is not None:
            self._held.close()
            self._held = None

    def _lost(self) -> dict[str, _Loss]:
        """Return what befell the files beside the database, by suffix."""
        found: dict[str, _Loss] = {}
        for suffix, seen in tuple(self._seen.items()):
            try:
                if _identity(self._path + suffix) != seen:
                    found[suffix] = _Loss.REPLACED
            except FileNotFoundError:
                found[suffix] = _Loss.REMOVED
        # One that another process has only made holds nothing that could be lost.
        if found.get(_LOG) is _Loss.REPLACED and not os.stat(self._path + _LOG).st_size:
            found[_LOG] = _Loss.REMOVED
        return found

    def _mend(self) -> None:
        """Open the database anew if files beside it are not what they were."""
        lost = self._lost()
        if not lost:
            return
        if lost.get(_INDEX) is _Loss.REPLACED:
            # In one process all connections to a file share the index, so that the new one cannot be had.
            raise JobDatabaseError(
                "a file beside the job database was replaced by another process",
                path=self._path + _INDEX,
                next_step="end all programs that use the database, and start them again",
            )
        if lost.get(_LOG) is _Loss.REPLACED:
            self._take_the_new_log()
        else:
            self._keep_the_old_log()
        for suffix, loss in lost.items():
            LOG.warning(
                "%s was %s while the job database was in use: the database is opened anew",
                self._path + suffix,
                loss.value,
            )

    def _keep_the_old_log(self) -> None:
        """Bring what the log without a name holds into the database, and begin another log."""
        assert self._held is not None
        (busy, *_pages) = self._held.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise JobDatabaseError(
                "the job database's log was removed, and a process still reads what it holds",
                path=self._path,
                next_step="try again",
            )
        self.engine.dispose()
        self._let_go()

    def _take_the_new_log(self) -> None:
        """Go on with the log that another process has made.

        That process could write only once all that the old log holds was in the database. The old connections
        are closed after the new one is opened, for the last one would write its own idea of the log there.
        """
        pool, held = self.engine.pool, self._held
        fresh = engines.connected(self._path, self._busy)
        (found,) = fresh.execute("PRAGMA quick_check(1)").fetchone()
        self.engine.dispose(close=False)
        self._seen, self._held = {}, fresh
        self._hold()
        pool.dispose()
        if held is not None:
            held.close()
        if found != "ok":
            raise JobDatabaseError(
                f"the job database is damaged: {found}",
                path=self._path,
                next_step="put a copy of it back, or choose another --jobs",
            )


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
