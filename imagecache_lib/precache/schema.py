# SPDX-License-Identifier: Apache-2.0
"""The tables that keep jobs. A change here needs a revision in ``migrations/versions``.

``jobs.runner`` and ``jobs.beat`` are the lease: which conductor runs the job, and a number that it raises as
long as it lives (:mod:`imagecache_lib.precache.lease`). Cells refer to hosts and images by their positions: a
job of 10,000 hosts names each image 10,000 times otherwise, and MariaDB's keys have no room for the longest
names.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

#: The newest revision of ``migrations/versions``, and what sqlite's ``user_version`` says of it. Version 1
#: had no revisions; releases that know no other refuse a higher number.
REVISION = "0002"
VERSION = 2

METADATA = sa.MetaData()

#: MariaDB compares text without regard to case by default.
_MARIADB: dict[str, Any] = {
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
    "mysql_engine": "InnoDB",
}


def _table(name: str, *columns: sa.Column[Any]) -> sa.Table:
    return sa.Table(name, METADATA, *columns, sqlite_with_rowid=False, **_MARIADB)


JOBS = _table(
    "jobs",
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("aggregate", sa.Text, nullable=False),
    sa.Column("terms", sa.Text, nullable=False),
    sa.Column("cancelled", sa.SmallInteger, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("runner", sa.String(255)),
    sa.Column("beat", sa.BigInteger, nullable=False),
)

JOB_HOSTS = _table(
    "job_hosts",
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(253), nullable=False),
)

JOB_IMAGES = _table(
    "job_images",
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("image_id", sa.String(1024), nullable=False),
)

CELLS = _table(
    "cells",
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("host", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("image", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("result", sa.String(32)),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("received", sa.BigInteger, nullable=False),
    sa.Column("total", sa.BigInteger),
)
