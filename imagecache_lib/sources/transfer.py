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

import contextlib
import dataclasses
import logging
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

from imagecache_lib import dates, errors, model
from imagecache_lib.sources import answers, checked, connection, small_chunks
from imagecache_lib.sources.interface import CannotResume, ImageSource
from imagecache_lib.sources.locations import Locations
from imagecache_lib.sources.retry import SourceBudget
from imagecache_lib.system.host import System
from imagecache_lib.system.rate import Pace, timely
from imagecache_lib.system.trace import TracePoint

LOG = logging.getLogger(__name__)

#: A failed attempt does not count when it brought new bytes, at least this many and this part of the image.
#: The part bounds the number of attempts for an image of any size.
_PROGRESS_BYTES = 64 * 2**10
_PROGRESS_PART = 256


def absurd(size: int, most: int, image_id: str) -> errors.ImageRejected:
    """Return the error about a length that no image may have.

    :param size: length of the image's data in bytes, as its source says.
    :param most: bytes that an image may have.
    """
    has, may_have = dates.sizes(size, most)
    return errors.ImageRejected(
        f"its source says that it has {has}, which is absurd: a disk has {may_have} at most",
        image=image_id,
        next_step="find out where the source has that from",
    )


def _bytes(size: int | None) -> str:
    return "no length" if size is None else f"{size} bytes"


class StartAgain(errors.SourceError):
    """The transfer broke and cannot resume: the caller discards the bytes and iterates anew."""


class _OtherLength(errors.SourceError):
    """Each answer tells another length. What the caller prepared is wrong, and the budget is drawn on."""


def describe(
    source: ImageSource,
    image_id: str,
    *,
    host: System,
    fallbacks: Sequence[ImageSource] = (),
    retries: int = 3,
    deadline: float | None = None,
    cancel: model.CancelToken | None = None,
) -> tuple[ImageSource, model.Image]:
    """Return the first source that has the image, and what it says of it. The image is active.

    :param fallbacks: asked in turn as :class:`~imagecache_lib.sources.locations.Locations` says.
    :param retries: how often each source is asked again.
    :param deadline: epoch seconds.
    :raises: as :meth:`Locations.describe`.
    """
    places = Locations(
        (source, *fallbacks), image_id, host=host, retries=retries, deadline=deadline, cancel=cancel
    )
    return places.describe()


class Kept(Protocol):
    """What an earlier transfer of the same data left."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the first bytes of the data, in order."""


