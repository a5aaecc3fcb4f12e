# SPDX-License-Identifier: Apache-2.0
"""The edge between a source, which a third party may have written, and the rest of the library.

What a source returns is checked by type, what it raises is translated, and a chunk becomes :class:`bytes`
once: behind this module a chunk is kept, hashed and written at different times, so it must not change
meanwhile.

:class:`OSError`, which every network library raises, and :class:`MemoryError` may pass. Any other
exception that is not one of :mod:`imagecache_lib.errors` is a defect of the source, which another attempt
would only repeat: :class:`SourceRefused`. :class:`KeyboardInterrupt`, :class:`SystemExit` and what else ends
a thread from outside pass through unchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from imagecache_lib import errors, model
from imagecache_lib.sources.interface import ImageSource, SourceRefused

#: Chunks without a byte that are borne in a row. More are a source that never gets on.
MOST_EMPTY_CHUNKS = 10_000

#: What only a driver's own disks and leases can end with.
_NO_SOURCES = (errors.DiskExistsError, errors.DiskTooSmallError, errors.LeaseLostError)
_UNTOLD = object()
_TEXT = (str,)
_OPTIONAL_TEXT = (str, type(None))
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "disk_format": _OPTIONAL_TEXT,
    "digest": (model.Digest, type(None)),
    "container_format": _OPTIONAL_TEXT,
    "status": _TEXT,
    "locations": (tuple,),
    "stores": (tuple,),
    "converted_from": _OPTIONAL_TEXT,
    "compression": _OPTIONAL_TEXT,
    "properties": (Mapping,),
}
#: Fields that hold one word each, and the most characters that one may have.
_WORDS = ("disk_format", "container_format", "status", "converted_from", "compression")
_LONGEST_WORD = 255


def describe(source: ImageSource, image_id: str) -> model.Image:
    """Ask a source what it knows of an image, and return the checked description.

    :raises ImageCacheError: as :meth:`ImageSource.describe`; it names the image.
    :raises SourceRefused: the source failed in a way of its own, or what it returned is no description of
        this image.
    """
    with Guard(image_id):
        return checked_image(source.describe(image_id), image_id)


def origin(source: ImageSource, image_id: str) -> str:
    """Return where a source reads an image's data, or "" if the source does not tell."""
    try:
        told = source.origin(image_id)
    except Exception:  # whatever it raises, it does not tell
        return ""
    return told if isinstance(told, str) else ""


def can_resume(source: ImageSource, image: model.Image) -> bool:
    """Return whether a broken transfer may go on from its offset, as the source says.

    :raises SourceRefused: the source failed in a way of its own.
    """
    with Guard(image.id):
        return bool(source.can_resume(image))


def known_digest(source: ImageSource, image_id: str) -> model.Digest | None:
    """Return the digest that an image's data must have, as far as the source knows it without asking.

    :raises ImageCacheError: what the source raises.
    :raises SourceRefused: the source failed in a way of its own, or what it returned is no digest.
    """
    try:
        digest = source.known_digest(image_id)
    except BaseException as error:
        _translate(error, image_id)
        raise
    if digest is not None:
        _check_digest(digest, image_id)
    return digest


def vouches_for_digest(source: ImageSource, image: model.Image) -> bool:
    """Return whether only the source itself can have set the digest of an image. It must say exactly that.

    :raises SourceRefused: the source failed in a way of its own.
    """
    with Guard(image.id):
        return source.vouches_for_digest(image) is True


def copy_to_store(source: ImageSource, image: model.Image, store: str) -> None:
    """Ask a source to copy an image into one of its stores, as :meth:`ImageSource.copy_to_store`.

    :raises SourceError: the source cannot, or failed.
    """
    with Guard(image.id):
        source.copy_to_store(image, store)


