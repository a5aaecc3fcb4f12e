# SPDX-License-Identifier: Apache-2.0
"""Images that are files on this host or on a mounted filesystem."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
import sys
from collections.abc import Iterator, Mapping

from imagecache_lib import errors, model
from imagecache_lib.sources import interface, tables
from imagecache_lib.sources.interface import CannotResume, ImageSource, NotPermitted
from imagecache_lib.system import arguments, sparse
from imagecache_lib.system.descriptor import Descriptor

_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class FileImage:
    """One image in a file.

    :param path: of a regular file; symbolic links are followed, since the operator chose the path.
    :param disk_format: Glance's name of its format, or None to let the content decide.
    :param digest: of its content, or None to take whatever the file holds.
    :param converted_from: the file is a conversion of an image of this format (``unknown`` will do), and not
        the image's own bytes: it serves as a disk and not as a plain file. With None it is the image's own.
    :param compression: how it is compressed: ``gzip``, ``xz``, ``zstd`` or ``bzip2``; ``disk_format`` is that
        of what is in it. With None it is not compressed.
    """

    path: str | os.PathLike[str]
    disk_format: str | None = None
    digest: model.Digest | None = None
    converted_from: str | None = None
    compression: str | None = None


class FileSource(ImageSource):
    """Images from files. An id is looked up in the table; it never is a path itself.

    :param images: by image id.
    :raises ConfigError: there is no such mapping, or a compression is unknown.
    """

    def __init__(self, images: Mapping[str, FileImage]) -> None:
        arguments.require_table("images", images, FileImage)
        for image in images.values():
            interface.check_compression(image.compression)
        self._images = dict(images)

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> ImageSource:
        """Make one from ``table``, the path of a table: :mod:`imagecache_lib.sources.tables`."""
        interface.require_options("file", options, "table", needed="table")
        return cls(tables.read(options["table"], FileImage))

    def __repr__(self) -> str:
        return f"FileSource({len(self._images)} images)"

    def origin(self, image_id: str) -> str:
        entry = self._images.get(image_id)
        return "" if entry is None else f"file:{os.path.abspath(entry.path)}"

    def describe(self, image_id: str) -> model.Image:
        entry = self._entry(image_id)
        with _regular_file(image_id, entry) as fd:
            size = os.fstat(fd).st_size
        return model.Image(
            id=image_id,
            disk_format=entry.disk_format,
            size=size,
            digest=entry.digest,
            converted_from=entry.converted_from,
            compression=entry.compression,
        )

    def known_digest(self, image_id: str) -> model.Digest | None:
        entry = self._images.get(image_id)
        return None if entry is None else entry.digest

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        entry = self._entry(image.id)
        with _regular_file(image.id, entry) as fd:
            if offset > 0 and os.fstat(fd).st_size != image.size:
                raise CannotResume("the file changed its size", image=image.id, path=os.fspath(entry.path))
            yield _Data(fd, offset, image, entry)

    def _entry(self, image_id: str) -> FileImage:
        return interface.entry_of(self._images, image_id)


@contextlib.contextmanager
def _regular_file(image_id: str, entry: FileImage) -> Iterator[int]:
    path = os.fspath(entry.path)
    try:
        # O_NONBLOCK: to open a FIFO without it waits for a writer, maybe for ever. A file does not mind.
        opened = Descriptor(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        raise errors.ImageNotFound(
            "the file is not there", image=image_id, path=path, next_step="restore the file"
        ) from None
    except PermissionError:
        raise NotPermitted(
            "no permission to read the file", image=image_id, path=path, next_step="make the file readable"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, a device
            raise _no_file(image_id, path) from None
        raise _failed(error, image_id, path) from error
    with opened as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _no_file(image_id, path)
        yield fd


def _no_file(image_id: str, path: str) -> errors.ImageRejected:
    return errors.ImageRejected(
        "it is not a regular file", image=image_id, path=path, next_step="name a file with the image"
    )


class _Data:
    """A file's bytes from an offset: the iterator that :meth:`ImageSource.open` promises.

    :ivar doubt: the error to raise for wrong bytes if another process wrote to the file meanwhile, or None.
    """

    def __init__(self, fd: int, offset: int, image: model.Image, entry: FileImage) -> None:
        self.doubt: errors.SourceError | None = None
        self._fd = fd
        self._image = image
        self._path = os.fspath(entry.path)
        self._began = self._state()
        self._chunks = _read(fd, offset, image.id, entry)

    def __iter__(self) -> _Data:
        return self

    def __next__(self) -> bytes:
        chunk = next(self._chunks, None)
        if self.doubt is None and self._state() != self._began:
            self.doubt = errors.SourceError(
                "the file changed while it was read",
                image=self._image.id,
                path=self._path,
                next_step="replace the file by another one (rename) instead of writing to it",
            )
        if chunk is not None:
            return chunk
        if self.doubt is not None and self._image.digest is None:
            raise self.doubt  # nothing else tells a mixture of two contents
        raise StopIteration

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns


def _read(fd: int, offset: int, image_id: str, entry: FileImage) -> Iterator[bytes]:
    """Yield a file's bytes from an offset. Its holes are given without being read."""
    data_end = offset  # up to here nothing is a hole
    while True:
        try:
            if offset >= data_end:
                hole_end, data_end = _next_data(fd, offset)
                while offset < hole_end:
                    zeros = sparse.ZEROS[: hole_end - offset]
                    offset += len(zeros)
                    yield zeros
            chunk = os.pread(fd, min(_CHUNK, data_end - offset), offset)
        except OSError as error:
            raise _failed(error, image_id, os.fspath(entry.path)) from error
        if not chunk:
            return
        offset += len(chunk)
        yield chunk


def _next_data(fd: int, offset: int) -> tuple[int, int]:
    """Return where the next data begins and ends: lseek(2), SEEK_DATA and SEEK_HOLE."""
    try:
        start = os.lseek(fd, offset, os.SEEK_DATA)
        return start, os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end, or the end
            end = max(offset, os.fstat(fd).st_size)
            return end, end
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # the filesystem cannot tell
            return offset, sys.maxsize
        raise


def _failed(error: Exception, image_id: str, path: str) -> errors.SourceError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return errors.SourceError(
        f"the file cannot be read: {reason}",
        image=image_id,
        path=path,
        next_step="check the file and its storage",
    )
