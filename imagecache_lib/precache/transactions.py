# SPDX-License-Identifier: Apache-2.0
"""The transactions of a job database, in tables of this release's version."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from imagecache_lib.precache import engines, job_file, job_rows, jobs_url, schema
from imagecache_lib.precache.embedded import EmbeddedFile
from imagecache_lib.precache.engines import translated
from imagecache_lib.precache.job_rows import JobDatabaseError
from imagecache_lib.system.host import System
from imagecache_lib.system.trace import TracePoint

#: The revisions that this release knows how to come from.
_KNOWN = (None, schema.REVISION)

#: Names the lock under which one conductor at a time changes a server's tables.
_LOCK = 0x696D6167

_all: weakref.WeakSet[Transactions] = weakref.WeakSet()


def _begin_anew() -> None:
    for each in list(_all):
        each.begin_anew()


os.register_at_fork(after_in_child=_begin_anew)


class Transactions:
    """Makes transactions on an sqlite file or a server. Safe to share between threads.

    :param where: path of the file, made when missing, or a URL that SQLAlchemy understands.
    :param host: told about each commit.
    :param busy: seconds to wait for another process that holds the file.
    :raises ConfigError: the database cannot be opened.
    """

    def __init__(self, where: str, host: System, busy: float) -> None:
        self._host = host
        self._file: EmbeddedFile | None = None
        if not jobs_url.is_url(where):
            # One that a later "cd" of this process does not move.
            self._where = os.path.abspath(where)
            self._file = EmbeddedFile(self._where, busy)
            self._engine = self._file.engine
        else:
            self._where = engines.shown(where)
            self._engine = engines.server(where)
        _all.add(self)

    def begin_anew(self) -> None:
        """Use no connection and no lock of the process of which this one is a forked child."""
        if self._file is not None:
            self._file.begin_anew()
        else:
            engines.begin_anew(self._engine)

    def close(self) -> None:
        """Close all connections. The last one of an sqlite file merges its log into it."""
        if self._file is not None:
            self._file.close()
        self._engine.dispose()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Yield a connection in a transaction that is committed after the body, or rolled back if that fails.

        :raises Contended: a server rolled it back, since another transaction was first.
        :raises AnswerLost: the connection broke; whether it was stored is not known.
        :raises JobDatabaseError: it failed.
        """
        same = contextlib.nullcontext() if self._file is None else self._file.writing()
        with translated(self._where):
            with same, engines.transaction(self._engine, self._where) as connection:
                yield connection
                self._host.trace(TracePoint.JOBS_COMMIT)
            self._host.trace(TracePoint.JOBS_COMMITTED)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[sa.Connection]:
        same = contextlib.nullcontext() if self._file is None else self._file.reading()
        reading = self._engine.execution_options(reading=True)
        with translated(self._where), same, engines.transaction(reading, self._where) as connection:
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[job_rows.Query]:
        """Yield what runs statements that see the database as it is at one moment.

        :raises JobDatabaseError: the database failed.
        """
        with self._looking() as connection:

            def query(statement: str, parameters: Mapping[str, Any] | None = None) -> Iterable[Sequence[Any]]:
                return connection.execute(sa.text(statement), dict(parameters or {}))

            yield query

    # -- the schema ----------------------------------------------------------------------------------

    def require_schema(self, *, change: bool) -> None:
        """Bring the tables to this release's version, if they are of an earlier one.

        :param change: whether that may be done.
        :raises ConfigError: they are of a later release, or are to be changed and may not be.
        """
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

        with self.writing() as connection, migrate.alone(connection, _LOCK):
            # Another process may have done it meanwhile.
            if self._revision(connection) != schema.REVISION:
                migrate.upgrade(connection, schema.REVISION)
                if self._file is not None:
                    connection.exec_driver_sql(f"PRAGMA user_version = {schema.VERSION}")

    def _revision_now(self) -> str | None:
        with self._looking() as connection:
            return self._revision(connection)

    def _revision(self, connection: sa.Connection) -> str | None:
        """Return the revision of the tables. Returns None if there are none, or those of version 1."""
        if self._file is not None:
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

    def require_known(self, connection: sa.Connection) -> None:
        """Refuse tables that a later release has changed meanwhile.

        :raises JobDatabaseError: one did.
        """
        self._require_known(self._revision(connection))

    def _require_known(self, revision: str | None) -> None:
        if revision not in _KNOWN:
            raise job_file.too_new(self._where, revision)