class Opened:
    """A source's stream of one image. A context manager; iterate it within.

    :param source: to be asked for the data.
    :param image: as described.
    :param offset: first byte wanted.
    """

    def __init__(self, source: ImageSource, image: model.Image, offset: int) -> None:
        self._source = source
        self._image = image
        self._offset = offset
        self._context: contextlib.AbstractContextManager[Any]
        self._stream: Iterator[object]
        #: The description as the answer corrects it (see :meth:`ImageSource.open`), else that given.
        self.image = image
        self._ended = False

    def __enter__(self) -> Opened:
        with Guard(self._image.id):
            context = self._source.open(self._image, self._offset)
            if not isinstance(context, contextlib.AbstractContextManager):
                raise broken_contract(
                    self._image.id, f"open() returned a {_kind(context)}, which is no context manager"
                )
            self._context = context
            entered = context.__enter__()
            try:
                self._stream = iter(entered)
                corrected = getattr(self._stream, "image", None)
                if isinstance(corrected, model.Image):
                    self.image = checked_image(corrected, self._image.id)
            except BaseException as error:
                context.__exit__(type(error), error, error.__traceback__)
                raise
        return self

    @property
    def doubt(self) -> errors.SourceError | None:
        """The error to raise, instead of blaming the image, for wrong data: see :meth:`ImageSource.open`."""
        with Guard(self._image.id):
            doubt = getattr(self._stream, "doubt", _UNTOLD)
        if doubt is None or isinstance(doubt, errors.SourceError):
            return doubt
        if self._ended and self.image.size is None and self.image.digest is not None:
            return errors.SourceError(
                "the data is not the image's, and may have been cut off: its length is not told",
                image=self._image.id,
            )
        return None

    @property
    def hinted(self) -> bool:
        """Whether the image's length is a hint: see :meth:`ImageSource.open`."""
        with Guard(self._image.id):
            return getattr(self._stream, "hinted", False) is True

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        # What the body raised is the caller's; a source may neither swallow nor replace it.
        if error is None:
            with Guard(self._image.id):
                self._context.__exit__(None, None, None)
            return
        with contextlib.suppress(Exception, GeneratorExit):
            self._context.__exit__(kind, error, traceback)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the chunks, each one immutable. Some may be without a byte, so that the caller gets its turn.

        :raises ImageCacheError: as :meth:`ImageSource.open` while iterating.
        :raises SourceRefused: the source failed in a way of its own, or gave something other than bytes.
        """
        empty = 0
        while True:
            with Guard(self._image.id):
                chunk = self._next()
            if chunk is None:
                self._ended = True
                return
            yield chunk
            empty = 0 if chunk else empty + 1
            if empty > MOST_EMPTY_CHUNKS:
                raise broken_contract(self._image.id, f"it gave {empty} chunks in a row without a byte")

    def _next(self) -> bytes | None:
        """Return the next chunk, or None at the end."""
        try:
            chunk = next(self._stream)
        except StopIteration:
            return None
        return as_bytes(chunk, self._image.id)


def as_bytes(chunk: object, image_id: str) -> bytes:
    """Return a chunk as bytes that the source cannot change. No copy is made of :class:`bytes` itself.

    :raises SourceRefused: the chunk is no buffer, but text, a number, a list.
    """
    if type(chunk) is bytes:
        return chunk
    try:
        with memoryview(chunk) as view:  # type: ignore[arg-type]  # whatever supports the buffer protocol
            return view.tobytes()
    except TypeError:
        raise broken_contract(image_id, f"a chunk is a {_kind(chunk)} and not bytes") from None


def checked_image(image: object, image_id: str) -> model.Image:
    """Return a description if its fields have the types that :class:`Image` has, and copy its properties.

    :raises SourceRefused: the object is no description, or is one of another image.
    """
    if not isinstance(image, model.Image):
        raise broken_contract(image_id, f"describe() returned a {_kind(image)} and not an Image")
    if not isinstance(image.id, str) or image.id != image_id:
        raise broken_contract(image_id, "describe() returned the description of another image")
    for name, kinds in _FIELDS.items():
        value = getattr(image, name)
        if not isinstance(value, kinds):
            raise broken_contract(image_id, f"the description's {name} is a {_kind(value)}")
    for name in ("size", "virtual_size"):
        value = getattr(image, name)
        if value is not None and (type(value) is not int or value < 0):
            raise broken_contract(image_id, f"the description's {name} is not a number of bytes")
    for name in _WORDS:
        word = getattr(image, name)
        # They are shown in messages and logs, whose lines a server must not write.
        if word is not None and not (word.isprintable() and len(word) <= _LONGEST_WORD):
            raise broken_contract(image_id, f"the description's {name} is no word")
    if not all(isinstance(text, str) for text in (*image.locations, *image.stores)):
        raise broken_contract(image_id, "the description's locations or stores are not text")
    if image.digest is not None:
        _check_digest(image.digest, image_id)
    # Whatever a third party's mapping does when it is asked, it does here.
    return dataclasses.replace(image, properties=MappingProxyType(dict(image.properties)))


def _check_digest(digest: object, image_id: str) -> None:
    if not isinstance(digest, model.Digest):
        raise broken_contract(image_id, f"what should be a digest is a {_kind(digest)}")
    if not (isinstance(digest.algorithm, str) and isinstance(digest.value, str)):
        raise broken_contract(image_id, "the digest is not text")


class Guard:
    """Around a call into what a third party may have written: lets only this library's errors out, each of
    which names the image.

    :param who: what is called, for messages.
    """

    def __init__(self, image_id: str | None, who: str = "source") -> None:
        self._image_id = image_id
        self._who = who

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            _translate(error, self._image_id, self._who)


def _translate(error: BaseException, image_id: str | None, who: str = "source") -> None:
    """Raise this library's error for what came out of a source. Returns for what goes on as it is."""
    # The text may hold a secret, so only the kind is told.
    failed = f"the {who} failed with {type(error).__name__}"
    if isinstance(error, errors.ImageCacheError) and not isinstance(error, _NO_SOURCES):
        error.image = error.image or image_id
    elif isinstance(error, (OSError, MemoryError)):
        raise errors.SourceError(failed, image=image_id, next_step="try again later") from error
    elif _is_the_sources(error):
        raise SourceRefused(
            failed, image=image_id, next_step=f"report it to the author of the {who}"
        ) from error


def _is_the_sources(error: BaseException) -> bool:
    """Return whether a source raised it by itself, and nothing outside that ends this thread or process."""
    if isinstance(error, Exception):
        return True
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return False
    from asyncio import CancelledError  # heavy, and rarely needed

    # GeneratorExit would end the caller's loop as if the caller had asked for that. A cancelled task is one
    # of the source's own event loop: no other can be running in this thread.
    return isinstance(error, GeneratorExit | CancelledError)


def broken_contract(image_id: str | None, cause: str, who: str = "source") -> SourceRefused:
    """Return the error that it amounts to if what a third party wrote returns what it must not.

    :param who: what returned it, for messages.
    """
    return SourceRefused(
        f"the {who} breaks its contract: {cause}",
        image=image_id,
        next_step=f"report it to the author of the {who}",
    )


def _kind(value: object) -> str:
    return type(value).__name__
