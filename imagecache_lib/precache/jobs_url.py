# SPDX-License-Identifier: Apache-2.0
"""How a job database is named."""

from __future__ import annotations


def is_url(where: str) -> bool:
    """Return whether a job database is named by a URL, and not by the path of an sqlite file."""
    return "://" in where
