# SPDX-License-Identifier: Apache-2.0
"""The sources of one image: which one gives it, and which one is asked when that one fails."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from imagecache_lib import errors, model
from imagecache_lib.sources import checked, connection
from imagecache_lib.sources.interface import ImageSource, NotPermitted, SourceRefused
from imagecache_lib.sources.retry import DeadlinePassed, SourceBudget
from imagecache_lib.system.host import System

LOG = logging.getLogger(__name__)

#: Glance's image statuses that end in ``active`` by themselves.
_NOT_YET_ACTIVE = frozenset({"queued", "saving", "uploading", "importing"})
_GONE = frozenset({"deleted", "pending_delete"})

#: Most characters of a source's address in a message.
_SHOWN = 300


class _OtherData(SourceRefused):
    """A source states another digest than is demanded."""


@dataclasses.dataclass(frozen=True)
class _Failure:
    """A source that did not give the image.

    :param is_of_data: it has the image, and other data or a part of it only.
    """

    source: ImageSource
    error: errors.ImageCacheError
    is_of_data: bool


class Locations:
    """The sources that one call may have an image from, each of which is asked once.

    The first one's word counts. The others are fallbacks: they are asked in turn when the image is gone from
    it, or when it has other data than is demanded. They are not asked when it is there and this caller may
    not have it, nor when the first source fails. A fallback that fails in whichever way is passed over.

    :ivar imposes_digest: whether the digest in the description is what is demanded, and nothing that the
        source which gives the image says.
    :param sources: the first one, and the fallbacks.
    :param demanded: the digest that the data must have, or None if that is left to the source.
    :param retries: how often each source is asked again.
    :param deadline: epoch seconds.
    """

    def __init__(
        self,
        sources: Sequence[ImageSource],
        image_id: str,
        *,
        host: System,
        demanded: model.Digest | None = None,
        retries: int = 3,
        deadline: float | None = None,
        cancel: model.CancelToken | None = None,
    ) -> None:
        self._sources = sources
        self._image_id = image_id
        self._host = host
        self._demanded = demanded
        self._retries = retries
        self._deadline = deadline
        self._cancel = cancel
        self._turn = 0
        self._failures: list[_Failure] = []
        self._found: tuple[ImageSource, model.Image] | None = None
        self.imposes_digest = False

    def describe(self) -> tuple[ImageSource, model.Image]:
        """Return the source that has the image, and what it says of it. The image is active.

        A digest that is demanded takes the place of one by another algorithm, or of none.

        :raises ImageNotFound: no source has it.
        :raises ImageRejected: it can never be fetched as it is: deactivated, killed.
        :raises SourceRefused: what a source has is other data than is demanded.
        :raises SourceError: the first source failed, the deadline passed, or the image is not active yet.
        :raises CancelledError: ``cancel`` was set.
        """
        while self._found is None:
            source = self._sources[self._turn]
            try:
                image, self.imposes_digest = self._ask(source), False
                if self._demanded is not None:
                    image = self._as_demanded(image, self._demanded)
                self._found = source, image
            except (errors.ImageNotFound, errors.SourceError) as error:
                self._go_on(error, is_of_data=isinstance(error, _OtherData))
        return self._found

    def pass_over(self, error: errors.ImageCacheError) -> None:
        """Note that the data could not be had from the source that has the image, and turn to the next one.

        :param error: why.
        :raises ImageCacheError: that error, if no other source may be asked, or one that names each source.
        """
        assert self._found is not None
        self._found = None
        self._go_on(error, is_of_data=not isinstance(error, errors.ImageNotFound))

    def _go_on(self, error: errors.ImageCacheError, *, is_of_data: bool) -> None:
        if isinstance(error, DeadlinePassed):
            raise error
        gone = isinstance(error, errors.ImageNotFound) and not isinstance(error, NotPermitted)
        if self._turn == 0 and not gone and not isinstance(error, _OtherData):
            raise error
        source = self._sources[self._turn]
        self._failures.append(_Failure(source, error, is_of_data))
        self._turn += 1
        if self._turn == len(self._sources):
            failed = self._failed()
            self._turn, self._failures = 0, []  # whoever asks again asks all of them
            raise failed
        LOG.warning("%s does not give the image, and another source is asked: %s", self._shown(source), error)

    def _ask(self, source: ImageSource) -> model.Image:
        budget = SourceBudget(
            self._image_id,
            host=self._host,
            retries=self._retries,
            deadline=self._deadline,
            cancel=self._cancel,
        )
        while True:
            budget.check()
            try:
                with connection.waiting(budget):
                    image = checked.describe(source, self._image_id)
            except errors.SourceError as error:
                budget.spend(error)
            else:
                if image.status != "active":
                    raise _inactive(image)
                return image

    def _as_demanded(self, image: model.Image, demanded: model.Digest) -> model.Image:
        if image.converted_from is not None:
            # Even if the conversion has this digest: a record of it states none.
            raise errors.ImageNotFound(
                f"all that is left of it is a conversion, which nothing shows to be of data whose"
                f" {demanded.algorithm} is {demanded.value}",
                image=self._image_id,
                next_step="upload it anew",
            )
        if image.digest == demanded:
            return image
        if image.digest is not None and image.digest.algorithm == demanded.algorithm:
            raise _OtherData(
                f"its {demanded.algorithm} is {image.digest.value} by its source, and {demanded.value} is"
                " demanded",
                image=self._image_id,
                next_step="correct the digest where it is stated, or choose another image",
            )
        self.imposes_digest = True
        return dataclasses.replace(image, digest=demanded)

    def _failed(self) -> errors.ImageCacheError:
        """Return the error to raise when no source gave the image. It names each one if there are several.

        That a fallback could not be asked changes nothing of the first source's answer, unless another one
        has the image: then it may yet be had.
        """
        failures = self._failures
        if len(failures) == 1:
            return failures[0].error
        kind: type[errors.ImageCacheError] = errors.ImageNotFound
        if any(each.is_of_data for each in failures):
            found = [each.error for each in failures]
            if any(_may_pass(error) for error in found):
                kind = errors.SourceError
            elif any(isinstance(error, SourceRefused) for error in found):
                kind = SourceRefused
            elif any(isinstance(error, errors.ImageRejected) for error in found):
                kind = errors.ImageRejected
        first = next(each.error for each in failures if isinstance(each.error, kind))
        told = "; ".join(f"{self._shown(each.source)}: {each.error.cause}" for each in failures)
        failure = kind(
            f"none of its {len(failures)} sources gives it: {told}",
            image=self._image_id,
            next_step=first.next_step,
        )
        failure.__cause__ = first
        return failure

    def _shown(self, source: ImageSource) -> str:
        """Return what messages call a source: its class, and where it reads the image if it tells that."""
        # Behind a question mark is what stands for a query.
        where = checked.origin(source, self._image_id).partition("?")[0]
        return f"{type(source).__name__} {where}".rstrip()[:_SHOWN]


def _may_pass(error: errors.ImageCacheError) -> bool:
    return isinstance(error, errors.SourceError) and not isinstance(error, SourceRefused)


def _inactive(image: model.Image) -> errors.ImageCacheError:
    cause = f"the image is not active but {image.status}"
    if image.status in _GONE:
        return errors.ImageNotFound(cause, image=image.id, next_step="choose another image")
    if image.status in _NOT_YET_ACTIVE:
        return SourceRefused(cause, image=image.id, next_step="try again when its upload is complete")
    return errors.ImageRejected(cause, image=image.id, next_step="have the image's owner see to it")
