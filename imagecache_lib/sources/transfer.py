# SPDX-License-Identifier: Apache-2.0
"""What is done once around any source: retrying, resuming, falling back, and bounding the length.

A source makes one attempt and raises. Here the attempts become an image::

    source, image = transfer.describe(source, image_id, host=host, fallbacks=fallbacks)
    fetch = transfer.Transfer(source, image, host=host)
    while True:
        begin with an empty stage file
        try:
            for chunk in fetch.chunks(): digest, inspect and write it
        except transfer.StartAgain:
            continue
        if the digest is wrong and fetch.grant_clean_pass():
            continue
        break

The loop ends: every pass draws on the one retry budget that the :class:`Transfer` holds.
"""

from __future__ import annotations

import logging
import random as random_module
from collections.abc import Callable, Generator, Iterator, Sequence

from imagecache_lib import errors, model
from imagecache_lib.sources.interface import (
    CannotResume,
    ImageSource,
    NotPermitted,
    SourceBusy,
    SourceRefused,
)
from imagecache_lib.system.host import System
from imagecache_lib.system.rate import Pace
from imagecache_lib.system.trace import TracePoint

LOG = logging.getLogger(__name__)

#: Seconds: the first back-off, which doubles, and the longest.
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
#: A server's Retry-After above this many seconds is not waited for: the error says so instead.
LONGEST_RETRY_AFTER = 120.0
#: Waiting is cut into pieces of this many seconds, so that a cancelled request ends soon.
_PIECE = 1.0
#: A failed attempt does not count when it brought new bytes, at least this many and this part of the image.
#: The part bounds the number of attempts for an image of any size.
_PROGRESS_BYTES = 64 * 2**10
_PROGRESS_PART = 256

#: Glance's image statuses that end in ``active`` by themselves.
_NOT_YET_ACTIVE = frozenset({"queued", "saving", "uploading", "importing"})
_GONE = frozenset({"deleted", "pending_delete"})


class StartAgain(errors.SourceError):
    """The transfer broke and cannot go on where it broke: throw the bytes away and iterate anew."""


class DeadlinePassed(errors.SourceError):
    """The request's deadline passed while the source was asked."""


class _Patience:
    """How many more failures are borne, and how long to wait after each."""

    def __init__(
        self,
        image_id: str,
        *,
        host: System,
        retries: int,
        deadline: float | None,
        cancel: model.CancelToken | None,
        random: Callable[[], float],
    ) -> None:
        self._image_id = image_id
        self._host = host
        self._retries = retries
        self._deadline = deadline
        self._cancel = cancel
        self._random = random
        self._failures = 0

    def check(self, cause: errors.SourceError | None = None, ahead: float = 0.0) -> None:
        """Raise if the request is cancelled, or its deadline is less than ``ahead`` seconds away."""
        if self._cancel is not None and self._cancel.is_set():
            raise errors.CancelledError("the request was cancelled", image=self._image_id)
        if self._deadline is not None and self._host.clock() + ahead >= self._deadline:
            reason = f"; the last failure: {cause.cause}" if cause is not None else ""
            raise DeadlinePassed(
                f"the request's deadline passed before the image was here{reason}",
                image=self._image_id,
                next_step="try again later, or allow more time",
            ) from cause

    def forgive(self) -> None:
        """Count from zero again: there was progress."""
        self._failures = 0

    def bear(self, error: errors.SourceError) -> None:
        """Wait before the next attempt, or raise if there must be none."""
        self._failures += 1
        if isinstance(error, (SourceRefused, DeadlinePassed)):
            raise error
        if self._failures > self._retries:
            raise errors.SourceError(
                f"{error.cause}; gave up after {self._failures} attempts",
                image=self._image_id,
                path=error.path,
                next_step=error.next_step or "try again later",
            ) from error
        delay = self._delay(error)
        LOG.warning("%s; next attempt in %.1f s (%d of %d)", error, delay, self._failures, self._retries)
        self._wait(delay, error)

    def _delay(self, error: errors.SourceError) -> float:
        # Full jitter: hosts that failed together must not come back together.
        ceiling = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(self._failures - 1, 16))
        delay = self._random() * ceiling
        asked = error.retry_after if isinstance(error, SourceBusy) else None
        if asked is None:
            return delay
        if asked > LONGEST_RETRY_AFTER:
            raise errors.SourceError(
                f"{error.cause}, and asks to wait {asked:.0f} s",
                image=self._image_id,
                next_step="try again then",
            ) from error
        return asked + delay

    def _wait(self, seconds: float, error: errors.SourceError) -> None:
        self.check(error, ahead=seconds)
        while seconds > 0:
            piece = min(seconds, _PIECE)
            self._host.sleep(piece)
            seconds -= piece
            self.check(error)


