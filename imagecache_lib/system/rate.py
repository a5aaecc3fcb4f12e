# SPDX-License-Identifier: Apache-2.0
"""Holding a transfer to a rate: after each chunk it rests until its bytes are paid for.

What arrives meanwhile fills the socket's buffer; then TCP's window closes, and the server waits too.
"""

from __future__ import annotations

from typing import Protocol

from imagecache_lib.system.host import System

#: A rest is cut into pieces of this many seconds, so that a cancelled request ends soon.
_PIECE = 0.5


class Waits(Protocol):
    """What a transfer is made for: a :class:`~imagecache_lib.system.waiter.Waiter`, or one that retries."""

    @property
    def system(self) -> System:
        """Whose clock and sleep are used."""

    def check(self) -> None:
        """Raise if the caller no longer waits."""


class Pace:
    """The pace of one transfer.

    :param rate: bytes per second, or None for no limit.
    :param waits: asked between two pieces of a rest.
    """

    def __init__(self, rate: int | None, waits: Waits) -> None:
        self._rate = rate
        self._waits = waits
        self._paid_until: float | None = None

    def took(self, amount: int) -> None:
        """Rest as long as so many bytes may take, less the time since the last ones were paid for.

        :raises CancelledError, LockTimeoutError, SourceError: the caller no longer waits.
        """
        if self._rate is None:
            return
        cost = amount / self._rate
        now = self._waits.system.clock()
        since = now if self._paid_until is None else self._paid_until
        # Never longer than the chunk costs: a clock that is set back must not make a transfer wait for the
        # past. Nor is time in which nothing came a credit for more than one chunk.
        rest = min(cost, max(0.0, since + cost - now))
        self._paid_until = now + rest
        while rest > 0:
            piece = min(rest, _PIECE)
            self._waits.system.sleep(piece)
            rest -= piece
            self._waits.check()
