# SPDX-License-Identifier: Apache-2.0
"""Hosts and images in tables of their own, and the lease. A database of version 1 is taken over.

Version 1, which was sqlite's alone and had no revisions, kept the names of host and image in every cell.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = None
branch_labels = None
depends_on = None

_OPTIONS: dict[str, Any] = {
    # MariaDB commits each table by itself: a conductor that died between two goes on here.
    "if_not_exists": True,
    "sqlite_with_rowid": False,
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
    "mysql_engine": "InnoDB",
}


def upgrade() -> None:
    connection = op.get_bind()
    old = connection.dialect.name == "sqlite" and sa.inspect(connection).has_table("cells")
    if old:
        op.rename_table("jobs", "jobs_1")
        op.rename_table("cells", "cells_1")
    _create()
    if old:
        _take_over()
        op.drop_table("cells_1")
        op.drop_table("jobs_1")


def _create() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("aggregate", sa.Text, nullable=False),
        sa.Column("terms", sa.Text, nullable=False),
        sa.Column("cancelled", sa.SmallInteger, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("runner", sa.String(255)),
        sa.Column("beat", sa.BigInteger, nullable=False),
        **_OPTIONS,
    )
    op.create_table(
        "job_hosts",
        sa.Column("job", sa.String(64), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(253), nullable=False),
        **_OPTIONS,
    )
    op.create_table(
        "job_images",
        sa.Column("job", sa.String(64), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("image_id", sa.String(1024), nullable=False),
        **_OPTIONS,
    )
    op.create_table(
        "cells",
        sa.Column("job", sa.String(64), primary_key=True),
        sa.Column("host", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("image", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("result", sa.String(32)),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("received", sa.BigInteger, nullable=False),
        sa.Column("total", sa.BigInteger),
        **_OPTIONS,
    )


def _take_over() -> None:
    op.execute(
        "INSERT INTO jobs (id, aggregate, terms, cancelled, created, attempt, runner, beat)"
        " SELECT id, aggregate, terms, cancelled, created, attempt, NULL, 0 FROM jobs_1"
    )
    op.execute(
        "INSERT INTO job_hosts (job, position, name)"
        " SELECT job, host_position, MIN(host) FROM cells_1 GROUP BY job, host_position"
    )
    op.execute(
        "INSERT INTO job_images (job, position, image_id)"
        " SELECT job, image_position, MIN(image) FROM cells_1 GROUP BY job, image_position"
    )
    op.execute(
        "INSERT INTO cells (job, host, image, result, reason, received, total)"
        " SELECT job, host_position, image_position, result, reason, received, total FROM cells_1"
    )
