# SPDX-License-Identifier: Apache-2.0
"""How the eviction of one base went."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Evicted:
    """The base is gone from the cache."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """The base is where it was, or is put back, or waits in the trash.

    :param reason: why, as a clause.
    """

    reason: str
