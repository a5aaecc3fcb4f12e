# SPDX-License-Identifier: Apache-2.0
"""Asking a source about an image that is in the cache, within a bounded time."""

from __future__ import annotations

import threading

from imagecache_lib import errors
from imagecache_lib.sources import transfer
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.system import threads
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter

#: How long one wait for the answer lasts before the caller is looked at again, in seconds.
_SLICE = 0.25


class Question:
    """One question, asked in a thread of its own, which a source that hangs cannot hold up for longer.

    :param source: the caller's, with the caller's rights.
    """

    def __init__(self, source: ImageSource, image_id: str, host: System) -> None:
        self._source = source
        self._image_id = image_id
        self._host = host
        self._answered = threading.Event()
        self._error: Exception | None = None
        threads.start(self._ask, name="imagecache-authorize")

    def wait(self, timeout: float, waiter: Waiter) -> None:
        """Return once the source says that it has the image.

        :param timeout: seconds to wait for the answer.
        :param waiter: the caller.
        :raises ImageNotFound: the source does not have the image, or denies it to this caller.
        :raises SourceError: the source failed, or did not answer in time.
        :raises: as :meth:`Waiter.check`.
        """
        until = self._host.monotonic() + timeout
        while not self._answered.wait(min(_SLICE, timeout)):
            waiter.check()
            if self._host.monotonic() >= until:
                raise errors.SourceError(
                    f"its source did not say within {timeout:g} s whether the caller may have it",
                    image=self._image_id,
                    next_step="try again later, or allow more time with authorize_timeout",
                )
        if self._error is not None:
            raise self._error

    def _ask(self) -> None:
        try:
            transfer.describe(self._source, self._image_id, host=self._host, retries=0)
        except Exception as error:
            self._error = error
        finally:
            self._answered.set()
