# SPDX-License-Identifier: Apache-2.0
"""A source that holds its images in memory and fails as it is told to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Iterator, Mapping

from imagecache_lib import errors, model
from imagecache_lib.sources.interface import CannotResume, ImageSource


class FakeSource(ImageSource):
    """An image source for tests, with scripted failures and counts of what was asked of it.

    :param images: data by image id.
    :param digests: whether descriptions have a digest. Without one nothing can be resumed.
    :param sizes: whether descriptions have a size.
    :param disk_format: what the descriptions claim.
    :param chunk_size: bytes in each chunk.
    """

    def __init__(
        self,
        images: Mapping[str, bytes],
        *,
        digests: bool = True,
        sizes: bool = True,
        disk_format: str | None = "raw",
        chunk_size: int = 2**16,
    ) -> None:
        self._lock = threading.Lock()
        self._images = dict(images)
        self._described = {
            image_id: _description(image_id, data, digests=digests, sizes=sizes, disk_format=disk_format)
            for image_id, data in images.items()
        }
        self._chunk_size = chunk_size
        self._origins: dict[str, str] = {}
        self._breaks: list[int] = []
        self._describe_errors: list[errors.ImageCacheError] = []
        self._open_errors: list[errors.ImageCacheError] = []
        #: Set it to make every open at an offset above 0 fail, as with a server that ignores ranges.
        self.refuses_resume = False
        #: How often :meth:`describe` was called.
        self.describes = 0
        #: The offset of each :meth:`open`, in order.
        self.offsets: list[int] = []
        #: How many bytes were given out.
        self.bytes_sent = 0

    @property
    def opens(self) -> int:
        """How often :meth:`open` was called."""
        return len(self.offsets)

    def origin(self, image_id: str) -> str:
        """Return a text that is the same for sources with the same data for an image."""
        with self._lock:
            data = self._images.get(image_id)
            if data is None:
                return ""
            # Hashed once: a real source tells where it reads from without reading it.
            if image_id not in self._origins:
                self._origins[image_id] = f"fake:{hashlib.sha256(data).hexdigest()}"
            return self._origins[image_id]

    def vouches_for_digest(self, image: model.Image) -> bool:
        """Return whether this source computed the digest, as an image service does of what is uploaded."""
        return True

    def break_at(self, *offsets: int) -> None:
        """Break the next transfers, one for each offset: after the byte before it was given out."""
        with self._lock:
            self._breaks.extend(offsets)

    def fail_describe(self, *failures: errors.ImageCacheError) -> None:
        """Let the next calls of :meth:`describe` raise these, in order."""
        with self._lock:
            self._describe_errors.extend(failures)

    def fail_open(self, *failures: errors.ImageCacheError) -> None:
        """Let the next calls of :meth:`open` raise these, in order."""
        with self._lock:
            self._open_errors.extend(failures)

    def change_data(self, image_id: str, data: bytes) -> None:
        """Change what is sent, but not what is said of it: a source that lies, or was overtaken."""
        with self._lock:
            self._images[image_id] = data
            self._origins.pop(image_id, None)

    def change_status(self, image_id: str, status: str) -> None:
        """Change the image's status."""
        with self._lock:
            self._described[image_id] = dataclasses.replace(self._described[image_id], status=status)

    def remove(self, image_id: str) -> None:
        """Forget the image."""
        with self._lock:
            del self._images[image_id]
            del self._described[image_id]
            self._origins.pop(image_id, None)

    def describe(self, image_id: str) -> model.Image:
        with self._lock:
            self.describes += 1
            if self._describe_errors:
                raise self._describe_errors.pop(0)
            try:
                return self._described[image_id]
            except KeyError:
                raise _not_found(image_id) from None

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with self._lock:
            self.offsets.append(offset)
            if self._open_errors:
                raise self._open_errors.pop(0)
            if image.id not in self._images:
                raise _not_found(image.id)
            if offset > 0 and self.refuses_resume:
                raise CannotResume("the source ignores ranges", image=image.id)
            data = self._images[image.id]
            broken_at = self._breaks.pop(0) if self._breaks else None
        yield self._chunks(image.id, data, offset, broken_at)

    def _chunks(self, image_id: str, data: bytes, offset: int, broken_at: int | None) -> Iterator[bytes]:
        end = len(data) if broken_at is None else min(len(data), broken_at)
        while offset < end:
            chunk = data[offset : min(end, offset + self._chunk_size)]
            offset += len(chunk)
            with self._lock:
                self.bytes_sent += len(chunk)
            yield chunk
        if broken_at is not None:
            raise errors.SourceError(f"the connection broke after {offset} bytes", image=image_id)


def _description(
    image_id: str, data: bytes, *, digests: bool, sizes: bool, disk_format: str | None
) -> model.Image:
    digest = model.Digest("sha512", hashlib.sha512(data).hexdigest()) if digests else None
    return model.Image(id=image_id, disk_format=disk_format, size=len(data) if sizes else None, digest=digest)


def _not_found(image_id: str) -> errors.ImageNotFound:
    return errors.ImageNotFound("no such image", image=image_id, next_step="choose another image")
