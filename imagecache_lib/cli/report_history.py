# SPDX-License-Identifier: Apache-2.0
"""What earlier reports saw, in a small SQLite file of the operator's choice.

One table, ``looks``: when it was (``at``, epoch seconds), the filesystem's ``size`` and ``free`` bytes, and
one column of bytes for each state of base images. ``PRAGMA user_version`` is 1; a file of another version is
left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Sequence

from imagecache_lib import errors
from imagecache_lib.diagnostics.survey import State, Survey

_VERSION = 1
_STATES = tuple(state.value for state in State)
#: Hourly reports of a year. Older ones are forgotten.
_MOST = 10_000
_WAIT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Look:
    """What a report saw.

    :param at: epoch seconds.
    :param size: bytes of the filesystem.
    :param free: bytes that could still be allocated.
    :param allocated: bytes on disk by state.
    """

    at: float
    size: int
    free: int
    allocated: dict[str, int]


def add(path: str, survey: Survey) -> list[Look]:
    """Add what was seen now to a file, which is made if it is not there. Returns all that it has, by time.

    :raises ConfigError: the file cannot be used, or is something else.
    """
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_WAIT_SECONDS)) as database, database:
            _prepare(database, path)
            now = [survey.now, survey.size, survey.free, *(survey.bytes_of(state) for state in State)]
            marks = ", ".join("?" * len(now))
            database.execute(f"INSERT OR REPLACE INTO looks VALUES ({marks})", now)  # noqa: S608
            database.execute(
                "DELETE FROM looks WHERE at NOT IN (SELECT at FROM looks ORDER BY at DESC LIMIT ?)", [_MOST]
            )
            return [_look(row) for row in database.execute("SELECT * FROM looks ORDER BY at")]
    except (sqlite3.Error, OverflowError) as error:
        raise errors.ConfigError(
            f"the history of reports cannot be used: {error}", path=path, next_step="name another --history"
        ) from error


def _prepare(database: sqlite3.Connection, path: str) -> None:
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if version == _VERSION:
        return
    if version or tables:
        raise errors.ConfigError(
            "this is no history of reports, or one of another release",
            path=path,
            next_step="name another --history",
        )
    states = ", ".join(f"{state} INTEGER NOT NULL" for state in _STATES)
    database.execute(
        f"CREATE TABLE looks (at REAL PRIMARY KEY, size INTEGER NOT NULL, free INTEGER NOT NULL, {states})"
    )
    database.execute(f"PRAGMA user_version = {_VERSION}")


def _look(row: Sequence[float]) -> Look:
    at, size, free, *allocated = row
    by_state = dict(zip(_STATES, map(int, allocated), strict=True))
    return Look(at, int(size), int(free), by_state)
