# SPDX-License-Identifier: Apache-2.0
"""How often a source is asked again, and how long to wait before it: the one retry budget of a transfer.

The delays are an exponential back-off with full jitter. A server's Retry-After (RFC 9110, section 10.2.3)
outranks it, up to a limit.
"""

from __future__ import annotations

import logging

from imagecache_lib import errors, model
from imagecache_lib.sources.interface import SourceBusy, SourceRefused
from imagecache_lib.system.host import System
from imagecache_lib.system.retries import RetryBudget

LOG = logging.getLogger(__name__)

#: Seconds: the first back-off, which doubles, and the longest.
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
#: A server's Retry-After above this many seconds is not waited for: the error says so instead.
LONGEST_RETRY_AFTER = 120.0
#: Waiting is cut into pieces of this many seconds, so that a cancelled request ends soon.
_PIECE = 1.0


class DeadlinePassed(errors.SourceError):
    """The request's deadline passed while the source was asked."""


class SourceBudget(RetryBudget):
    """The retries of one transfer or question, with the waiting between them.

    :ivar system: the host.
    :param image_id: the image that errors are about.
    :param host: whose clock, sleep and chance are used.
    :param retries: failures in a row after which another attempt is made.
    :param deadline: epoch seconds, or None for no limit.
    :param cancel: ends the waiting once it is set.
    """

    def __init__(
        self,
        image_id: str,
        *,
        host: System,
        retries: int,
        deadline: float | None,
        cancel: model.CancelToken | None,
    ) -> None:
        super().__init__(retries)
        self._image_id = image_id
        self.system = host
        self._deadline = deadline
        self._cancel = cancel

    def check(self, cause: errors.ImageCacheError | None = None, ahead: float = 0.0) -> None:
        """Raise if the request is cancelled, or its deadline is less than ``ahead`` seconds away.

        :param cause: the last failure, for the message.
        :raises CancelledError: the request was cancelled.
        :raises DeadlinePassed: the deadline passed, or would pass.
        """
        if self._cancel is not None and self._cancel.is_set():
            raise errors.CancelledError("the request was cancelled", image=self._image_id)
        if self._deadline is not None and self.system.clock() + ahead >= self._deadline:
            reason = f"; the last failure: {cause.cause}" if cause is not None else ""
            raise DeadlinePassed(
                f"the request's deadline passed before the image was here{reason}",
                image=self._image_id,
                next_step="try again later, or allow more time",
            ) from cause

    def seconds_left(self) -> float | None:
        """Return how many seconds away the deadline is, or None if there is none."""
        return None if self._deadline is None else self._deadline - self.system.clock()

    def spend(self, failure: errors.ImageCacheError) -> None:
        """Count a failure and wait before the next attempt.

        :raises SourceError: there must be no other attempt: the budget is spent, or the failure is one that
            another attempt at once would only repeat.
        :raises CancelledError: the request was cancelled meanwhile.
        """
        if isinstance(failure, (SourceRefused, DeadlinePassed)):
            raise failure
        self.check(failure)
        final = errors.SourceError(
            f"{failure.cause}; gave up after {self._spent + 1} attempts",
            image=self._image_id,
            path=failure.path,
            next_step=failure.next_step or "try again later",
        )
        final.__cause__ = failure
        super().spend(final)
        delay = self._delay(failure)
        LOG.warning(
            "image %s: %s; next attempt in %.1f s (%d of %d)",
            self._image_id,
            failure.cause,
            delay,
            self._spent,
            self._retries,
        )
        self._wait(delay, failure)

    def _delay(self, failure: errors.ImageCacheError) -> float:
        # Full jitter: hosts that failed together must not come back together.
        ceiling = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(self._spent - 1, 16))
        delay = self.system.random() * ceiling
        asked = failure.retry_after if isinstance(failure, SourceBusy) else None
        if isinstance(failure, SourceBusy) and failure.retry_at is not None:
            asked = max(0.0, failure.retry_at - self.system.clock())
        if asked is None:
            return delay
        if asked > LONGEST_RETRY_AFTER:
            raise errors.SourceError(
                f"{failure.cause}, and asks to wait {asked:.0f} s",
                image=self._image_id,
                next_step="try again then",
            ) from failure
        return asked + delay

    def _wait(self, seconds: float, failure: errors.ImageCacheError) -> None:
        self.check(failure, ahead=seconds)
        while seconds > 0:
            piece = min(seconds, _PIECE)
            self.system.sleep(piece)
            seconds -= piece
            self.check(failure)