def describe(
    source: ImageSource,
    image_id: str,
    *,
    host: System,
    fallbacks: Sequence[ImageSource] = (),
    retries: int = 3,
    deadline: float | None = None,
    cancel: model.CancelToken | None = None,
    random: Callable[[], float] = random_module.random,
) -> tuple[ImageSource, model.Image]:
    """Return the first source that has the image, and what it says of it. The image is active.

    :param fallbacks: asked in turn when the image is gone from the source. Not when it is there and
        the caller may not have it.
    :param retries: how often each source is asked again.
    :param deadline: epoch seconds.
    :raises ImageNotFound: the source does not have it, and no fallback gave it.
    :raises ImageRejected: it can never be fetched as it is: deactivated, killed.
    :raises SourceError: the source failed, the deadline passed, or the image is not active yet.
    :raises CancelledError: ``cancel`` was set.
    """

    def ask(candidate: ImageSource) -> model.Image:
        patience = _Patience(
            image_id, host=host, retries=retries, deadline=deadline, cancel=cancel, random=random
        )
        return _describe(candidate, image_id, patience)

    try:
        return source, ask(source)
    except NotPermitted:
        raise
    except errors.ImageNotFound as error:
        gone = error
    for fallback in fallbacks:
        try:
            return fallback, ask(fallback)
        except errors.ImageNotFound:
            continue
        except DeadlinePassed:
            raise
        except errors.SourceError as error:
            # It was a second chance. The answer that counts is the one of the source that was asked first.
            LOG.warning("a fallback source failed: %s", error)
    raise gone


def _describe(source: ImageSource, image_id: str, patience: _Patience) -> model.Image:
    while True:
        patience.check()
        try:
            image = source.describe(image_id)
        except errors.ImageCacheError as error:
            failure = _about(image_id, error)
        except Exception as error:
            failure = _foreign(image_id, error)
        else:
            _require_active(image)
            return image
        if not isinstance(failure, errors.SourceError):
            raise failure
        patience.bear(failure)


def _require_active(image: model.Image) -> None:
    if image.status == "active":
        return
    cause = f"the image is not active but {image.status}"
    if image.status in _GONE:
        raise errors.ImageNotFound(cause, image=image.id, next_step="choose another image")
    if image.status in _NOT_YET_ACTIVE:
        raise SourceRefused(cause, image=image.id, next_step="try again when its upload is complete")
    raise errors.ImageRejected(cause, image=image.id, next_step="have the image's owner see to it")


