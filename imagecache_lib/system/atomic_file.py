# SPDX-License-Identifier: Apache-2.0
"""Making a file under a temporary name and giving it its own in one step, never over another."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
from collections.abc import Iterator

from imagecache_lib import errors
from imagecache_lib.system import attributes, durable, holders, locks, names, sparse
from imagecache_lib.system.host import System
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

#: ioctl_ficlone(2): share the extents of another file.
_FICLONE = 0x40049409

_COPY_CHUNK = 2**20

#: Modes of fallocate(2), from linux/falloc.h.
_KEEP_SIZE = 0x01
_UNSHARE_RANGE = 0x40
_libc = ctypes.CDLL(None, use_errno=True)

#: Names of files in the making, beside what they will be.
UNFINISHED = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{32}\.new")

_MODE = 0o644

#: Extended attribute of a file that was made here: the first digits of the random id in the name that it had
#: in the making. They leave room, in an inode of ext4, for the attribute that says which format a disk has:
#: one without room there takes a block of its own, which each spawn would have to make and to sync.
MADE_MARK = "user.imagecache.made"
_MADE_DIGITS = 8

#: How the names of notes end that say where a file is in the making: the path is all that is in them.
NOTE_SUFFIX = ".outside"


class BadTarget(errors.BackendError):
    """The path that was asked for cannot hold a disk, or no pass would see one there."""


def check_target(target: str) -> None:
    """Refuse a target that cannot work, before anything is fetched for it.

    :raises BadTarget: it is no absolute path of a file, or its directory is missing or read-only.
    :raises BackendError: it can be no path at all.
    """
    names.require_path(target)
    if not os.path.isabs(target) or target.endswith("/"):
        raise BadTarget(
            "a target must be an absolute path of a file", path=target, next_step="correct the request"
        )
    directory = os.path.dirname(target)
    if not os.path.isdir(directory):
        raise BadTarget("the target's directory does not exist", path=directory, next_step="create it first")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise BadTarget(
            "the target's directory is not writable", path=directory, next_step="check its owner and mode"
        )


def _exists(target: str) -> errors.DiskExistsError:
    return errors.DiskExistsError(
        "the target exists already",
        path=target,
        next_step="remove it, or ask for it to be reused (imagecache: --reuse)",
    )


@contextlib.contextmanager
def unfinished(target: str, system: System, *, notes: str = "") -> Iterator[UnfinishedFile]:
    """Yield an empty file beside ``target`` that becomes it by :meth:`UnfinishedFile.commit`.

    When the body ends without a commit, the file goes and nothing is left of it. A file that a killed process
    left does not stop the next attempt: it has another name, and the periodic pass removes it.

    :param target: absolute path that the file will have.
    :param notes: a directory that gets a note of where the file is, for a place that no pass looks at; empty
        if the pass finds it.
    :raises NoSpaceError, BackendError: the file cannot be made.
    """
    file = UnfinishedFile(target, system, notes)
    try:
        yield file
    finally:
        file.close()


class UnfinishedFile:
    """A file in the making, under a name that says so.

    Its life is fill, :meth:`seal`, :meth:`commit`, in this order. The content is durable before the file
    gets its name, so that a power cut leaves either no file of that name or a whole one.

    :ivar target: absolute path that it will have.
    :ivar path: absolute path that it has until then.
    """

    def __init__(self, target: str, system: System, notes: str = "") -> None:
        directory, name = os.path.split(target)
        own_id = durable.new_id()
        self.target = target
        self.path = os.path.join(directory, f".{name}.{own_id}.new")
        self._note = os.path.join(notes, own_id + NOTE_SUFFIX) if notes else ""
        self._system = system
        with translated(target):
            durable.require_not_found_fixed(target)
            if self._note:
                # Without a note a crash leaves a file that no pass finds: that is no reason to make none.
                with contextlib.suppress(OSError):
                    durable.write_file(self._note, os.fsencode(self.path))
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            try:
                self._owner = holders.OwnerLock(locks.HeldDescriptor(self.path, flags), system)
            except BaseException:
                self._forget_note()
                raise
            try:
                mark_as_made(self.fd, own_id)
            except BaseException:
                self.close()
                raise

    @property
    def fd(self) -> int:
        """The open file, for reading and writing."""
        return self._owner.fd

    def seal(self, *, sync: bool = True) -> None:
        """Declare the content complete, and make it durable.

        It is synced here and not in :meth:`commit`, since the caller looks in between whether what the file
        was made from is still there: a network filesystem shows another host only what was written out, and
        the less happens between that look and the name, the better.

        :param sync: False leaves it to the kernel when the content is written. The caller must then be able
            to tell a disk whose content was lost.
        :raises NoSpaceError, BackendError: the content cannot be written.
        """
        with translated(self.target):
            os.fchmod(self.fd, _MODE)
            if sync:
                # Not fdatasync(2): attributes of the file must last too, and a new file's inode has to be
                # written in any case.
                os.fsync(self.fd)
        self._system.trace(TracePoint.DISK_MADE)

    def commit(self, pinned: contextlib.AbstractContextManager[None] | None = None) -> None:
        """Give the file its name, which no file may have.

        The name itself is not synced. A name that a power cut took is the same as a call that never came
        back, and the first flush of a guest, or of any program that writes into the file, makes it durable.

        :param pinned: entered just before the file can be seen under its name, left once it can.
        :raises DiskExistsError: another file has the name.
        :raises NoSpaceError, BackendError: the filesystem failed.
        """
        self._system.trace(TracePoint.DISK_CONFIRMED)
        with pinned or contextlib.nullcontext(), translated(self.target):
            self._link()
        self._system.trace(TracePoint.DISK_PLACED)

    def _link(self) -> None:
        try:
            os.link(self.path, self.target, follow_symlinks=False)
        except FileExistsError as error:
            # An NFS client whose request was answered, and the answer lost, asks again and is told this.
            if not self._is_target():
                raise _exists(self.target) from error

    def _is_target(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.target, follow_symlinks=False), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Remove the temporary name, and close the file. A forked child leaves both to its parent."""
        if self.fd < 0:
            return
        # What cannot be removed now is swept later; an error that led here matters more.
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            self._forget_note()
        except OSError as error:
            durable.note_fixed(self.path, error)  # the note tells the sweep
        else:
            self._forget_note()
        with contextlib.suppress(OSError):
            self._owner.close()

    def _forget_note(self) -> None:
        if self._note:
            with contextlib.suppress(OSError):
                os.unlink(self._note)


