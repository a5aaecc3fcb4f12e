# SPDX-License-Identifier: Apache-2.0
"""``disk.info``: which format each disk beside it has, pinned, so that a guest cannot choose it.

A guest that owns a raw disk can write a qcow2 header into it that names a file of the host as its backing
file. A program that probes the format then hands that file to the guest. ``disk.info`` is Nova's, a JSON
object of absolute path to format, and stays readable by Nova.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Self

from imagecache_lib import errors
from imagecache_lib.config import CacheConfig
from imagecache_lib.store import layout
from imagecache_lib.system import atomic_file, durable, locks, names
from imagecache_lib.system.host import System
from imagecache_lib.system.maker import Maker
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

LOG = logging.getLogger(__name__)

NAME = "disk.info"

#: Extended attribute of a disk: its format, by QEMU's name, which a guest that owns the disk cannot change.
FORMAT_MARK = "user.imagecache.format"

_MODE = 0o644

#: How often entries that other processes overwrote meanwhile are put back before it is left to them.
_MOST_ROUNDS = 1000

#: Locks for all of a host's disk.info files: enough for spawns to go on side by side, and few, since a lock
#: file for each instance directory would stay behind for ever.
_LOCKS = 16


class Damaged(errors.BackendError):
    """A ``disk.info`` that cannot be read: which formats it pinned is unknown."""


def parse(data: bytes) -> dict[str, str] | None:
    """Return the formats by path, or None if ``data`` is torn or unknown: what it pinned cannot be told."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(isinstance(format, str) for format in found.values()):
        return None
    return found


def format_in(formats: Mapping[str, str], disk: str) -> str | None:
    """Return a disk's format among those that the ``disk.info`` beside it pins, or None if none is pinned.

    The directory may have another name or mount point than when the disk was made (a migration, a resize),
    so that an entry for the same file name will do.
    """
    if disk in formats:
        return formats[disk]
    name = os.path.basename(disk)
    found = {format for path, format in formats.items() if os.path.basename(path) == name}
    return found.pop() if len(found) == 1 else None


