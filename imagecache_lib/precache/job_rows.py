# SPDX-License-Identifier: Apache-2.0
"""How jobs are read out of any of the databases that keep them. Rows of another release are shown as such.

Both readers share this module: :mod:`sqlite3` of the standard library, which ``status`` and ``list`` use on
the embedded database, and SQLAlchemy for the others. The statements are plain SQL with named parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from imagecache_lib import errors
from imagecache_lib.precache import job

_JOB = "SELECT id, aggregate, terms, cancelled, created, attempt FROM jobs"
_HOSTS = "SELECT position, name FROM job_hosts WHERE job = :job ORDER BY position"
_IMAGES = "SELECT position, image_id FROM job_images WHERE job = :job ORDER BY position"
# Most cells of a job that has just begun say nothing yet; they need not be read.
_CELLS = (
    "SELECT host, image, result, reason, received, total FROM cells WHERE job = :job"
    " AND (result IS NOT NULL OR reason <> '' OR received <> 0 OR total IS NOT NULL)"
)
_HOST_COUNTS = "SELECT job, COUNT(*) FROM job_hosts GROUP BY job"
_IMAGE_COUNTS = "SELECT job, COUNT(*) FROM job_images GROUP BY job"
_CELL_COUNTS = "SELECT job, result, COUNT(*) FROM cells WHERE result IS NOT NULL GROUP BY job, result"

_NEXT_STEP = "use the release that wrote it, or start a new job"


class JobDatabaseError(errors.ConfigError):
    """The job database cannot be used, or failed. It says nothing about any host."""


class Query(Protocol):
    """Runs a statement and returns its rows."""

    def __call__(self, statement: str, parameters: Mapping[str, Any] = ...) -> Iterable[Sequence[Any]]: ...


class JobsReader(Protocol):
    """Reads jobs."""

    def get(self, job_id: str) -> job.Job:
        """Return a job with its progress so far.

        :raises ConfigError: no job has that id, or the database failed.
        """
        ...

    def summaries(self) -> list[job.JobSummary]:
        """Return a summary of every job, the oldest first.

        :raises ConfigError: the database failed.
        """
        ...


class UnknownJob(errors.ConfigError):
    """There is no such job."""


def unknown_job(job_id: str) -> UnknownJob:
    """Return the error for an id that no job has."""
    return UnknownJob(f"there is no job {job_id}", next_step="list the jobs to see their ids")


def read_job(query: Query, job_id: str) -> job.Job:
    """Return a job with its progress so far.

    :raises ConfigError: no job has that id.
    """
    found = next(iter(query(f"{_JOB} WHERE id = :job", {"job": job_id})), None)
    if found is None:
        raise unknown_job(job_id)
    hosts = {position: str(name) for position, name in query(_HOSTS, {"job": job_id})}
    images = {position: str(image_id) for position, image_id in query(_IMAGES, {"job": job_id})}
    cells = {name: dict.fromkeys(images.values(), job.OPEN) for name in hosts.values()}
    for host, image, *fields in query(_CELLS, {"job": job_id}):
        if host in hosts and image in images:
            cells[hosts[host]][images[image]] = _cell(fields)
    terms, problem = _terms(found[2])
    return job.Job(
        id=str(found[0]),
        aggregate=str(found[1]),
        image_ids=tuple(images.values()),
        terms=terms,
        cells=cells,
        cancelled=bool(found[3]),
        created=_number(found[4]),
        attempt=int(_number(found[5])),
        problem=problem,
    )


def read_summaries(query: Query) -> list[job.JobSummary]:
    """Return a summary of every job, the oldest first."""
    hosts = _counts(query(_HOST_COUNTS))
    images = _counts(query(_IMAGE_COUNTS))
    counts: dict[str, dict[job.Result, int]] = {}
    for job_id, result, count in query(_CELL_COUNTS):
        counted = counts.setdefault(job_id, dict.fromkeys(job.Result, 0))
        counted[_result(result)] += count
    return [
        job.JobSummary(
            id=str(job_id),
            aggregate=str(aggregate),
            created=_number(created),
            hosts=hosts.get(job_id, 0),
            images=images.get(job_id, 0),
            cancelled=bool(cancelled),
            counts=counts.get(job_id, dict.fromkeys(job.Result, 0)),
            problem=_terms(terms)[1],
        )
        for job_id, aggregate, terms, cancelled, created, _attempt in query(f"{_JOB} ORDER BY created, id")
    ]


# -- rows that another release wrote, or that are damaged ----------------------------------------------------


def _counts(rows: Iterable[Sequence[Any]]) -> dict[str, int]:
    return {job_id: count for job_id, count in rows}  # noqa: C416  rows of SQLAlchemy are no pairs to dict()


def _cell(fields: Sequence[Any]) -> job.Cell:
    result, reason, received, total = fields
    known = None if result is None else _result(result)
    text = "" if reason is None else str(reason)
    if known is job.Result.UNKNOWN:
        text = f"the job database holds the unknown result {result!r}: {text}".rstrip(": ")
    return job.Cell(
        known, text, int(_number(received)), None if not isinstance(total, int) else max(0, total)
    )


def _result(found: Any) -> job.Result:
    try:
        return job.Result(found)
    except ValueError:
        return job.Result.UNKNOWN


def _number(found: Any) -> float:
    return max(0, found) if isinstance(found, int | float) else 0


def _terms(found: Any) -> tuple[job.Terms, str | None]:
    """Return a job's terms, or the default ones and why its own are not known."""
    try:
        return job.Terms.from_json(found), None
    except (AttributeError, KeyError, TypeError, ValueError, errors.ConfigError) as error:
        return job.Terms(), f"its terms cannot be read: {error}"


def require_runnable(work: job.Job) -> None:
    """Refuse to work on a job that this release does not understand.

    :raises ConfigError: its row was written by another release, or is damaged.
    """
    if work.problem is not None:
        raise errors.ConfigError(f"job {work.id}: {work.problem}", next_step=_NEXT_STEP)
