# SPDX-License-Identifier: Apache-2.0
"""Brings a job database's tables to a newer version, with alembic. Imported only where that is to be done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import sqlalchemy as sa

from imagecache_lib import errors
from imagecache_lib.system.maker import Maker

#: Seconds to wait for another conductor that changes a server's tables.
_WAIT = 60


def upgrade(connection: sa.Connection, revision: str) -> None:
    """Run the migrations that lead to a revision, in the connection's transaction.

    :raises ConfigError: alembic is not installed.
    """
    try:
        from alembic import command
        from alembic.config import Config
    except ImportError:
        raise errors.ConfigError(
            "a job database is made with alembic, which is not installed",
            next_step="install imagecache-lib[jobs]",
        ) from None
    config = Config()
    config.set_main_option("script_location", "imagecache_lib.precache:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


@contextlib.contextmanager
def alone(connection: sa.Connection, lock: int) -> Iterator[None]:
    """Keep other conductors from changing the tables during the body. In sqlite the transaction does that."""
    name = connection.dialect.name
    if name == "postgresql":
        # Until the end of the transaction, of which the changes are part.
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
        yield
    elif name in ("mysql", "mariadb"):
        key = {"lock": f"imagecache-{lock:x}", "wait": _WAIT}
        connection.execute(sa.text("SELECT GET_LOCK(:lock, :wait)"), key)
        maker = Maker()
        try:
            yield
        finally:
            if maker.is_here:
                connection.execute(sa.text("SELECT RELEASE_LOCK(:lock)"), key)
    else:
        yield
