# SPDX-License-Identifier: Apache-2.0
"""When a transaction of the job database is tried again: with growing pauses, and not for long.

Two failures may pass. A server rolls a transaction back because another one was first. Or the connection
breaks before the server's answer arrives: whether the transaction was stored is then not known, so that
whatever is tried again must come to the same where it was stored already.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import TracebackType

from imagecache_lib.precache.job_rows import JobDatabaseError
from imagecache_lib.system.host import System

LOG = logging.getLogger(__name__)

#: The most tries of one transaction, and the seconds after which none begins any more.
MOST_TRIES = 10
LONGEST = 30.0

#: The pauses in seconds: the first, doubled each time, and the longest. A random number takes up to half of
#: one away, or adds as much: two that met once do not meet again.
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0


class Contended(JobDatabaseError):
    """A server rolled a transaction back because another one was first. The same may work now."""


class AnswerLost(JobDatabaseError):
    """The connection broke during a transaction. Whether it was stored is not known."""


class Duplicate(JobDatabaseError):
    """A row is there already."""


class Tries:
    """The tries of one transaction, as an iterator of context managers: each encloses one try.

    A failure that may pass ends the context without an exception, after a pause. Once an answer was lost,
    every failure is one that may pass: the database may be restarting.

    :param host: the source of clocks, of sleep, and of randomness.
    :param doubt: what the last error adds if it is not known whether the transaction was stored.
    :param deadline: epoch seconds after which nothing is tried again, or None for no deadline.
    """

    def __init__(self, host: System, doubt: str, *, deadline: float | None = None) -> None:
        self._host = host
        self._doubt = doubt
        self._deadline = deadline
        self._began = host.monotonic()
        self._failures = 0
        self._is_in_doubt = False

    def __iter__(self) -> Iterator[Tries]:
        while True:
            yield self

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._is_in_doubt = self._is_in_doubt or isinstance(error, AnswerLost)
        if not isinstance(error, JobDatabaseError) or isinstance(error, Duplicate):
            return False
        if not (self._is_in_doubt or isinstance(error, Contended)):
            return False
        self._failures += 1
        left = self._seconds_left()
        if self._failures < MOST_TRIES and left > 0:
            if self._failures == 1 and self._is_in_doubt:
                LOG.warning("The job database did not answer, and is asked again: %s", error)
            self._host.sleep(min(self._pause(), left))
            return True
        if self._is_in_doubt:
            raise AnswerLost(
                f"{error.cause}; {self._doubt}",
                path=error.path,
                next_step="check the database, and look what it holds before you ask again",
            ) from error
        return False

    def _seconds_left(self) -> float:
        """Return the seconds in which another try may begin."""
        left = self._began + LONGEST - self._host.monotonic()
        return left if self._deadline is None else min(left, self._deadline - self._host.clock())

    def _pause(self) -> float:
        pause = min(_FIRST_PAUSE * 2.0 ** (self._failures - 1), _LONGEST_PAUSE)
        return float(pause * (0.5 + self._host.random()))
