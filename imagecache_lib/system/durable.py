# SPDX-License-Identifier: Apache-2.0
"""Writing small files and directory entries so that a power cut leaves old or new, never a mixture."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat

from imagecache_lib.system import names, sparse
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.maker import Maker
from imagecache_lib.system.statx import Statx

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)

#: As much of a file that is too long is read, in bytes: enough to see that it is damaged.
_LONG = 2**24

#: How often a file that another process replaces meanwhile is looked up again.
_STALE_TURNS = 16


def new_id() -> str:
    """Return a random id for a file name: 32 hex digits."""
    return os.urandom(16).hex()


def make_directories(path: str, mode: int) -> None:
    """Make a directory and those above it that are missing, with that mode whatever the umask is.

    :raises OSError: as mkdir(2).
    """
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for each in reversed(missing):
        try:
            os.mkdir(each, mode)
        except FileExistsError:
            continue
        os.chmod(each, mode)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable: fsync(2) of the directory.

    :raises OSError: the directory cannot be synced.
    """
    with Descriptor(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


class FixedDirectory(PermissionError):
    """A directory is append-only or immutable: chattr(1)."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.EPERM, "its directory is append-only or immutable", path)


def require_changeable(path: str) -> None:
    """Refuse to write a file in a directory in which its temporary name would stay for ever.

    :raises FixedDirectory: it is append-only, so that names can be made there, and neither changed nor
        removed; or immutable.
    """
    if Statx().is_fixed(os.path.dirname(path)):
        raise FixedDirectory(path)


#: Append-only or immutable directories in which this process could not change or remove a name.
_found_fixed: set[str] = set()

#: Most of them that are remembered.
_MOST_FIXED = 1000


def require_not_found_fixed(path: str) -> None:
    """Refuse to write a file where an earlier one's temporary name stayed: :func:`require_changeable` for
    where its question to the filesystem would be asked too often.

    :raises FixedDirectory: :func:`note_fixed` found it, and it still is.
    """
    directory = os.path.dirname(path)
    if directory in _found_fixed:
        require_changeable(path)
        _found_fixed.discard(directory)


def note_fixed(path: str, error: OSError) -> bool:
    """Find out whether a name could not be changed or removed because of its directory, and remember that.

    Returns whether that is so.
    """
    directory = os.path.dirname(path)
    if error.errno != errno.EPERM or not Statx().is_fixed(directory):
        return False
    if len(_found_fixed) < _MOST_FIXED:
        _found_fixed.add(directory)
    return True


class Draft:
    """A small file that is written under a temporary name, which no other writer uses, and has yet to get its
    own.

    Until it is placed another file can be synced: one commit of a filesystem's journal does for both then.

    :ivar id: random digits in its temporary name.
    :ivar fd: open for writing, or -1 after it was placed.
    :raises OSError: it cannot be written; nothing is left of it.
    """

    def __init__(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        require_not_found_fixed(path)
        # The form of all names of files in the making, by which upkeep finds what a crash left.
        directory, name = os.path.split(path)
        self._maker = Maker()
        self._path = path
        self.id = new_id()
        self._temporary = os.path.join(directory, f".{name}.{self.id}.new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self._descriptor = Descriptor(self._temporary, flags, mode)
        try:
            os.fchmod(self.fd, mode)  # open() let the umask take bits away
            view = memoryview(data)
            while view:
                view = view[os.write(self.fd, view) :]
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        return self._descriptor.fd

    def begin_writeback(self) -> None:
        """Let the kernel begin to write it, and give it its blocks."""
        sparse.start_writeback(self.fd)

    def place(self, *, sync: bool = True) -> None:
        """Replace the file at its path in one step. The name itself is not synced.

        :param sync: whether to make the content durable first.
        :raises OSError: it cannot be written; the old one stays.
        """
        try:
            if sync:
                os.fsync(self.fd)
        finally:
            self._descriptor.close()
        _rename(self._temporary, self._path)
        self._temporary = ""

    def close(self) -> None:
        """Remove it, unless it was placed. A forked child leaves it to its parent."""
        self._descriptor.close()
        if self._temporary and self._maker.is_here:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)


def write_file(
    path: str, data: bytes, *, mode: int = 0o600, sync: bool = True, sync_name: bool = True
) -> None:
    """Replace a small file in one step, under a temporary name that no other writer uses.

    :param sync: whether to make it durable: False where losing it in a power cut harms nothing.
    :param sync_name: whether to make the name durable too: False where a name that comes later says as much,
        since the journal of a filesystem keeps their order.
    :raises OSError: the file cannot be written; the old one stays.
    """
    require_changeable(path)
    draft = Draft(path, data, mode=mode)
    try:
        draft.place(sync=sync)
    finally:
        draft.close()
    if sync and sync_name:
        sync_directory(os.path.dirname(path))


def _rename(temporary: str, path: str) -> None:
    """Give a file its name. An error names the file that was to be written, and not the temporary one."""
    try:
        os.rename(temporary, path)
    except OSError as error:
        if note_fixed(path, error):
            raise FixedDirectory(path) from error
        raise OSError(error.errno, error.strerror, path) from error


def exchange_file(path: str, data: bytes, *, mode: int = 0o600, limit: int = 2**24) -> bytes | None:
    """Replace a small file durably, and return what was replaced: what the file held at that very moment.

    Returns None if there was no file. A filesystem that cannot exchange two names (NFS) is asked for the
    content just before, which leaves a moment in which another writer may come.

    :raises OSError: the file cannot be written.
    """
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{new_id()}.new")
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    require_changeable(path)  # whose error names it, and not the temporary file
    write_file(temporary, data, mode=mode, sync_name=False)
    before: bytes | None = None
    try:
        while not _exchange(temporary, path):
            if os.path.lexists(path):
                before = read_file(path, limit=limit)
                _rename(temporary, path)
                break
            try:
                os.link(temporary, path, follow_symlinks=False)
            except FileExistsError:
                continue  # another writer was first
            break
        else:
            before = read_file(temporary, limit=limit)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    sync_directory(directory)
    return before


def _exchange(one: str, other: str) -> bool:
    """Exchange two files' names. Returns False if one is not there, or the filesystem cannot do that."""
    paths = os.fsencode(one), os.fsencode(other)
    flags = ctypes.c_uint(_RENAME_EXCHANGE)
    return bool(_libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], flags) == 0)


def read_file(path: str, *, limit: int = 2**24) -> bytes | None:
    """Return the content of a small file, or None if the path has no file or no regular one.

    That there is none counts where nothing but this kernel changes the filesystem, and where its directory
    does not list it: a client of another finds nothing for a moment where a file is being replaced, on FUSE
    even if this host replaces it.

    :param limit: most bytes that are read. A file that has more is none as it was written, and no more than
        16 MiB of it are read.
    :raises OSError: the file cannot be read; ``ESTALE``: its directory lists it, and it is not found.
    """
    for _turn in range(_STALE_TURNS):
        try:
            return _read(path, limit)
        except NotADirectoryError:
            return None
        except FileNotFoundError:
            if not names.may_be_there(path):
                return None
        except OSError as error:
            # It was replaced between our look-up and our reading.
            if error.errno != errno.ESTALE:
                raise
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)


def _read(path: str, limit: int) -> bytes | None:
    with Descriptor(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as fd:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return None
        if found.st_size > limit:
            limit = min(limit, _LONG)
        parts = []
        while limit > 0 and (part := os.read(fd, min(limit, 2**20))):
            parts.append(part)
            limit -= len(part)
        return b"".join(parts)
