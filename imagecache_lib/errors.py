# SPDX-License-Identifier: Apache-2.0
"""Everything that the public API raises: one tree, divided by who must act.

========================  =================================================
error                     who acts
========================  =================================================
``ImageNotFound``         the user: no such image, or no right to see it
``ImageRejected``         the image's owner: the image is bad; never retry
``SourceError``           the caller: retry later
``NoSpaceError``          the operator: make room
``DiskTooSmallError``     the user: choose a larger disk
``DiskExistsError``       the driver: the target is taken
``LockTimeoutError``      the caller: retry later
``CancelledError``        none needed: the caller cancelled the call
``LeaseLostError``        the driver: remove what it made, then call again
``CacheEntryError``       the operator: move away what is no base image
``BackendError``          the operator: the storage failed
``BaseInUseError``        none needed: ask again when nothing needs the base
``ConfigError``           the operator: the set-up is wrong
========================  =================================================
"""

from __future__ import annotations

#: How many characters of a value stand in a message.
_SHOWN = 100


def shown(value: object) -> str:
    """Return how a message shows a value that is not what it should be, whatever it is."""
    try:
        return repr(value)[:_SHOWN]
    except Exception:
        # Its own method failed; and Python writes no integer of more than 4,300 digits.
        return f"a value of the type {type(value).__name__}"


class ImageCacheError(Exception):
    """Base of all errors of this library.

    :param cause: what is wrong, one clause without a final stop.
    :param image: id of the image it is about.
    :param path: file or rbd image it is about.
    :param next_step: what the reader should do, one clause.

    The four are attributes too, so that callers never parse a message.
    """

    def __init__(
        self,
        cause: str,
        *,
        image: str | None = None,
        path: str | None = None,
        next_step: str | None = None,
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.image = image
        self.path = path
        self.next_step = next_step

    def __str__(self) -> str:
        message = self.cause
        if self.image is not None:
            message = f"image {self.image}: {message}"
        if self.path is not None and self.path not in message:
            message = f"{message} ({self.path})"
        if self.next_step is not None:
            message = f"{message}; {self.next_step}"
        return message

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive Exception's own pickling, and
        # drivers pass errors between processes.
        return (_rebuild, (type(self), self.cause, dict(self.__dict__)))


def _rebuild(kind: type[ImageCacheError], cause: str, state: dict[str, object]) -> ImageCacheError:
    error = kind(cause)
    error.__dict__.update(state)
    return error


class ImageNotFound(ImageCacheError):
    """The source has no such image, or does not let this caller see it."""


class ImageRejected(ImageCacheError):
    """The image is bad: wrong digest or length, unsafe or mislabelled content.

    Asking again gives the same answer until its owner uploads it anew.
    """


class SourceError(ImageCacheError):
    """The source failed in a way that may pass: network, server, not ready."""


class NoSpaceError(ImageCacheError):
    """There is no room for the image or the disk."""


class DiskTooSmallError(ImageCacheError):
    """The disk asked for is smaller than the image's virtual size, or than the disk that it is to be.

    :param size: bytes that were asked for.
    :param virtual_size: bytes that the image or the disk has.

    Both are attributes too, each None if it is not known.
    """

    def __init__(
        self,
        cause: str,
        *,
        size: int | None = None,
        virtual_size: int | None = None,
        **known: str | None,
    ) -> None:
        super().__init__(cause, **known)
        self.size = size
        self.virtual_size = virtual_size


class DiskExistsError(ImageCacheError):
    """The target exists, and this library never overwrites."""


class LockTimeoutError(ImageCacheError):
    """The request's deadline passed, or a lock that is needed is held."""


class CancelledError(ImageCacheError):
    """The request's ``cancel`` was set."""


class LeaseLostError(ImageCacheError):
    """A leased base image left the cache: what was made from it is suspect."""


class CacheEntryError(ImageCacheError):
    """A cache entry is not something this library made: a link, a directory, a FIFO."""


class BackendError(ImageCacheError):
    """The storage behind a disk failed or cannot do what was asked."""


class BaseInUseError(BackendError):
    """Something needs the base image, or that cannot be ruled out: it stays as it is. Nothing failed."""


class ConfigError(ImageCacheError):
    """The configuration or the host's set-up cannot work."""
