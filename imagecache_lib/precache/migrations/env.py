# SPDX-License-Identifier: Apache-2.0
"""Run by alembic: works on the connection, and in the transaction, that the job database gives it."""

from __future__ import annotations

from alembic import context

from imagecache_lib.precache import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.METADATA,
    transactional_ddl=True,
)
context.run_migrations()
