# SPDX-License-Identifier: Apache-2.0
"""The sqlite file of a job database: that it is one, whose it is, and that it stays the same one."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator

from imagecache_lib.precache.job_rows import JobDatabaseError

#: The newest version that this release knows: ``PRAGMA user_version``.
NEWEST = 2

#: Columns that tell a job database of any version from the database of another program.
_OWN = {"jobs": {"aggregate", "terms"}, "cells": {"job", "result", "received"}}

_CHOOSE = "choose another --jobs"


class Unmade(Exception):
    """The file has no tables: it is new, or the process that makes them is still at work."""


def require_file(path: str) -> None:
    """Refuse what is there under a path and is no file, before it is opened: a FIFO would never answer.

    :raises JobDatabaseError: it is a directory, a device or the like.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # whoever opens it says what is wrong, or makes it
    except ValueError:
        raise JobDatabaseError("the path of the job database is none", next_step=_CHOOSE) from None
    if not stat.S_ISREG(mode):
        raise JobDatabaseError("the job database is no file", path=path, next_step=_CHOOSE)


def version_of(connection: sqlite3.Connection, path: str) -> int:
    """Return the version of a job database. Changes nothing in it.

    :param connection: in which no transaction is under way.

    :raises Unmade: it has no tables yet.
    :raises JobDatabaseError: it is another program's database, or a later release has changed it.
    """
    connection.execute("BEGIN")  # all at one moment: another process may be making the tables
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (things,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        own = all(columns <= _columns(connection, table) for table, columns in _OWN.items())
    finally:
        connection.execute("ROLLBACK")
    if not version and not things:
        raise Unmade
    if not own or version < 1:
        raise JobDatabaseError("the file is not a job database", path=path, next_step=_CHOOSE)
    if version > NEWEST:
        raise too_new(path, version)
    return int(version)


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {str(row[1]) for row in connection.execute(f"PRAGMA table_info({table})")}


def too_new(path: str, version: object) -> JobDatabaseError:
    """Return the error for a database that a later release has changed."""
    return JobDatabaseError(
        f"the job database has version {version}, this release knows {NEWEST}",
        path=path,
        next_step="upgrade imagecache_lib",
    )


class SameFile:
    """Notices that a file was removed or replaced since it was first seen.

    Such a file takes what is written all the same, and nobody will ever read it.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        #: Device and inode of the file, once it was there.
        self._seen: tuple[int, int] | None = None

    @contextlib.contextmanager
    def required(self) -> Iterator[None]:
        """Have the file be the same one before and after the body.

        :raises JobDatabaseError: it is gone, or was replaced.
        """
        self._require()
        yield
        self._require()

    def forget(self) -> None:
        """Take whatever is there next."""
        self._seen = None

    def _require(self) -> None:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            if self._seen is None:
                return  # it is made by whoever opens it first
            raise self._lost("is gone") from None
        except OSError as error:
            raise self._lost(f"cannot be reached ({error.strerror})") from error
        self._seen = self._seen or (found.st_dev, found.st_ino)
        if (found.st_dev, found.st_ino) != self._seen:
            raise self._lost("was replaced by another file")

    def _lost(self, what: str) -> JobDatabaseError:
        return JobDatabaseError(
            f"the job database {what}", path=self._path, next_step="put the file back that was there"
        )
