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
import re
from collections.abc import Iterable, Sequence
from typing import Any

from imagecache_lib import errors
from imagecache_lib.precache import job, job_rows, lease
from imagecache_lib.precache.retries import Contended, Duplicate, Tries
from imagecache_lib.system import durable
from imagecache_lib.system.host import System

try:
    import sqlalchemy as sa

    from imagecache_lib.precache import schema
    from imagecache_lib.precache.transactions import Transactions
except ImportError as _error:
    raise errors.ConfigError(
        f"a job database is written with SQLAlchemy, which is not installed ({_error.name})",
        next_step="install imagecache-lib[jobs]",
    ) from _error

#: Seconds to wait for another process that writes. A caller that needs longer tries again.
_BUSY = 5.0

#: Ids of jobs, as :func:`~imagecache_lib.system.durable.new_id` makes them.
_ID = re.compile(r"[0-9a-f]{32}")


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
    :param host: the source of clocks, of sleep and of randomness for what is tried again.
    :raises ConfigError: the database cannot be opened, or is of a later release.
    """

    def __init__(
        self, where: str, *, busy: float = _BUSY, change_schema: bool = True, host: System | None = None
    ) -> None:
        self._host = host or System()
        self._transactions = Transactions(where, self._host, busy)
        self._writing, self._reading = self._transactions.writing, self._transactions.reading
        self._transactions.require_schema(change=change_schema)

    def close(self) -> None:
        """Close all connections. The last one of an sqlite file merges its log into it."""
        self._transactions.close()

    def _tries(self, doubt: str, *, deadline: float | None = None) -> Tries:
        return Tries(self._host, doubt, deadline=deadline)

    # -- jobs ----------------------------------------------------------------------------------------

    def add(
        self,
        aggregate: str,
        hosts: Sequence[str],
        image_ids: Sequence[str],
        terms: job.Terms,
        *,
        now: float,
        job_id: str | None = None,
    ) -> job.Job:
        """Store a new job, on which nothing was done yet, and return it.

        :param job_id: a random id of 32 hex digits, for a caller that asks again after a failure: a job that
            is stored already is returned as it is. None makes a new id.
        :raises ConfigError: another job has that id, or the database failed.
        """
        job_id = durable.new_id() if job_id is None else job_id
        if _ID.fullmatch(job_id) is None:
            raise errors.ConfigError(
                f"no job can have the id {errors.shown(job_id)}", next_step="choose 32 hex digits at random"
            )
        wanted = job.Job(
            job_id,
            job.storable(aggregate),
            tuple(image_ids),
            terms,
            {name: {} for name in hosts},
            created=now,
        )
        # The tables may be made at another node of a cluster at this moment.
        for again in self._tries(f"job {job_id} may be stored", deadline=terms.deadline):
            with again:
                try:
                    self._insert(wanted)
                except Duplicate:
                    # An earlier try stored it whose answer was lost; or it is another job.
                    if not _is_same(self.get(job_id), wanted):
                        raise errors.ConfigError(
                            f"another job has the id {job_id}", next_step="choose another one at random"
                        ) from None
                break
        return self.get(job_id)

    def _insert(self, work: job.Job) -> None:
        row = {
            "id": work.id,
            "aggregate": work.aggregate,
            "terms": work.terms.to_json(),
            "cancelled": 0,
            "created": work.created,
            "attempt": 0,
            "beat": 0,
        }
        named = [{"job": work.id, "position": at, "name": name} for at, name in enumerate(work.hosts)]
        images = [
            {"job": work.id, "position": at, "image_id": each} for at, each in enumerate(work.image_ids)
        ]
        with self._writing() as connection:
            connection.execute(schema.JOBS.insert(), row)
            connection.execute(schema.JOB_HOSTS.insert(), named)
            connection.execute(schema.JOB_IMAGES.insert(), images)
            connection.execute(
                sa.text(
                    "INSERT INTO cells (job, host, image, reason, received)"
                    " SELECT h.job, h.position, i.position, '', 0 FROM job_hosts h, job_images i"
                    " WHERE h.job = :job AND i.job = :job"
                ),
                {"job": work.id},
            )

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
        for again in self._tries(f"job {job_id} may be cancelled"):
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
        jobs, pruned = schema.JOBS.c, set[str]()
        for again in self._tries("the old jobs may be deleted"):
            with again, self._writing() as connection:
                found = connection.execute(
                    sa.text(
                        "SELECT id FROM jobs WHERE created < :before AND runner IS NULL AND NOT EXISTS"
                        " (SELECT 1 FROM cells WHERE cells.job = jobs.id AND cells.result IS NULL)"
                    ),
                    {"before": before},
                )
                ids = [{"old": job_id} for (job_id,) in found]
                # Those of a try whose answer was lost are found by no other.
                pruned.update(each["old"] for each in ids)
                if ids:
                    for table in (schema.CELLS, schema.JOB_IMAGES, schema.JOB_HOSTS):
                        connection.execute(table.delete().where(table.c.job == sa.bindparam("old")), ids)
                    connection.execute(schema.JOBS.delete().where(jobs.id == sa.bindparam("old")), ids)
                break
        return len(pruned)

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
        is_seen = sa.and_(jobs.beat == seen.beat, jobs.runner.is_not_distinct_from(seen.runner))
        # Of two nodes of a cluster that take it at the same moment, one is refused at its commit.
        found: str | None = None
        with contextlib.suppress(Contended):
            for again in self._tries(f"job {job_id} may be held for {lease.SECONDS:.0f} s"):
                with again, self._writing() as connection:
                    connection.execute(
                        sa.update(schema.JOBS)
                        .where(jobs.id == job_id, is_seen)
                        .values(runner=runner, beat=seen.beat + 1)
                    )
                    # Also where an earlier try has taken it: no other run has the same name.
                    found = connection.execute(sa.select(jobs.runner).where(jobs.id == job_id)).scalar()
                    break
        return found == runner

    def release_lease(self, job_id: str, runner: str) -> None:
        """Give up the lease, so that another conductor can run the job at once."""
        jobs = schema.JOBS.c
        for again in self._tries(f"job {job_id} may be held for {lease.SECONDS:.0f} s"):
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

    def retry(self, job_id: str, runner: str, *, deadline: float | None = None) -> None:
        """Clear the results that a resume tries again, and the mark of a cancelled job.

        :param deadline: the job's, in epoch seconds, or None for no deadline.
        :raises lease.LeaseLost: another conductor runs the job.
        """
        jobs, cells = schema.JOBS.c, schema.CELLS.c
        attempt = self.get(job_id).attempt
        for again in self._tries(f"job {job_id} may be resumed already", deadline=deadline):
            with again, self._writing() as connection:
                self._require_lease(connection, job_id, runner)
                begun = connection.execute(
                    sa.update(schema.JOBS)
                    .where(jobs.id == job_id, jobs.attempt == attempt)
                    .values(cancelled=0, attempt=attempt + 1)
                )
                # Else an earlier try was stored, and a cancel that came after it stays.
                if begun.rowcount:
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
        self._transactions.require_known(connection)


def _is_same(found: job.Job, wanted: job.Job) -> bool:
    """Return whether two jobs ask for the same."""
    return (found.aggregate, found.hosts, found.image_ids, found.terms) == (
        wanted.aggregate,
        wanted.hosts,
        wanted.image_ids,
        wanted.terms,
    )


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
