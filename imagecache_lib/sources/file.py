# SPDX-License-Identifier: Apache-2.0
"""Images that are files on this host or on a mounted filesystem."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Iterator, Mapping

from imagecache_lib import errors, model
from imagecache_lib.sources import interface
from imagecache_lib.sources.interface import CannotResume, ImageSource, NotPermitted

_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class FileImage:
    """One image in a file.

    :param path: of a regular file; symbolic links are followed, since the operator chose the path.
    :param disk_format: Glance's name of its format. None: the content decides.
    :param digest: of its content. None: whatever the file holds is taken.
    """

    path: str | os.PathLike[str]
    disk_format: str | None = None
    digest: model.Digest | None = None


class FileSource(ImageSource):
    """Images from files. An id is looked up in the table; it never is a path itself.

    :param images: by image id.
    """

    def __init__(self, images: Mapping[str, FileImage]) -> None:
        self._images = dict(images)

    def __repr__(self) -> str:
        return f"FileSource({len(self._images)} images)"

    def describe(self, image_id: str) -> model.Image:
        entry = self._entry(image_id)
        with _regular_file(image_id, entry) as fd:
            size = os.fstat(fd).st_size
        return model.Image(id=image_id, disk_format=entry.disk_format, size=size, digest=entry.digest)

    def known_digest(self, image_id: str) -> model.Digest | None:
        entry = self._images.get(image_id)
        return None if entry is None else entry.digest

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        entry = self._entry(image.id)
        with _regular_file(image.id, entry) as fd:
            if offset > 0 and os.fstat(fd).st_size != image.size:
                raise CannotResume("the file changed its size", image=image.id, path=os.fspath(entry.path))
            yield _read(fd, offset, image.id, entry)

    def _entry(self, image_id: str) -> FileImage:
        return interface.entry_of(self._images, image_id)


@contextlib.contextmanager
def _regular_file(image_id: str, entry: FileImage) -> Iterator[int]:
    path = os.fspath(entry.path)
    try:
        # O_NONBLOCK: to open a FIFO without it waits for a writer, maybe for ever. A file does not mind.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        raise errors.ImageNotFound(
            "the file is not there", image=image_id, path=path, next_step="restore the file"
        ) from None
    except PermissionError:
        raise NotPermitted(
            "no permission to read the file", image=image_id, path=path, next_step="make the file readable"
        ) from None
    except (OSError, ValueError) as error:
        raise _failed(error, image_id, path) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise errors.ImageRejected(
                "it is not a regular file", image=image_id, path=path, next_step="correct the source's table"
            )
        yield fd
    finally:
        os.close(fd)


def _read(fd: int, offset: int, image_id: str, entry: FileImage) -> Iterator[bytes]:
    while True:
        try:
            chunk = os.pread(fd, _CHUNK, offset)
        except OSError as error:
            raise _failed(error, image_id, os.fspath(entry.path)) from error
        if not chunk:
            return
        offset += len(chunk)
        yield chunk


def _failed(error: Exception, image_id: str, path: str) -> errors.SourceError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return errors.SourceError(
        f"the file cannot be read: {reason}",
        image=image_id,
        path=path,
        next_step="check the file and its storage",
    )