class Transfer:
    """The fetching of one image, however often it breaks.

    :param source: where :func:`describe` found it.
    :param image: what :func:`describe` returned.
    :param retries: how many attempts in a row may fail without progress. All passes share the budget.
    :param deadline: epoch seconds.
    :param cancel: looked at before every chunk.
    :param max_size: most bytes to accept when ``image.size`` is unknown. None: no limit.
    :param rate: bytes per second to take at most. None: no limit.
    :param random: uniform in [0, 1), for the back-off's jitter.
    """

    def __init__(
        self,
        source: ImageSource,
        image: model.Image,
        *,
        host: System,
        retries: int = 3,
        deadline: float | None = None,
        cancel: model.CancelToken | None = None,
        max_size: int | None = None,
        rate: int | None = None,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self._source = source
        self._image = image
        self._host = host
        self._limit = max_size if image.size is None else image.size
        self._patience = _Patience(
            image.id, host=host, retries=retries, deadline=deadline, cancel=cancel, random=random
        )
        self._pace = Pace(rate, host=host, check=self._patience.check)
        self._may_resume = source.can_resume(image)
        self._furthest = 0
        self._resumed = False
        self._offset = 0

    @property
    def resumed(self) -> bool:
        """Whether the bytes of the current pass were spliced from more than one attempt."""
        return self._resumed

    @property
    def offset(self) -> int:
        """How many bytes of the current pass were given out."""
        return self._offset

    def grant_clean_pass(self) -> bool:
        """Say whether what looks like a bad image deserves one more pass; call it on a wrong digest.

        A splice of two versions has the digest of neither. So the first wrong digest after a resume is
        not held against the image: True, and the next pass is one attempt from the first byte to the
        last. Otherwise False: the image is bad.
        """
        if not self._resumed:
            return False
        # Nothing is resumed from here on, so this is granted once.
        self._resumed = False
        self._may_resume = False
        self._furthest = 0
        self._patience.forgive()
        LOG.warning("image %s: wrong after a resumed transfer; fetching it once more", self._image.id)
        return True

    def chunks(self) -> Generator[bytes]:
        """Yield the image's bytes in order, from the first to the last: one pass.

        Close the generator (:func:`contextlib.closing`) to let go of the connection early.

        It ends only when the image is complete: exactly ``image.size`` bytes, if that is known.

        :raises StartAgain: iterate anew; what was given out is void.
        :raises ImageRejected: there are more bytes than the image has.
        :raises ImageNotFound: the image is gone.
        :raises SourceError: the source failed too often, or the deadline passed.
        :raises CancelledError: ``cancel`` was set.
        """
        self._offset = 0
        self._resumed = False
        while True:
            reached = self._offset
            failure = None
            try:
                yield from self._attempt()
                return
            except errors.ImageCacheError as error:
                failure = _about(self._image.id, error)
            except Exception as error:
                failure = _foreign(self._image.id, error)
            self._recover(failure, reached)

    def _attempt(self) -> Iterator[bytes]:
        self._patience.check()
        self._host.trace(TracePoint.TRANSFER_OPEN)
        with self._source.open(self._image, self._offset) as stream:
            if self._offset > 0:
                self._resumed = True
            for chunk in stream:
                self._patience.check()
                if self._limit is not None and self._offset + len(chunk) > self._limit:
                    raise self._too_long()
                self._offset += len(chunk)
                yield chunk
                self._pace.took(len(chunk))
                self._host.trace(TracePoint.TRANSFER_CHUNK)
        if self._image.size is not None and self._offset < self._image.size:
            # A clean end of a connection proves nothing: HTTP/1.0 and many proxies end a broken one so.
            raise errors.SourceError(
                f"the data ended after {self._offset} of {self._image.size} bytes", image=self._image.id
            )

    def _recover(self, failure: errors.ImageCacheError, reached: int) -> None:
        """Return if the next attempt goes on at the offset; raise what the caller must know otherwise."""
        if isinstance(failure, StartAgain) or not isinstance(failure, errors.SourceError):
            raise failure
        if isinstance(failure, CannotResume) and reached > 0:
            # The break before it was counted and waited for already.
            self._may_resume = False
            raise StartAgain(failure.cause, image=self._image.id) from failure
        self._forgive_if_progress()
        self._patience.bear(failure)
        if self._offset > 0 and not self._may_resume:
            raise StartAgain(failure.cause, image=self._image.id) from failure

    def _forgive_if_progress(self) -> None:
        # Measured from the furthest byte of any pass: starting again is no progress.
        step = max(_PROGRESS_BYTES, (self._image.size or self._furthest) // _PROGRESS_PART)
        if self._offset >= self._furthest + step:
            self._furthest = self._offset
            self._patience.forgive()

    def _too_long(self) -> errors.ImageCacheError:
        if self.grant_clean_pass():
            return StartAgain("the resumed transfer brought too many bytes", image=self._image.id)
        return errors.ImageRejected(
            f"the source sends more than the {self._limit} bytes the image may have",
            image=self._image.id,
            next_step="have the image uploaded anew",
        )


def _about(image_id: str, error: errors.ImageCacheError) -> errors.ImageCacheError:
    if error.image is None:
        error.image = image_id
    return error


def _foreign(image_id: str, error: Exception) -> errors.SourceError:
    """Translate what a source should have. The text may hold a secret, so only the kind is told."""
    failure = errors.SourceError(f"the source failed with {type(error).__name__}", image=image_id)
    failure.__cause__ = error
    return failure
