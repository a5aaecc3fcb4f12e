# SPDX-License-Identifier: Apache-2.0
"""How a job database comes to the newest version: alembic's revisions."""
