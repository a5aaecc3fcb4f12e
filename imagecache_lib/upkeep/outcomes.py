# SPDX-License-Identifier: Apache-2.0
"""How the eviction of one base went."""

from __future__ import annotations

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Evicted:
    """The base is gone from the cache."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """The base is where it was, or is put back, or waits in the trash.

    :param reason: why, as a clause.
    """

    reason: str


class BaseEvictor(Protocol):
    """Evicts single base images."""

    def evict_one(self, name: str, reason: str, *, locked: bool = False) -> Evicted | Kept:
        """Evict a base image if nothing needs it.

        :param reason: why it goes, as a clause.
        :param locked: the caller holds its lock.
        :raises NoSpaceError, BackendError: the filesystem failed.
        """