class Draft:
    """A ``disk.info`` that pins one disk's format beside those that were pinned when it was written."""

    def __init__(self, disk: str, format: str) -> None:
        self._path = _beside(disk)
        self._formats: Mapping[str, str] = {}
        self._file: durable.Draft | None = None
        try:
            with contextlib.suppress(errors.ImageCacheError, OSError):
                # Whether there is really none is found out under the lock.
                before = _read(self._path) if os.path.lexists(self._path) else {}
                if before.get(disk) != format:
                    self._write({**before, disk: format})
        except BaseException:
            self.close()
            raise

    def _write(self, formats: Mapping[str, str]) -> None:
        self._formats = formats
        self._file = durable.Draft(self._path, _encoded(formats), mode=_MODE)
        # As the disk itself, so that it goes after a crash wherever that goes.
        atomic_file.mark_as_made(self._file.fd, self._file.id)
        self._file.begin_writeback()

    def place(self, formats: Mapping[str, str]) -> bool:
        """Give it its name, durably, if it says what it should. Returns whether it has its name.

        :raises NoSpaceError, BackendError: it cannot be written.
        """
        if self._file is None or formats != self._formats:
            return False
        try:
            with translated(self._path):
                self._file.place()
        except errors.BackendError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False  # another program removed what looks like a crash's leftover
            raise
        return True

    def close(self) -> None:
        """Remove it, unless it has its name."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


class DiskInfo:
    """Reads and writes ``disk.info`` files."""

    def __init__(self, config: CacheConfig, host: System) -> None:
        self._locks_path = config.locks_path
        self._stall_timeout = config.lock_timeout
        self._host = host
        self._waiter: Waiter | None = None

    def for_caller(self, waiter: Waiter) -> Self:
        """Return what reads and writes them for one caller, and waits for others no longer than that does."""
        bound = copy.copy(self)
        bound._waiter = waiter
        return bound

    def format_of(self, disk: str) -> str | None:
        """Return the pinned format of a disk, or None if none is pinned.

        :raises Damaged: which format is pinned cannot be told.
        """
        return format_in(_read(_beside(disk)), disk)

    @contextlib.contextmanager
    def drafted(self, disk: str, format: str) -> Iterator[Draft]:
        """Write what will most likely pin a disk's format, for :meth:`pinned`, before the disk is synced.

        Yields it. What cannot be written now is written by :meth:`pinned`.
        """
        draft = Draft(disk, format)
        try:
            yield draft
        finally:
            draft.close()

    @contextlib.contextmanager
    def pinned(self, disk: str, format: str, draft: Draft | None = None) -> Iterator[None]:
        """Pin a disk's format before the body, which gives the disk its name. Other disks' entries stay.

        If the body fails, the entry is what it was: the name is another disk's then, whose format this is
        not. The pin is durable before the disk can be seen, since a power cut that kept the disk and lost
        the pin would let the guest choose.

        Where no locks work, two processes that write at once lose one entry. So the file is read back until
        it has the entries of all the disks beside it that are marked with their format: the process that
        writes last sees them.

        :param draft: what :meth:`drafted` yielded for the same disk and format, or None.
        :raises CancelledError, LockTimeoutError: the caller no longer waits; nothing was written.
        :raises Damaged: other disks' formats would be lost.
        :raises NoSpaceError, BackendError: the file cannot be written.
        """
        path, maker = _beside(disk), Maker()
        with self._locked(path):
            before = _read(path)
            if before.get(disk) != format:
                formats = {**before, disk: format}
                if draft is None or not draft.place(formats):
                    _write(path, formats)
            try:
                yield
            except BaseException:
                if before.get(disk) != format and maker.is_here:
                    _put_back(path, disk, before.get(disk))
                raise
            try:
                _complete(path, {disk: format})
            except errors.ImageCacheError as error:
                # The disk has its name, and no caller expects that of a call that fails. Its mark pins its
                # format, and the entry was durable before.
                if _mark_of(disk) != format:
                    raise
                LOG.warning("%s may lack the format of %s, which that tells itself: %s", path, disk, error)

    def complete(self, disk: str) -> None:
        """Pin anew what the marks of the disks beside a ``disk.info`` say, and a power cut took from it.

        :raises CancelledError, LockTimeoutError: the caller no longer waits; nothing was written.
        :raises NoSpaceError, BackendError: the file cannot be written.
        """
        path = _beside(disk)
        with contextlib.suppress(Damaged):
            if disk in _read(path):
                return
        with self._locked(path):
            _complete(path, {})

    def forget(self, disk: str) -> None:
        """Remove the entry of a disk that is gone, if it has one.

        :raises CancelledError, LockTimeoutError: the caller no longer waits; nothing was written.
        :raises NoSpaceError, BackendError: the file cannot be written.
        """
        path = _beside(disk)
        with self._locked(path), contextlib.suppress(Damaged):
            _put_back(path, disk, None)

    def _locked(self, path: str) -> contextlib.AbstractContextManager[bool]:
        directory, name = os.path.split(path)
        # The release before chooses the lock so too, and does not read the file back.
        real = os.path.join(names.real_directory(directory), name)
        number = zlib.crc32(os.fsencode(real)) % _LOCKS
        lock = os.path.join(self._locks_path, layout.lock_name(f"imagecache-disk-info-{number:x}"))
        # The file is read back, so that nothing depends on the lock.
        return locks.waiting(
            lock,
            shared=False,
            host=self._host,
            stall_timeout=self._stall_timeout,
            waiter=self._waiter,
            needed=False,
        )


def _read(path: str) -> dict[str, str]:
    with translated(path):
        data = durable.read_file(path)
    if data is None:
        return {}
    formats = parse(data)
    if formats is None:
        raise Damaged(
            "the file that pins the formats of the disks beside it is damaged",
            path=path,
            next_step="write it anew, a JSON object of each disk's absolute path and its true format",
        )
    return formats


def _write(path: str, formats: Mapping[str, str]) -> None:
    with translated(path):
        if formats:
            durable.write_file(path, _encoded(formats), mode=_MODE, sync_name=False)
        else:
            # Nothing is left to pin: leave the directory as it was before the first disk.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _encoded(formats: Mapping[str, str]) -> bytes:
    return json.dumps(formats).encode()


def _put_back(path: str, disk: str, format: str | None) -> None:
    """Give a disk the entry that it had.

    :param format: the format in that entry, or None if the disk had none.
    """
    known = _read(path)
    if known.get(disk) == format:
        return
    others = {other: pinned for other, pinned in known.items() if other != disk}
    _write(path, others if format is None else {**others, disk: format})
    _complete(path, {})


def _complete(path: str, own: Mapping[str, str]) -> None:
    """Write entries that are missing until none is: ``own``, and those of marked disks in the directory.

    The disks have their names by now. The process that writes the file last looks for them after that, and a
    disk that gets its name later has its own look to come.
    """
    with contextlib.suppress(Damaged):  # the marks say the same, and other entries must not be lost
        for _round in range(_MOST_ROUNDS):
            known = _read(path)
            lacking = {disk: format for disk, format in own.items() if known.get(disk) != format}
            lacking |= dict(_marked(path, {*known, *own}))
            if not lacking:
                return
            _write(path, {**known, **lacking})


def _marked(path: str, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the path and the format of each disk beside a ``disk.info`` that is marked with its format.

    :param known: paths of disks to pass over.
    """
    directory = os.path.dirname(path)
    with translated(path):
        entries = os.listdir(directory)
    for name in entries:
        if name == NAME or (name[0] == "." and atomic_file.UNFINISHED.fullmatch(name)):
            continue
        disk = os.path.join(directory, name)
        if disk not in known:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                yield disk, _mark(disk)


def _mark(disk: str) -> str:
    return os.getxattr(disk, FORMAT_MARK, follow_symlinks=False).decode("ascii")


def _mark_of(disk: str) -> str | None:
    """Return the format that a disk is marked with, or None if that cannot be told."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return _mark(disk)
    return None


def _beside(disk: str) -> str:
    return os.path.join(os.path.dirname(disk), NAME)
