# SPDX-License-Identifier: Apache-2.0
"""What makes way for a base image that is to come, as those see it who need the way."""

from __future__ import annotations

from typing import Protocol


class Evictor(Protocol):
    """Removes base images under the rules of the periodic pass. Safe to share between threads."""

    def make_room(self, wanted: int) -> int:
        """Evict unused base images until ``wanted`` bytes are freed, as far as policy allows.

        Returns the bytes that were freed.

        :raises NoSpaceError, BackendError: the filesystem failed.
        """

    def evict_unfit(self, name: str, reason: str) -> bool:
        """Evict a base image that does not serve. The caller holds its exclusive lock.

        Returns False if the base image stays, since something needs it.

        :param reason: why it does not serve, as a clause.
        :raises NoSpaceError, BackendError: the filesystem failed.
        """


class NoEvictor:
    """An :class:`Evictor` that never removes anything."""

    def make_room(self, wanted: int) -> int:
        return 0

    def evict_unfit(self, name: str, reason: str) -> bool:
        return False
