# SPDX-License-Identifier: Apache-2.0
"""Who waits for something, and until when."""

from __future__ import annotations

import dataclasses

from imagecache_lib import errors, model
from imagecache_lib.system.host import System


@dataclasses.dataclass(frozen=True)
class EitherToken:
    """Set once the process is about to end, or the caller has given up.

    :param stopping: the process's token, set once it is about to end.
    :param cancel: the caller's token, or None if the caller never gives up.
    """

    stopping: model.CancelToken
    cancel: model.CancelToken | None

    def is_set(self) -> bool:
        """Return whether either token is set."""
        return self.stopping.is_set() or (self.cancel is not None and self.cancel.is_set())


@dataclasses.dataclass(frozen=True)
class Waiter:
    """A caller that waits. Whatever takes long asks :meth:`check` now and then.

    :param image_id: the image that the caller waits for, for messages.
    :param deadline: epoch seconds until which it waits, or None if it waits as long as it takes.
    :param cancel: set once the caller does not want the answer any more.
    """

    system: System
    image_id: str | None = None
    deadline: float | None = None
    cancel: model.CancelToken | None = None

    def check(self) -> None:
        """Raise if the caller no longer waits.

        :raises CancelledError: the request was cancelled.
        :raises LockTimeoutError: its deadline passed.
        """
        if self.cancel is not None and self.cancel.is_set():
            raise errors.CancelledError("the request was cancelled", image=self.image_id)
        if self.deadline is not None and self.system.clock() >= self.deadline:
            raise errors.LockTimeoutError(
                "the request's deadline passed before it was done",
                image=self.image_id,
                next_step="try again later, or allow more time",
            )
