# SPDX-License-Identifier: Apache-2.0
"""Where jobs are kept: one sqlite database on the conductor, so that a restart forgets nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence

from imagecache_lib import errors
from imagecache_lib.precache.job import Cell, Job, Result, Terms
from imagecache_lib.system import durable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, aggregate TEXT NOT NULL, terms TEXT NOT NULL, cancelled INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL, attempt INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS cells (
    job TEXT NOT NULL REFERENCES jobs(id), host_position INTEGER NOT NULL, image_position INTEGER NOT NULL,
    host TEXT NOT NULL, image TEXT NOT NULL, result TEXT, reason TEXT NOT NULL DEFAULT '',
    received INTEGER NOT NULL DEFAULT 0, total INTEGER,
    PRIMARY KEY (job, host, image)
);
PRAGMA user_version = 1;
"""

#: Seconds to wait for another process that writes.
_BUSY = 30.0


class JobDatabase:
    """Jobs in an sqlite file. Safe to share between threads and processes.

    :param path: of the file; made when missing.
    :raises ConfigError: it cannot be opened, or is of a later release.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with self._connection() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > 1:
                raise errors.ConfigError(
                    f"the job database has version {version}, this release knows 1",
                    path=path,
                    next_step="upgrade imagecache_lib",
                )
            connection.executescript(_SCHEMA)

    def add(
        self, aggregate: str, hosts: Sequence[str], image_ids: Sequence[str], terms: Terms, *, now: float
    ) -> Job:
        """Keep a new job, on which nothing was done yet."""
        job_id = durable.new_id()
        with self._connection() as connection:
            connection.execute(
                "INSERT INTO jobs (id, aggregate, terms, created) VALUES (?, ?, ?, ?)",
                (job_id, aggregate, json.dumps(dataclasses.asdict(terms)), now),
            )
            connection.executemany(
                "INSERT INTO cells (job, host_position, image_position, host, image) VALUES (?, ?, ?, ?, ?)",
                [
                    (job_id, row, column, host, image_id)
                    for row, host in enumerate(hosts)
                    for column, image_id in enumerate(image_ids)
                ],
            )
        return self.get(job_id)

    def get(self, job_id: str) -> Job:
        """Return a job as far as it is.

        :raises ConfigError: there is none of that id.
        """
        with self._connection() as connection:
            found = connection.execute(
                "SELECT id, aggregate, terms, cancelled, created, attempt FROM jobs WHERE id = ?", (job_id,)
            ).fetchone()
            if found is None:
                raise errors.ConfigError(
                    f"there is no job {job_id}", next_step="list the jobs to see their ids"
                )
            rows = connection.execute(
                "SELECT host, image, result, reason, received, total FROM cells WHERE job = ?"
                " ORDER BY host_position, image_position",
                (job_id,),
            ).fetchall()
        cells: dict[str, dict[str, Cell]] = {}
        for host, image, result, reason, received, total in rows:
            over = Result(result) if result is not None else None
            cells.setdefault(host, {})[image] = Cell(over, reason, received, total)
        images = tuple(next(iter(cells.values()), {}))
        return Job(
            id=found[0],
            aggregate=found[1],
            image_ids=images,
            terms=Terms(**json.loads(found[2])),
            cells=cells,
            cancelled=bool(found[3]),
            created=found[4],
            attempt=found[5],
        )

    def all(self) -> list[Job]:
        """Return every job, the oldest first."""
        with self._connection() as connection:
            ids = connection.execute("SELECT id FROM jobs ORDER BY created, id").fetchall()
        return [self.get(job_id) for (job_id,) in ids]

    def pending(self, job_id: str, host: str) -> tuple[str, ...]:
        """Return the images that have no result on a host yet."""
        with self._connection() as connection:
            rows = connection.execute(
                "SELECT image FROM cells WHERE job = ? AND host = ? AND result IS NULL"
                " ORDER BY image_position",
                (job_id, host),
            ).fetchall()
        return tuple(image for (image,) in rows)

    def is_cancelled(self, job_id: str) -> bool:
        """Whether somebody cancelled a job."""
        with self._connection() as connection:
            found = connection.execute("SELECT cancelled FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return found is not None and bool(found[0])

    def record(self, job_id: str, host: str, cells: Mapping[str, Cell]) -> None:
        """Keep how far a host is. A result that is there stays."""
        with self._connection() as connection:
            connection.executemany(
                "UPDATE cells SET result = ?, reason = ?, received = ?, total = ?"
                " WHERE job = ? AND host = ? AND image = ? AND result IS NULL",
                [
                    (
                        cell.result.value if cell.result is not None else None,
                        cell.reason,
                        cell.received,
                        cell.total,
                        job_id,
                        host,
                        image_id,
                    )
                    for image_id, cell in cells.items()
                ],
            )

    def explain(self, job_id: str, host: str, reason: str, result: Result | None = None) -> None:
        """Say of all images without a result why that is so, or how they ended."""
        with self._connection() as connection:
            connection.execute(
                "UPDATE cells SET result = ?, reason = ? WHERE job = ? AND host = ? AND result IS NULL",
                (result.value if result is not None else None, reason, job_id, host),
            )

    def retry(self, job_id: str) -> None:
        """Take failures back, so that they are tried again, and the cancellation with them."""
        with self._connection() as connection:
            connection.execute(
                "UPDATE jobs SET cancelled = 0, attempt = attempt + 1 WHERE id = ?",
                (job_id,),
            )
            connection.execute(
                "UPDATE cells SET result = NULL, reason = '', received = 0"
                " WHERE job = ? AND result IN (?, ?)",
                (job_id, Result.ERROR.value, Result.SKIPPED.value),
            )

    def cancel(self, job_id: str) -> None:
        """Mark a job as cancelled, for whichever process runs it."""
        with self._connection() as connection:
            connection.execute("UPDATE jobs SET cancelled = 1 WHERE id = ?", (job_id,))

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction: they are cheap, and may not be shared between threads."""
        try:
            connection = sqlite3.connect(self._path, timeout=_BUSY)
            try:
                with connection:
                    yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise errors.ConfigError(
                f"the job database failed: {error}", path=self._path, next_step="check the file and its disk"
            ) from error
