# SPDX-License-Identifier: Apache-2.0
"""Holding a transfer to a rate, and giving it up where next to nothing comes.

After each chunk a transfer rests until its bytes are paid for. What arrives meanwhile fills the socket's
buffer; then TCP's window closes, and the server waits too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.system.host import System

#: A rest is cut into pieces of this many seconds, so that a cancelled request ends soon.
_PIECE = 0.5

#: Seconds of waiting over which a transfer's lowest rate is an average.
WINDOW = 60.0


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
        self._waits.check()
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


def timely(chunks: Iterable[bytes], min_rate: int, system: System) -> Iterator[bytes]:
    """Yield chunks as they come, as long as they come fast enough.

    Only the time in which they are waited for counts, and not what becomes of them.

    :param min_rate: bytes per second on average of :data:`WINDOW` seconds of waiting, or 0 for any number.
    :param system: whose monotonic clock is used.
    :raises SourceError: fewer came.
    """
    waited, amount = 0.0, 0
    began = system.monotonic()
    for chunk in chunks:
        waited += system.monotonic() - began
        amount += len(chunk)
        if waited >= WINDOW:
            if amount < min_rate * waited:
                raise errors.SourceError(
                    f"only {amount} bytes came in {waited:.0f} s",
                    next_step="find out what slows the server down, or lower min_transfer_rate",
                )
            waited, amount = 0.0, 0
        yield chunk
        began = system.monotonic()