class Transfer:
    """The fetching of one image, however often it breaks.

    :ivar kept: number of bytes of the current pass that no source was asked for.
    :ivar image: the description, as the answer with the data corrected it. It may be another after
        :class:`StartAgain`.
    :ivar sure_size: length of the data in bytes, or None as long as it is not known, or told as a hint only.
    :param source: where :func:`describe` found it.
    :param image: what :func:`describe` returned.
    :param retries: how many attempts in a row may fail without progress. All passes share the budget.
    :param deadline: epoch seconds.
    :param cancel: looked at before every chunk.
    :param max_size: most bytes to accept when ``image.size`` is unknown, or None for no limit.
    :param rate: bytes per second to take at most, or None for no limit.
    :param min_rate: bytes per second that must come on average of a minute of waiting, or 0 for any number.
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
        min_rate: int = 0,
    ) -> None:
        self._source = source
        self.image = image
        self._host = host
        self.sure_size = answers.sure_size(image)
        self._max_size = max_size
        self._limit = max_size if image.size is None else image.size
        self._budget = SourceBudget(image.id, host=host, retries=retries, deadline=deadline, cancel=cancel)
        self._pace = Pace(rate, self._budget)
        self._min_rate = min_rate
        self._resume_refused = False
        self._may_resume = checked.can_resume(source, image)
        self._furthest = 0
        self._resumed = False
        self._answered = False
        self._corrected = False
        self._stream: checked.Opened | None = None
        self._offset = 0
        self.kept = 0

    @property
    def resumed(self) -> bool:
        """Whether the bytes of the current pass were spliced from more than one attempt."""
        return self._resumed

    @property
    def offset(self) -> int:
        """Number of bytes of the current pass that were yielded."""
        return self._offset

    def grant_clean_pass(self) -> bool:
        """Return whether what looks like a bad image deserves one more pass; call it on a wrong digest.

        A splice of two versions has the digest of neither. So the first wrong digest after a resume is
        not held against the image, and the next pass is one attempt from the first byte to the last. Nor is
        one that the answer itself explains: see ``doubt`` in :meth:`ImageSource.open`.

        :raises SourceError: the answer explains it, and the retries are used up or would not help.
        :raises CancelledError: ``cancel`` was set.
        """
        if self._resumed:
            # Nothing is resumed from here on, so this is granted once.
            self._resumed = False
            self._stop_resuming()
            self._furthest = 0
            self._budget.reset()
            LOG.warning("image %s: wrong after a resumed transfer; fetching it once more", self.image.id)
            return True
        if self.doubt_length():
            return True
        stream, self._stream = self._stream, None
        doubt = stream.doubt if stream is not None else None
        if doubt is None:
            return False
        self._budget.spend(doubt)
        return True

    def doubt_length(self) -> bool:
        """Return whether what is wrong with the image may be that its length is only a hint; call it once.

        The next pass is without a length then. What was prepared for a wrong one finds fault with good data.
        """
        stream = self._stream
        if stream is None or not self._is_only_hinted(stream) or self._offset == self.image.size:
            return False
        self._stream = None
        self._drop_hint()
        return True

    def chunks(self, kept: Kept | None = None) -> Generator[bytes]:
        """Yield the image's bytes in order, from the first to the last: one pass.

        Close the generator (:func:`contextlib.closing`) to let go of the connection early.

        It ends only when the image is complete: exactly ``image.size`` bytes, if that is known.

        :param kept: the first bytes, as an earlier transfer of the same data left them, or None for nothing.
            The source is asked for the bytes behind them.
        :raises StartAgain: iterate anew; what was given out is void.
        :raises ImageRejected: there are more bytes than the image has.
        :raises ImageNotFound: the image is gone.
        :raises SourceError: the source failed too often, or the deadline passed.
        :raises CancelledError: ``cancel`` was set.
        """
        self._offset = self.kept = 0
        self._resumed = False
        self._stream = None
        if kept is not None and self.image.size is not None:
            yield from self._pass_over(kept, self.image.size)
            if self._offset == self.image.size:
                return
        while True:
            reached = self._offset
            try:
                yield from self._attempt()
                return
            except errors.ImageCacheError as error:
                failure = error
            self._recover(failure, reached)

    def _pass_over(self, kept: Kept, size: int) -> Generator[bytes]:
        """Yield what an earlier transfer left, as fast as the disk gives it: no source is asked for that."""
        for chunk in kept.chunks():
            self._budget.check()
            if self._offset + len(chunk) > size:
                return
            self._offset += len(chunk)
            self.kept = self._offset
            self._resumed = True
            yield chunk

    def _attempt(self) -> Generator[bytes]:
        self._budget.check()
        self._host.trace(TracePoint.TRANSFER_OPEN)
        with contextlib.ExitStack() as stack:
            with connection.waiting(self._budget):
                stream = stack.enter_context(checked.Opened(self._source, self.image, self._offset))
            self._stream = stream
            if self._offset > 0:
                self._resumed = True
            elif stream.image is not self.image:
                self._take_correction(stream.image)
            self.sure_size = None if stream.hinted else self.image.size
            for chunk in small_chunks.joined(timely(stream, self._min_rate, self._host)):
                self._budget.check()
                if not chunk:
                    continue
                if self._limit is not None and self._offset + len(chunk) > self._limit:
                    raise self._too_long()
                self._offset += len(chunk)
                yield chunk
                self._pace.took(len(chunk))
                self._host.trace(TracePoint.TRANSFER_CHUNK)
            # Within, so that a source of several servers turns to another one.
            if self.image.size is not None and self._offset < self.image.size:
                if self._is_only_hinted(stream) and self._offset:  # no data at all is no image of any length
                    raise self._drop_hint()
                # A clean end of a connection proves nothing: HTTP/1.0 and many proxies end a broken one so.
                raise errors.SourceError(
                    f"the data ended after {self._offset} of {self.image.size} bytes", image=self.image.id
                )

    def _take_correction(self, told: model.Image) -> None:
        """Go on with what the answer with the data says of it: its validator and its length.

        What else was described stays: what is done with the data follows from that.

        The first answer settles whether there is a length. Servers behind one name may differ in whether they
        tell it: one that does not takes nothing away, and one that does adds nothing to what was begun
        without it.

        :raises StartAgain: the length is another, so that what the caller prepared is wrong.
        :raises SourceError: the length changed for the second time, or the digest is another.
        :raises ImageRejected: the length is more than any image may have.
        """
        described, digest = self.image, self.image.digest
        if None not in (told.digest, digest) and told.digest != digest:
            raise errors.SourceError(
                f"its digest is {told.digest} by the answer with its data, and was {digest} before",
                image=described.id,
                next_step="ask again: the image was replaced meanwhile",
            )
        size = told.size
        if self._answered and None in (size, described.size):
            size = described.size
        self._answered = True
        self.image = dataclasses.replace(described, size=size, properties=told.properties)
        if size != described.size:
            cause = f"it has {_bytes(size)} by the answer with its data, and {_bytes(described.size)} before"
            most = self._max_size
            if size is not None and most is not None and size > most:
                raise absurd(size, most, described.id)
            self._limit = most if size is None else size
            if self._corrected:
                raise _OtherLength(cause, image=described.id)
            self._corrected = True
            raise StartAgain(cause, image=described.id)
        self._may_resume = not self._resume_refused and checked.can_resume(self._source, self.image)

    def _is_only_hinted(self, stream: checked.Opened) -> bool:
        return stream.hinted and self.image.size is not None

    def _drop_hint(self) -> StartAgain:
        """Go on without a length, since what arrives shows that the hint is wrong. Returns what to raise."""
        hint = self.image.size
        self.image = dataclasses.replace(self.image, size=None)
        self._limit = self._max_size
        return StartAgain(
            f"it has not the {hint} bytes that were told before its data came", image=self.image.id
        )

    def _stop_resuming(self) -> None:
        self._resume_refused = True
        self._may_resume = False

    def _recover(self, failure: errors.ImageCacheError, reached: int) -> None:
        """Return if the next attempt goes on at the offset; raise what the caller must know otherwise."""
        if isinstance(failure, StartAgain) or not isinstance(failure, errors.SourceError):
            raise failure
        if isinstance(failure, CannotResume) and reached > 0:
            # The break before it was counted and waited for already.
            self._stop_resuming()
            raise StartAgain(failure.cause, image=self.image.id) from failure
        self._reset_if_progress()
        self._budget.spend(failure)
        if isinstance(failure, _OtherLength) or (self._offset > 0 and not self._may_resume):
            raise StartAgain(failure.cause, image=self.image.id) from failure

    def _reset_if_progress(self) -> None:
        # Measured from the furthest byte of any pass: starting again is no progress.
        step = max(_PROGRESS_BYTES, (self.image.size or self._furthest) // _PROGRESS_PART)
        if self._offset >= self._furthest + step:
            self._furthest = self._offset
            self._budget.reset()

    def _too_long(self) -> errors.ImageCacheError:
        size = self.image.size
        if self._stream is not None and self._is_only_hinted(self._stream):
            return self._drop_hint()
        if self._resumed and self.grant_clean_pass():
            return StartAgain("the resumed transfer brought too many bytes", image=self.image.id)
        doubt = self._stream.doubt if self._stream is not None else None
        if doubt is None and size is not None and self.image.digest is None:
            # Nothing but the source itself says how long the image is, and it contradicts itself.
            doubt = errors.SourceError(
                f"the source sends more than the {size} bytes that it told", image=self.image.id
            )
        if doubt is not None:
            # Going on at the offset would only bring the rest of what is too much.
            self._may_resume = False
            return doubt
        return errors.ImageRejected(
            f"the source sends more than the {self._limit} bytes the image may have",
            image=self.image.id,
            next_step="have the image uploaded anew",
        )
