# SPDX-License-Identifier: Apache-2.0
"""How often one call may start over."""

from __future__ import annotations

from imagecache_lib import errors


class RetryBudget:
    """The retries of one call, whatever fails. Every loop on the call's way draws on the same ones.

    :param retries: how many failures there may be before the next one is final.
    """

    def __init__(self, retries: int) -> None:
        self._retries = retries
        self._spent = 0

    def spend(self, failure: errors.ImageCacheError) -> None:
        """Count a failure. Raises ``failure`` if there may be no further attempt."""
        self._spent += 1
        if self._spent > self._retries:
            raise failure

    def reset(self) -> None:
        """Count from zero again: there was progress."""
        self._spent = 0
