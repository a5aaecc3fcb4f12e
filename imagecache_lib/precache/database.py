# SPDX-License-Identifier: Apache-2.0
"""Where jobs are kept, so that a restart forgets nothing: an sqlite file, or a server by its URL.

The file is for conductors on one machine. Where several machines run conductors, they share a server, and the
lease in a job's row says which of them runs it (:mod:`imagecache_lib.precache.lease`).

An sqlite file is kept in WAL mode, in which readers and the writer do not wait for each other. On network
filesystems, where WAL must not be used, it has a rollback journal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from imagecache_lib import errors
from imagecache_lib.precache import job, job_file, job_rows, jobs_url, lease
from imagecache_lib.precache.job_rows import JobDatabaseError
from imagecache_lib.system import durable

try:
    import sqlalchemy as sa

    from imagecache_lib.precache import engines, schema
    from imagecache_lib.precache.engines import Contended, translated
except ImportError as _error:
    raise errors.ConfigError(
        f"a job database is written with SQLAlchemy, which is not installed ({_error.name})",
        next_step="install imagecache-lib[jobs]",
    ) from _error

#: Seconds to wait for another process that writes. A caller that needs longer tries again.
_BUSY = 5.0

#: The revisions that this release knows how to come from.
_KNOWN = (None, schema.REVISION)

#: Names the lock under which one conductor at a time changes a server's tables.
_LOCK = 0x696D6167

#: What surrounds each try of a transaction that must not fail because another one was first.
_TRIES: tuple[contextlib.AbstractContextManager[Any], ...] = (
    *(contextlib.suppress(Contended) for _try in range(4)),
    contextlib.nullcontext(),
)


@dataclasses.dataclass(frozen=True)
class Change:
    """A cell that is to be kept.

    :param host: the position of the cell's host in the job.
    :param image: the position of its image in the job.
    """

    host: int
    image: int
    cell: job.Cell


class JobDatabase:
    """Jobs in a database. Safe to share between threads and processes.

    :param where: path of an sqlite file, made when missing, or a URL that SQLAlchemy understands.
    :param busy: seconds to wait for another process that holds the file.
    :param change_schema: whether to make tables that are missing or of an earlier version. False lets a user
        who may only read look at jobs.
    :raises ConfigError: the database cannot be opened, or is of a later release.
    """

    def __init__(self, where: str, *, busy: float = _BUSY, change_schema: bool = True) -> None:
        self._embedded = not jobs_url.is_url(where)
        self._file: job_file.SameFile | None = None
        if self._embedded:
            # One that a later "cd" of this process does not move.
            self._where = os.path.abspath(where)
            job_file.require_file(self._where)
            self._file = job_file.SameFile(self._where)
            self._engine = engines.embedded(self._where, busy)
        else:
            self._where = engines.shown(where)
            self._engine = engines.server(where)
        self._require_schema(change=change_schema)

    def close(self) -> None:
        """Close all connections. The last one of an sqlite file merges its log into it."""
        self._engine.dispose()
        if self._file is not None:
            self._file.forget()

    # -- jobs ----------------------------------------------------------------------------------------

    def add(
        self,
        aggregate: str,
        hosts: Sequence[str],
        image_ids: Sequence[str],
        terms: job.Terms,
        *,
        now: float,
    ) -> job.Job:
        """Store a new job, on which nothing was done yet, and return it."""
        job_id = durable.new_id()
        row = {
            "id": job_id,
            "aggregate": job.storable(aggregate),
            "terms": terms.to_json(),
            "cancelled": 0,
            "created": now,
            "attempt": 0,
            "beat": 0,
        }
        named = [{"job": job_id, "position": at, "name": name} for at, name in enumerate(hosts)]
        images = [{"job": job_id, "position": at, "image_id": each} for at, each in enumerate(image_ids)]
        for again in _TRIES:
            # The tables may be made at another node of a cluster at this moment.
            with again, self._writing() as connection:
                connection.execute(schema.JOBS.insert(), row)
                connection.execute(schema.JOB_HOSTS.insert(), named)
                connection.execute(schema.JOB_IMAGES.insert(), images)
                connection.execute(
                    sa.text(
                        "INSERT INTO cells (job, host, image, reason, received)"
                        " SELECT h.job, h.position, i.position, '', 0 FROM job_hosts h, job_images i"
                        " WHERE h.job = :job AND i.job = :job"
                    ),
                    {"job": job_id},
                )
                break
        return self.get(job_id)

    def get(self, job_id: str) -> job.Job:
        """Return a job with its progress so far.

        :raises ConfigError: no job has that id.
        """
        with self._reading() as query:
            return job_rows.read_job(query, job_id)

    def summaries(self) -> list[job.JobSummary]:
        """Return a summary of every job, the oldest first."""
        with self._reading() as query:
            return job_rows.read_summaries(query)

    def is_over(self, job_id: str) -> bool:
        """Return whether every image on every host of a job has a result."""
        with self._reading() as query:
            statement = "SELECT COUNT(*) FROM cells WHERE job = :job AND result IS NULL"
            ((count,),) = query(statement, {"job": job_id})
        return bool(count == 0)

    def is_cancelled(self, job_id: str) -> bool:
        """Return whether an operator cancelled a job."""
        with self._reading() as query:
            found = list(query("SELECT cancelled FROM jobs WHERE id = :job", {"job": job_id}))
        return bool(found and found[0][0])

    def cancel(self, job_id: str) -> None:
        """Mark a job as cancelled, for whichever process runs it.

        :raises ConfigError: no job has that id.
        """
        for again in _TRIES:
            with again, self._writing() as connection:
                marked = connection.execute(
                    sa.update(schema.JOBS).where(schema.JOBS.c.id == job_id).values(cancelled=1)
                )
                if not marked.rowcount:
                    raise job_rows.unknown_job(job_id)
                break

    def prune(self, before: float) -> int:
        """Delete the jobs that are over and were made before a moment in epoch seconds.

        Returns how many it deleted.
        """
        ids: list[dict[str, Any]] = []
        jobs = schema.JOBS.c
        for again in _TRIES:
            with again, self._writing() as connection:
                found = connection.execute(
                    sa.text(
                        "SELECT id FROM jobs WHERE created < :before AND runner IS NULL AND NOT EXISTS"
                        " (SELECT 1 FROM cells WHERE cells.job = jobs.id AND cells.result IS NULL)"
                    ),
                    {"before": before},
                )
                ids = [{"old": job_id} for (job_id,) in found]
                if ids:
                    for table in (schema.CELLS, schema.JOB_IMAGES, schema.JOB_HOSTS):
                        connection.execute(table.delete().where(table.c.job == sa.bindparam("old")), ids)
                    connection.execute(schema.JOBS.delete().where(jobs.id == sa.bindparam("old")), ids)
                break
        return len(ids)

    # -- the lease -----------------------------------------------------------------------------------

    def lease_of(self, job_id: str) -> lease.Lease:
        """Return the lease of a job, which says which conductor runs it.

        :raises ConfigError: no job has that id.
        """
        with self._reading() as query:
            found = list(query("SELECT runner, beat FROM jobs WHERE id = :job", {"job": job_id}))
        if not found:
            raise job_rows.unknown_job(job_id)
        return lease.Lease(*found[0])

    def take_lease(self, job_id: str, runner: str, seen: lease.Lease) -> bool:
        """Put a runner in the place of another one, if the lease is still what was seen.

        Returns whether the new runner has the lease now.
        """
        jobs = schema.JOBS.c
        # Of two nodes of a cluster that take it at the same moment, one is refused at its commit.
        with contextlib.suppress(Contended):
            with self._writing() as connection:
                taken = connection.execute(
                    sa.update(schema.JOBS)
                    .where(
                        jobs.id == job_id,
                        jobs.beat == seen.beat,
                        jobs.runner.is_not_distinct_from(seen.runner),
                    )
                    .values(runner=runner, beat=seen.beat + 1)
                ).rowcount
            return bool(taken)
        return False

    def release_lease(self, job_id: str, runner: str) -> None:
        """Give up the lease, so that another conductor can run the job at once."""
        jobs = schema.JOBS.c
        for again in _TRIES:
            with again, self._writing() as connection:
                connection.execute(
                    sa.update(schema.JOBS)
                    .where(jobs.id == job_id, jobs.runner == runner)
                    .values(runner=None, beat=jobs.beat + 1)
                )
                break

    def keep(self, job_id: str, runner: str, changes: Iterable[Change]) -> bool:
        """Store what a runner learned, and that the runner lives. A result that is there stays.

        Returns whether an operator cancelled the job.

        :raises lease.LeaseLost: another conductor runs the job; nothing is stored.
        """
        values = [_parameters(job_id, change) for change in changes]
        with self._writing() as connection:
            self._require_lease(connection, job_id, runner)
            if values:
                connection.execute(_KEEP, values)
            found = connection.execute(
                sa.select(schema.JOBS.c.cancelled).where(schema.JOBS.c.id == job_id)
            ).scalar()
        return bool(found)

    def retry(self, job_id: str, runner: str) -> None:
        """Clear the results that a resume tries again, and the mark of a cancelled job.

        :raises lease.LeaseLost: another conductor runs the job.
        """
        jobs, cells = schema.JOBS.c, schema.CELLS.c
        for again in _TRIES:
            with again, self._writing() as connection:
                self._require_lease(connection, job_id, runner)
                connection.execute(
                    sa.update(schema.JOBS)
                    .where(jobs.id == job_id)
                    .values(cancelled=0, attempt=jobs.attempt + 1)
                )
                connection.execute(
                    sa.update(schema.CELLS)
                    .where(cells.job == job_id, cells.result.in_([each.value for each in job.RETRIED]))
                    .values(result=None, reason="", received=0)
                )
                break

    def _require_lease(self, connection: sa.Connection, job_id: str, runner: str) -> None:
        jobs = schema.JOBS.c
        kept = connection.execute(
            sa.update(schema.JOBS).where(jobs.id == job_id, jobs.runner == runner).values(beat=jobs.beat + 1)
        )
        if not kept.rowcount:
            raise lease.LeaseLost(job_id)
        self._require_known(self._revision(connection))

    # -- the schema ----------------------------------------------------------------------------------

    def _require_schema(self, *, change: bool) -> None:
        """Bring the tables to this release's version, if they are of an earlier one."""
        revision = self._revision_now()
        self._require_known(revision)
        if revision == schema.REVISION:
            return
        if not change:
            raise JobDatabaseError(
                "the job database has no tables of this release's version",
                path=self._where,
                next_step="start a job, which makes them",
            )
        try:
            self._make_tables()
        except JobDatabaseError:
            # A lock at one node of a cluster holds up nobody at another, who may have been first.
            if self._revision_now() != schema.REVISION:
                raise

    def _make_tables(self) -> None:
        from imagecache_lib.precache import migrate

        with self._writing() as connection, migrate.alone(connection, _LOCK):
            # Another process may have done it meanwhile.
            if self._revision(connection) != schema.REVISION:
                migrate.upgrade(connection, schema.REVISION)
                if self._embedded:
                    connection.exec_driver_sql(f"PRAGMA user_version = {schema.VERSION}")

    def _revision_now(self) -> str | None:
        with translated(self._where), self._engine.execution_options(reading=True).begin() as connection:
            return self._revision(connection)

    def _revision(self, connection: sa.Connection) -> str | None:
        """Return the revision of the tables. Returns None if there are none, or those of version 1."""
        if self._embedded:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar()
            if version == schema.VERSION:
                return schema.REVISION
            return None if version in (0, 1) else str(version)
        tables = sa.inspect(connection)
        if not tables.has_table("alembic_version"):
            return None
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if found not in _KNOWN and not tables.has_table("cells"):
            raise JobDatabaseError(
                "the database has the tables of another program",
                path=self._where,
                next_step="give the jobs a database of their own",
            )
        return None if found is None else str(found)

    def _require_known(self, revision: str | None) -> None:
        if revision not in _KNOWN:
            raise job_file.too_new(self._where, revision)

    # -- transactions --------------------------------------------------------------------------------

    def _same_file(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._file is None else self._file.required()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self._same_file(), translated(self._where), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[job_rows.Query]:
        reading = self._engine.execution_options(reading=True)
        with self._same_file(), translated(self._where), reading.begin() as connection:

            def query(statement: str, parameters: Mapping[str, Any] | None = None) -> Iterable[Sequence[Any]]:
                return connection.execute(sa.text(statement), dict(parameters or {}))

            yield query


_KEEP = (
    sa.update(schema.CELLS)
    .where(
        schema.CELLS.c.job == sa.bindparam("of_job"),
        schema.CELLS.c.host == sa.bindparam("of_host"),
        schema.CELLS.c.image == sa.bindparam("of_image"),
        schema.CELLS.c.result.is_(None),
    )
    .values(
        result=sa.bindparam("new_result"),
        reason=sa.bindparam("new_reason"),
        received=sa.bindparam("new_received"),
        total=sa.bindparam("new_total"),
    )
)


def _parameters(job_id: str, change: Change) -> dict[str, Any]:
    cell = change.cell
    return {
        "of_job": job_id,
        "of_host": change.host,
        "of_image": change.image,
        "new_result": None if cell.result is None else cell.result.value,
        "new_reason": cell.reason,
        "new_received": cell.received,
        "new_total": cell.total,
    }