def mark_as_made(fd: int, own_id: str) -> None:
    """Let a file in the making say that it was made here, as far as its filesystem can.

    :param own_id: the random digits in its name.
    :raises OSError: as fsetxattr(2).
    """
    attributes.write(fd, MADE_MARK, own_id[:_MADE_DIGITS])


def is_made_here(fd: int, path: str) -> bool:
    """Whether a file in the making was made by this library, which its name alone does not prove.

    :param fd: the file, open.
    :param path: its path, whose name is that of a file in the making.
    :raises OSError: as fgetxattr(2).
    """
    named = os.path.basename(path)[: -len(".new")].rpartition(".")[2]
    try:
        return os.getxattr(fd, MADE_MARK) == named[:_MADE_DIGITS].encode()
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
            return True  # on a filesystem without attributes the name has to do
        if error.errno == errno.ENODATA:
            return False
        raise


def share_extents(source: int, target: int) -> bool:
    """Let an empty file share the extents of another. Returns False if the filesystem cannot do that.

    :param source: descriptor open for reading.
    :param target: descriptor of an empty file open for writing.
    :raises OSError: as ioctl(2).
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in (
            errno.EOPNOTSUPP,
            errno.EXDEV,
            errno.EINVAL,
            errno.ENOTTY,
            errno.ENOSYS,
            errno.EPERM,
        ):
            raise
        return False
    return True


def copy_content(source: int, target: int, waiter: Waiter | None = None) -> None:
    """Share a file's extents where the filesystem can; otherwise copy what is data and leave its holes.

    :param source: descriptor open for reading.
    :param target: descriptor of an empty file open for writing.
    :param waiter: asked after each piece of a copy whether the caller still waits.
    :raises OSError: as the system calls.
    :raises: what the waiter raises.
    """
    if share_extents(source, target):
        return
    # Where extents cannot be shared, copy_file_range(2) copies through a pipe of 64 KiB, slower than this.
    buffer = memoryview(bytearray(_COPY_CHUNK))
    size = os.fstat(source).st_size
    for start, end in sparse.data_extents(source):
        position = start
        while position < end:
            position += _copy_piece(source, target, position, end, buffer)
            if waiter is not None:
                waiter.check()
    os.ftruncate(target, size)


def allocate(fd: int, size: int) -> bool:
    """Give the first ``size`` bytes of a file blocks of its own, so that writing there never lacks space.

    The file keeps its apparent size. Returns False if the filesystem cannot allocate ahead: nothing has
    happened then, and the space is not promised.

    :raises OSError: there is no room.
    """
    # A reflink's extents are shared: they are in use, and writing to them still needs new ones.
    for mode in (_KEEP_SIZE | _UNSHARE_RANGE, _KEEP_SIZE):
        if _libc.fallocate(fd, mode, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return True
        if ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return False


def _copy_piece(source: int, target: int, start: int, end: int, buffer: memoryview) -> int:
    """Copy as much as the buffer holds. Returns how many bytes that was."""
    copied = os.preadv(source, [buffer[: min(len(buffer), end - start)]], start)
    if copied == 0:
        raise OSError(errno.EIO, "the file to copy ended early")
    return _write(target, buffer[:copied], start)


def _write(target: int, data: memoryview, offset: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done:], offset + done)
    return done
