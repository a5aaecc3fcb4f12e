# SPDX-License-Identifier: Apache-2.0
"""How a job database is connected to, and what its errors mean: an sqlite file, a MariaDB or a PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, pool

from imagecache_lib import errors
from imagecache_lib.precache import job_file
from imagecache_lib.precache.job_rows import JobDatabaseError
from imagecache_lib.precache.retries import AnswerLost, Contended, Duplicate
from imagecache_lib.system import mounts
from imagecache_lib.system.maker import Maker, leave_to_parent

#: Seconds for a server to accept a connection, and to answer a statement.
_CONNECT_SECONDS = 10
_STATEMENT_SECONDS = 20


#: How servers say that another transaction was first: MariaDB by the number of a deadlock, which is also
#: what Galera answers for a conflict between two nodes, and PostgreSQL by the SQLSTATE of a serialization
#: failure or a deadlock.
_DEADLOCK = 1213
_SQLSTATES = ("40001", "40P01")


def connected(path: str, busy: float) -> sqlite3.Connection:
    """Return a connection to an sqlite file, which is made when it is missing.

    :param busy: seconds to wait for another process that holds it.
    :raises sqlite3.Error: it cannot be opened.
    :raises JobDatabaseError: it is another program's database, or a later release has changed it.
    """
    # Autocommit by sqlite3's own idea: SQLAlchemy's transactions are begun below, as what they are.
    connection = sqlite3.connect(path, timeout=busy, isolation_level=None, check_same_thread=False)
    try:
        # Before anything is changed in what may be another program's.
        with contextlib.suppress(job_file.Unmade):
            job_file.version_of(connection, path)
        _set_journal(connection, wal=not mounts.is_network(os.path.dirname(path)))
    except BaseException:
        connection.close()
        raise
    return connection


def embedded(path: str, busy: float) -> sa.Engine:
    """Return the engine of an sqlite file.

    :param path: absolute.
    :param busy: seconds to wait for another process that holds it.
    """

    def connect() -> sqlite3.Connection:
        return connected(path, busy)

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=pool.QueuePool, pool_size=2)

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A transaction that will write takes the lock at once: one that read first could not wait for it.
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def _set_journal(connection: sqlite3.Connection, *, wal: bool) -> None:
    wanted = "wal" if wal else "delete"
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    if mode != wanted:
        # A process that reads keeps it as it is: slower, and no less safe.
        with contextlib.suppress(sqlite3.OperationalError):
            (mode,) = connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
    # In WAL mode a power cut may lose the last seconds and never more. Agents remember them.
    connection.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")


def server(url: str) -> sa.Engine:
    """Return the engine of a server.

    :param url: as SQLAlchemy has it.
    :raises ConfigError: it is of no server that is supported.
    """
    try:
        parsed = sa.engine.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise errors.ConfigError(
            "the job database has no URL that could be one",
            next_step="write it as mysql+pymysql://user@host/name",
        ) from None
    limits: dict[str, Any] = {"connect_timeout": _CONNECT_SECONDS}
    if parsed.get_backend_name() in ("mysql", "mariadb"):
        limits |= {"read_timeout": _STATEMENT_SECONDS, "write_timeout": _STATEMENT_SECONDS}
    elif parsed.get_backend_name() == "postgresql":
        limits["options"] = f"-c statement_timeout={_STATEMENT_SECONDS}s"
    else:
        raise errors.ConfigError(
            f"the job database cannot be a {parsed.get_backend_name()} by URL",
            next_step="give the path of an sqlite file, or the URL of a MariaDB or PostgreSQL",
        )
    # A connection that a server or a firewall closed meanwhile is found out before it is used.
    with translated(shown(url)):
        engine = sa.create_engine(
            parsed, connect_args=limits, pool_pre_ping=True, pool_size=2, isolation_level="READ COMMITTED"
        )

    @event.listens_for(engine, "do_connect")
    def connect(dialect: sa.Dialect, _record: Any, given: list[Any], options: dict[str, Any]) -> Any:
        try:
            return dialect.connect(*given, **options)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise errors.ConfigError(
                f"the URL of the job database does not work: {error}", path=shown(url), next_step="correct it"
            ) from error

    return engine


def begin_anew(engine: sa.Engine) -> None:
    """Have a forked child make connections of its own, and leave those that it inherits alone."""
    leave_to_parent(engine.pool)
    engine.dispose(close=False)


@contextlib.contextmanager
def transaction(engine: sa.Engine, where: str) -> Iterator[sa.Connection]:
    """Yield a connection in a transaction that is committed after the body, or rolled back if that fails.

    A child that is forked in the body has a copy of the connection, and leaves it alone: what it rolled back
    would be its parent's transaction, and in an sqlite file some pages of it.

    :param where: the database, for the message.
    :raises JobDatabaseError: this is such a child, and came to the end of the body.
    """
    maker = Maker()
    with contextlib.ExitStack() as held:
        connection = held.enter_context(engine.begin())
        try:
            yield connection
        finally:
            if not maker.is_here:
                leave_to_parent(held.pop_all())
        if not maker.is_here:
            raise JobDatabaseError(
                "this process was forked in the middle of a transaction, which is its parent's to end",
                path=where,
                next_step="do in the parent what is to be stored",
            )


def shown(url: str) -> str:
    """Return a URL as messages show it: without its password, and without options, which may be one."""
    try:
        return sa.engine.make_url(url).set(query={}).render_as_string(hide_password=True)
    except (sa.exc.ArgumentError, ValueError):
        return "the URL of the job database"


def _kind_of(error: Exception) -> type[JobDatabaseError]:
    cause = getattr(error, "orig", None) or error
    if getattr(cause, "sqlstate", None) in _SQLSTATES or cause.args[:1] == (_DEADLOCK,):
        return Contended
    if isinstance(error, ConnectionError) or getattr(error, "connection_invalidated", False):
        return AnswerLost
    return Duplicate if isinstance(error, sa.exc.IntegrityError) else JobDatabaseError


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn what a database or its driver raises into the library's errors.

    :param where: the database, for the message.
    :raises Contended: another transaction was first.
    :raises AnswerLost: the connection broke.
    :raises Duplicate: a row is there already.
    :raises JobDatabaseError: it failed.
    :raises ConfigError: its driver is not installed.
    """
    try:
        yield
    except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        cause = getattr(error, "orig", None) or error
        # PyMySQL's errors are a number and a text.
        text = str(cause.args[-1] if len(cause.args) == 2 else cause)
        raise _kind_of(error)(
            f"the job database failed: {' '.join(text.split())}",
            path=where,
            next_step="check the database and its disk",
        ) from error
    except ImportError as error:
        raise errors.ConfigError(
            f"the driver of the job database is not installed: {error}",
            path=where,
            next_step="install PyMySQL for mysql+pymysql:, or psycopg for postgresql+psycopg:",
        ) from error
