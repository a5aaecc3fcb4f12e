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

    The image is not active yet, or what is sent is no image. It is not retried within a call.
    """


class SourceMisconfigured(SourceRefused):
    """What was configured of the source cannot work: its address, the credentials, or whom to trust.

    Whoever configured it must act. Asking again, or later, gives the same answer.
    """


class Unauthorized(SourceMisconfigured):
    """The source does not accept the token or the credentials: it answers 401 or 407."""


class SourceBusy(errors.SourceError):
    """The source asks to be left alone for a while.

    :param retry_after: seconds that the server's Retry-After states, or None if the server stated none.
    :param retry_at: epoch seconds that it states instead, where this host's clock has to tell how long that
        is; or None.
    """

    def __init__(
        self,
        cause: str,
        *,
        retry_after: float | None = None,
        retry_at: float | None = None,
        **known: str | None,
    ) -> None:
        super().__init__(cause, **known)
        self.retry_after = retry_after
        self.retry_at = retry_at


class CannotCopy(SourceRefused):
    """The source will not copy the image into the store asked for; the cause says why."""


class NotPermitted(errors.ImageNotFound):
    """The image is there, and this caller may not have it. Fallback sources are not asked for it."""


class ImageSource(abc.ABC):
    """A place that has images. Safe to share between threads."""

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> ImageSource:
        """Return a source made from options as a command line or a configuration file has them.

        The default calls the class with the options as keyword arguments. A source whose arguments are not
        text overrides it.

        :raises ConfigError: an option is missing, unknown or wrong.
        """
        try:
            return cls(**options)
        except TypeError as error:
            raise errors.ConfigError(
                f"a {cls.__name__} cannot be made of these options: {error}", next_step="correct the options"
            ) from error

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
        ends where the data ends; a source that can tell that the data broke off raises instead. A chunk is
        :class:`bytes`. Another object with the buffer protocol is copied when it is taken, so that a source
        may yield one buffer again and again; text, numbers and lists are refused.

        Whether the caller still waits (deadline, cancelling) and whether enough comes (``min_transfer_rate``)
        is looked at between two chunks, and not while the source works on one: nothing can end a call from
        outside and leave no thread behind. So each step must end by itself, by a timeout of the source's own.
        A source that has nothing for longer may yield an empty chunk now and then, to give the caller its
        turn; more than 10,000 in a row count as a defect. :meth:`describe` and opening must end as well.

        The iterator may have three attributes:

        ``image``
            An :class:`Image`, read at offset 0: the description as the answer with the data corrects it. Its
            length and its properties, such as a validator, take the place of those described; another digest
            than the described one is an error. :meth:`open` is given it when the transfer resumes.
        ``doubt``
            A :class:`SourceError` or None, read when the data turns out not to be the image's: the error to
            raise instead of blaming the image. An iterator without it is doubted if the image has a digest
            and no size, since what it gave may have been cut off.
        ``hinted``
            True if the described length is a hint, and the answer with the data neither confirms nor corrects
            it. What arrives decides then: data of another length is fetched once more, without a length.

        An :class:`OSError` counts as a :class:`SourceError`. Every other exception that is not one of
        :mod:`imagecache_lib.errors` is taken for a defect of the source, and the call is not retried.

        :param image: as :meth:`describe` returned it, or as an earlier open corrected it.
        :param offset: first byte wanted.
        :raises ImageNotFound: the image or its data is gone.
        :raises CannotResume: only for ``offset > 0``.
        :raises SourceError: the source failed; raised while iterating too.
        """

    def origin(self, image_id: str) -> str:
        """Return where the source reads an image's data, without asking a server, or "" if it cannot tell.

        Two sources that return the same text read the same data, whoever asks: one then waits for the other,
        and shares its failure if the data is refused for good. A caller whose source reads elsewhere does
        neither. Leave secrets out: messages show it up to a question mark. The default cannot tell.
        """
        return ""

    def known_digest(self, image_id: str) -> model.Digest | None:
        """Return the digest that the image's data must have, if the source knows it without asking a server.

        A base in the cache that was made from other data then does not serve. It is called for each request,
        a hit included. The default returns None, which is right for sources that would have to ask a server.
        """
        return None

    def vouches_for_digest(self, image: model.Image) -> bool:
        """Whether only the source itself, and no user, can have set the digest in the image's description.

        Only then may a base of another image that has this digest serve without a transfer: else a user who
        states the digest of another's image would be given its content. The default is False: the image is
        transferred.
        """
        return False

    def copy_to_store(self, image: model.Image, store: str) -> None:
        """Ask the image service to copy the image into another of its stores, and do not wait for it.

        :meth:`describe` tells when it is there: ``Image.stores``. The default is right for sources without
        stores.

        :raises CannotCopy: the service cannot copy, does not know the store, or denies it to this caller.
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


def check_compression(compression: str | None) -> None:
    """Refuse a compression that is not one of :data:`imagecache_lib.model.COMPRESSIONS`.

    :raises ConfigError: the compression is none of these.
    """
    if compression is not None and compression not in model.COMPRESSIONS:
        raise errors.ConfigError(
            f"an image's compression is {compression!r}, which is not known here",
            next_step=f"use one of {', '.join(model.COMPRESSIONS)}",
        )


def require_options(name: str, options: Mapping[str, str], *known: str, needed: str) -> None:
    """Refuse options that a source does not have.

    :param name: the source's, for the message.
    :param needed: the option that it cannot do without.
    :raises ConfigError: one is unknown, or the needed one is missing.
    """
    for option in options:
        if option not in known:
            raise errors.ConfigError(
                f"the source {name} has no option {option!r}", next_step=f"use {', '.join(known)}"
            )
    if needed not in options:
        raise errors.ConfigError(
            f"the source {name} lacks the option {needed!r}", next_step=f"give it as {needed}=VALUE"
        )


def flag(name: str, options: Mapping[str, str], option: str) -> bool:
    """Return whether an option that is ``yes`` or ``no`` says yes. Without it: no.

    :param name: the source's, for the message.
    :raises ConfigError: it is neither.
    """
    value = options.get(option, "no")
    if value not in ("yes", "no"):
        raise errors.ConfigError(
            f"the source {name} has {value!r} as {option!r}",
            next_step=f"give it as {option}=yes or {option}=no",
        )
    return value == "yes"


def entry_of(table: Mapping[str, T], image_id: str) -> T:
    """Return what a source's table of images has under an id.

    :raises ImageNotFound: the table does not have the id.
    """
    try:
        return table[image_id]
    except KeyError:
        raise errors.ImageNotFound(
            "the source's table does not list it",
            image=image_id,
            next_step="choose an image that the source is configured with",
        ) from None
