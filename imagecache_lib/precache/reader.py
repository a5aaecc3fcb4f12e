# SPDX-License-Identifier: Apache-2.0
"""Reads the embedded job database with the standard library alone, and never writes to it.

``status`` and ``list`` have to answer at once, and where they may not write: on a filesystem that is full or
read-only, for a user who does not own the file, while a conductor is at work on it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from imagecache_lib.precache import job, job_file, job_rows
from imagecache_lib.precache.job_rows import JobDatabaseError

#: Seconds to wait for a conductor that holds the file: one that uses a rollback journal does now and then.
_BUSY = 10.0

#: What stands in for the tables of version 2 while a database of version 1 is read. Only views of this
#: connection.
_VERSION_1 = """
CREATE TEMP VIEW job_hosts AS
    SELECT job, host_position AS position, MIN(host) AS name
    FROM main.cells GROUP BY job, host_position;
CREATE TEMP VIEW job_images AS
    SELECT job, image_position AS position, MIN(image) AS image_id
    FROM main.cells GROUP BY job, image_position;
CREATE TEMP VIEW cells AS
    SELECT job, host_position AS host, image_position AS image, result, reason, received, total
    FROM main.cells;
"""


class EmbeddedJobs:
    """Reads jobs from an sqlite file. Safe to share between threads.

    :param path: path of the file. A file that does not exist holds no jobs.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self, job_id: str) -> job.Job:
        if not os.path.exists(self._path):
            raise job_rows.unknown_job(job_id)
        try:
            with self._reading() as query:
                return job_rows.read_job(query, job_id)
        except job_file.Unmade:
            raise job_rows.unknown_job(job_id) from None

    def summaries(self) -> list[job.JobSummary]:
        if not os.path.exists(self._path):
            return []
        try:
            with self._reading() as query:
                return job_rows.read_summaries(query)
        except job_file.Unmade:
            return []

    @contextlib.contextmanager
    def _reading(self) -> Iterator[job_rows.Query]:
        try:
            with contextlib.closing(self._connect()) as connection:
                self._adapt(connection)
                # One transaction: what belongs together is read as it was at one moment.
                connection.execute("BEGIN")

                def query(statement: str, parameters: Mapping[str, Any] | None = None) -> list[Sequence[Any]]:
                    return connection.execute(statement, parameters or {}).fetchall()

                yield query
        except sqlite3.Error as error:
            raise JobDatabaseError(
                f"the job database cannot be read: {error}",
                path=self._path,
                next_step="check the file and its disk",
            ) from error

    def _connect(self) -> sqlite3.Connection:
        """Open the file for reading, and return the connection.

        A database in WAL mode needs two more files, which may be neither there nor possible to make. Without
        a log that holds something, the file itself is all there is, and is read as what it then is:
        immutable.
        """
        job_file.require_file(self._path)
        try:
            return self._opened("mode=ro")
        except sqlite3.OperationalError:
            with contextlib.suppress(OSError):
                if os.stat(f"{self._path}-wal").st_size:
                    raise
            return self._opened("immutable=1")

    def _opened(self, how: str) -> sqlite3.Connection:
        path = quote(os.path.abspath(os.fsencode(self._path)))
        connection = sqlite3.connect(f"file:{path}?{how}", uri=True, timeout=_BUSY, isolation_level=None)
        try:
            connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _adapt(self, connection: sqlite3.Connection) -> None:
        version = job_file.version_of(connection, self._path)
        connection.execute("PRAGMA temp_store = MEMORY")
        if version == 1:
            connection.executescript(_VERSION_1)
