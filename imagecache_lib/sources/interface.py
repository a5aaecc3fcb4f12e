# SPDX-License-Identifier: Apache-2.0
"""Where image bytes come from: the interface that every source implements.

A source only asks and reads. Retrying, resuming and bounding what it gives is
done once for all of them, in :mod:`imagecache_lib.sources.transfer`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

from imagecache_lib import errors, model

T = TypeVar("T")


class CannotResume(errors.SourceError):
    """The source cannot continue from the offset asked for: start again from the first byte.

    Raised by :meth:`ImageSource.open` for an offset above 0 when the server ignores ranges, or when
    it says that the content is no longer what :meth:`ImageSource.describe` saw.
    """


class SourceRefused(errors.SourceError):
    """The source answered, and would answer the same if it were asked again at once.

    Its certificate does not verify, the token is not accepted, the image is not active yet. It is not
    retried within a call.
    """


class SourceBusy(errors.SourceError):
    """The source asks to be left alone for a while.

    :param retry_after: seconds, as the server's Retry-After said it. None: it did not say.
    """

    def __init__(self, cause: str, *, retry_after: float | None = None, **known: str | None) -> None:
        super().__init__(cause, **known)
        self.retry_after = retry_after


class CannotCopy(SourceRefused):
    """The source will not copy the image into the store asked for; the cause says why."""


class NotPermitted(errors.ImageNotFound):
    """The image is there, and this caller may not have it. Fallback sources are not asked for it."""


class ImageSource(abc.ABC):
    """A place that has images. Safe to share between threads."""

    @abc.abstractmethod
    def describe(self, image_id: str) -> model.Image:
        """Return what the source knows of the image, without its data.

        The result says ``status`` as the source does; the caller refuses what is not ``active``.

        :raises ImageNotFound: no such image, or this caller may not see it.
        :raises SourceError: the source failed; it may work later.
        """

    @abc.abstractmethod
    def open(self, image: model.Image, offset: int = 0) -> AbstractContextManager[Iterator[bytes]]:
        """Open the image's data from a byte offset; the context yields an iterator of chunks.

        One attempt: no retries in here. Chunks have any size above 0 (about 1 MiB is best). The iterator
        ends where the data ends; a source that can tell that the data broke off raises instead.

        :param image: as :meth:`describe` returned it.
        :param offset: first byte wanted.
        :raises ImageNotFound: the image or its data is gone.
        :raises CannotResume: only for ``offset > 0``.
        :raises SourceError: the source failed; raised while iterating too.
        """

    def known_digest(self, image_id: str) -> model.Digest | None:
        """Return the digest that the image's data must have, if the source knows it without asking anybody.

        A base in the cache that was made from other data then does not serve. It is called for each request,
        a hit included. The default is right for sources that would have to ask a server.
        """
        return None

    def vouches_for_digest(self, image: model.Image) -> bool:
        """Whether nobody but the source itself can have set the digest in the image's description.

        Only then may a base of another image that has this digest serve without a transfer: else whoever
        states the digest of an image would be given it. The default is to transfer it.
        """
        return False

    def copy_to_store(self, image: model.Image, store: str) -> None:
        """Ask the image service to copy the image into another of its stores, and do not wait for it.

        :meth:`describe` tells when it is there: ``Image.stores``. The default is right for sources without
        stores.

        :raises CannotCopy: the service does not do that, does not know the store, or not for this caller.
        :raises SourceError: the source failed; it may work later.
        """
        raise CannotCopy(
            "its source has no stores to copy it between", image=image.id, next_step="use an image service"
        )

    def can_resume(self, image: model.Image) -> bool:
        """Whether a transfer of this image that broke may go on from its offset.

        Only if a splice of two versions would be noticed: by a digest, or by a validator that the
        source sends along (a strong ETag in If-Range).
        """
        return image.digest is not None


def entry_of(table: Mapping[str, T], image_id: str) -> T:
    """Return what a source's table of images has under an id.

    :raises ImageNotFound: nothing.
    """
    try:
        return table[image_id]
    except KeyError:
        raise errors.ImageNotFound(
            "the source's table does not list it",
            image=image_id,
            next_step="choose an image that the source is configured with",
        ) from None
