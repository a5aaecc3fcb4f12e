# SPDX-License-Identifier: Apache-2.0
"""File locks: shared or exclusive, between threads, processes and Nova. They save work and carry no safety.

They are OFD (open file description) byte-range locks, ``F_OFD_SETLK`` of fcntl(2): they belong to the open
file and not to the process, so that closing another descriptor of the same file does not drop them, two
threads exclude each other, and the POSIX locks that Nova takes on the same file conflict with them.

Nova's own locks are POSIX locks, which belong to the process: the kernel drops those that a process has on a
file as soon as it closes *any* descriptor of the file (fcntl(2), "Advisory record locking"). Where Nova runs
in this process, that must not happen to it by us. While a lock of ours is on the file there can be none of
Nova's. So a descriptor of a lock file is closed only then (close(2) drops the POSIX locks first, ours after
them), and one whose lock was not got is parked for the next that wants the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from typing import Protocol

import fasteners

from imagecache_lib import errors
from imagecache_lib.system import durable
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.host import System
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import odd_entry
from imagecache_lib.system.waiter import Waiter

LOG = logging.getLogger(__name__)

# struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length (0: to the end), pid (0 for OFD).
_FLOCK = struct.Struct("hhqqi4x")

#: What a filesystem says that has no locks; ENOLCK is that of an NFS server without lockd.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

#: Of directories of lock files that are made here.
_DIRECTORY_MODE = 0o755

_FULL = (errno.ENOSPC, errno.EDQUOT)

#: How long one wait lasts before cancellation and progress are looked at again, in seconds.
_SLICE = 0.25


def set_lock(fd: int, kind: int, start: int = 0, length: int = 0) -> None:
    """Set (``F_RDLCK``, ``F_WRLCK``) or drop (``F_UNLCK``) an OFD lock on some bytes, without waiting.

    :param length: in bytes; 0 means to the end of the file, however it grows.
    :raises BlockingIOError: another open file description holds a conflicting lock.
    :raises OSError: the filesystem cannot lock, or the file is closed, as it is in a forked child.
    """
    if fd < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except PermissionError as error:
        # fcntl(2) allows EACCES for a conflict, where Linux says EAGAIN.
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error


def is_locked(fd: int, start: int = 0, length: int = 0) -> bool | None:
    """Whether another open file description, QEMU's included, has any lock on these bytes.

    Returns None if the filesystem has no locks.
    """
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


# A forked child shares the open file descriptions and with them the locks: were they left open there, an
# owner would look alive for as long as the child lives. Weak, so that it holds nothing itself.
_held: weakref.WeakSet[HeldDescriptor] = weakref.WeakSet()


class HeldDescriptor:
    """A descriptor that a forked child must not keep, and that goes with the last reference to it.

    An interrupt may come while a lock is being released: it must not stay held for as long as the process
    lives.

    :ivar fd: the descriptor, or -1 once it is closed.
    :raises OSError: as open(2).
    """

    def __init__(self, path: str, flags: int, mode: int = 0o600) -> None:
        self._file = Descriptor(path, flags, mode)
        self.fd = self._file.fd
        _held.add(self)

    def close(self) -> None:
        self.fd = -1  # first: after an interrupt the number may be another file's
        self._file.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it was interrupted as it was made
            self._file.close()


class _Parked:
    """Descriptors of lock files that could not be closed without dropping locks of Nova's in this process.

    Each is closed once no lock of its file is held and any lock is asked for, so that there are at most as
    many as threads waited in vain for locks that are held.
    """

    def __init__(self) -> None:
        self._files: list[tuple[str, HeldDescriptor]] = []

    def put(self, path: str, descriptor: HeldDescriptor) -> None:
        self._files.append((path, descriptor))

    def take(self, path: str) -> HeldDescriptor | None:
        """Return a descriptor of the file that is at the path now, or None if there is none.

        On the way those of other files are closed that can be.
        """
        for _ in range(len(self._files)):
            try:
                parked, descriptor = self._files.pop(0)
            except IndexError:  # another thread took it
                break
            if parked == path and _is_at(path, descriptor.fd):
                return descriptor
            if not _close_locked(descriptor):
                self._files.append((parked, descriptor))
        return None

    def forget(self) -> None:
        self._files.clear()


_parked = _Parked()


def _is_at(path: str, fd: int) -> bool:
    try:
        # Even fstat(2) fails, with ESTALE, where another host unlinked the file.
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _close_locked(descriptor: HeldDescriptor) -> bool:
    """Close a descriptor under a lock of its own. Returns False if a lock of another holder is there."""
    try:
        set_lock(descriptor.fd, fcntl.F_RDLCK)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a filesystem without locks
    descriptor.close()
    return True


#: Of each thread, what :func:`_own_paths` returns.
_of_thread = threading.local()


def _close_in_child() -> None:
    _of_thread.__dict__.clear()
    _parked.forget()
    for held in list(_held):
        with contextlib.suppress(OSError):
            held.close()


os.register_at_fork(after_in_child=_close_in_child)


class FileLock(fasteners.InterProcessLock):  # type: ignore[misc]  # fasteners has no type hints
    """A lock file's OFD lock. fasteners brings the waiting, the time-out and the injected sleep.

    Not reusable while held, and not by two threads: make one for each acquisition.
    """

    def __init__(self, path: str, *, shared: bool, host: System, needed: bool = True) -> None:
        super().__init__(path, sleep_func=host.sleep)
        self.file = path  # fasteners keeps it as bytes
        self._shared = shared
        self._needed = needed
        self._host = host
        self._descriptor: HeldDescriptor | None = None

    def _do_open(self) -> None:
        # fasteners opens for writing only, and a shared lock needs a file open for reading.
        if self._descriptor is None:
            self._descriptor = _parked.take(self.file)
        if self._descriptor is not None:
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            try:
                self._descriptor = HeldDescriptor(self.file, flags, 0o644)
            except FileNotFoundError:
                durable.make_directories(os.path.dirname(self.file), _DIRECTORY_MODE)
                self._descriptor = HeldDescriptor(self.file, flags, 0o644)
        except OSError as error:
            if error.errno in _FULL:
                # The file does not exist, so no process holds the lock; and eviction must work on a full
                # filesystem.
                LOG.warning("There is no room for the lock file %s; going on without", self.file)
                return
            if not self._needed:
                LOG.warning("Going on without the lock file %s: %s", self.file, error.strerror)
                return
            odd = odd_entry(error, self.file)
            raise errors.BackendError(
                f"the lock file cannot be opened: {error.strerror}",
                path=self.file if odd is None else odd.path,
                next_step="check its owner and mode" if odd is None else odd.next_step,
            ) from error

    def acquire_now(self) -> bool:
        """Acquire it if it is free, without what fasteners does for those who wait. Returns whether it was.

        :raises BackendError: the lock file cannot be opened.
        """
        self._do_open()
        try:
            self.trylock()
        except BlockingIOError:
            return False
        self.acquired = True
        return True

    def _do_close(self) -> None:
        if self._descriptor is not None:
            self._descriptor.close()
            self._descriptor = None

    def trylock(self) -> None:
        if not self._host.locking or self._descriptor is None:
            return
        try:
            set_lock(self._descriptor.fd, fcntl.F_RDLCK if self._shared else fcntl.F_WRLCK)
        except BlockingIOError:
            raise
        except OSError as error:
            # A filesystem that cannot lock (ENOLCK of an NFS server without lockd): go on without.
            LOG.warning("The lock file %s cannot be locked: %s", self.file, error.strerror)
            return
        if not self._is_at_path():
            # Nova unlinks its lock files: a process that waited on the unlinked inode would hold a lock that
            # no other process sees. Take the file that is at the path now.
            self._do_close()
            self._do_open()
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def unlock(self) -> None:
        """Leave that to the closing of the file: between the two, Nova could get a lock and lose it."""

    def let_go(self) -> None:
        """Release it if it was got, and close the file, or park it."""
        if self.acquired:
            self.acquired = False
            self._do_close()
        elif self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            if not _close_locked(descriptor):
                _parked.put(self.file, descriptor)

    def _is_at_path(self) -> bool:
        assert self._descriptor is not None
        return _is_at(self.file, self._descriptor.fd)


class Watched(Protocol):
    """What the holder of a lock works on, as those see it who wait for the lock."""

    def progress(self) -> object:
        """Return any value that changes while the holder gets on."""

    def is_done(self) -> bool:
        """Whether what the lock is wanted for was done meanwhile, which ends the wait."""


class _Unwatched:
    """Stands for a holder whose work cannot be seen."""

    def progress(self) -> object:
        return None

    def is_done(self) -> bool:
        return False


@contextlib.contextmanager
def waiting(
    path: str,
    *,
    shared: bool,
    host: System,
    stall_timeout: float,
    waiter: Waiter | None = None,
    watched: Watched | None = None,
    needed: bool = True,
    calls_back: bool = False,
) -> Iterator[bool]:
    """Hold a lock for the body. Yields whether the lock was got.

    The body runs without the lock once ``stall_timeout`` seconds went by without any progress: that costs
    work and nothing else, as long as the body evicts nothing that the lock's holder may be using.

    :param waiter: the caller that waits, or None for one that waits as long as it takes.
    :param watched: what the lock's holder works on, or None if that cannot be told.
    :param needed: False for a lock of the whole cache, whose file must not stop everything if it cannot be
        opened: the body runs without the lock then, as where locks do not lock.
    :param calls_back: the body calls what may want the same lock in this thread, such as an observer. That
        would wait for its own caller, and goes on without the lock at once.
    :raises CancelledError, LockTimeoutError: the waiter no longer waits.
    :raises BackendError: the lock file cannot be opened.
    """
    lock = FileLock(path, shared=shared, host=host, needed=needed)
    own = _own_paths()
    is_noted = False
    try:
        got = lock.acquire_now()
        if not got and path in own:
            LOG.warning("This thread itself holds the lock file %s; going on without", path)
        elif not got:
            # Not by the clock of the day: one that is set back must not make a caller wait for the past.
            work = watched or _Unwatched()
            seen, since = work.progress(), host.monotonic()
            host.trace(TracePoint.LOCK_WAITING)
            while not got and host.monotonic() - since < stall_timeout:
                if waiter is not None:
                    waiter.check()
                got = lock.acquire(timeout=min(_SLICE, stall_timeout))
                if not got and work.is_done():
                    break
                if (now_seen := work.progress()) != seen:
                    seen, since = now_seen, host.monotonic()
            else:
                if not got:
                    told = "The lock file %s was held for %g s without progress; going on without"
                    LOG.warning(told, path, stall_timeout)
        if got and calls_back and path not in own:
            own.add(path)
            is_noted = True
        yield got
    finally:
        if is_noted:
            own.discard(path)
        lock.let_go()


def _own_paths() -> set[str]:
    """Return the paths of the lock files that this thread holds, in bodies that may call for them again."""
    paths: set[str] = _of_thread.__dict__.setdefault("paths", set())
    return paths


@contextlib.contextmanager
def without_waiting(path: str, *, host: System) -> Iterator[bool]:
    """Hold an exclusive lock for the body if it is free. Yields whether the lock was got."""
    lock = FileLock(path, shared=False, host=host)
    try:
        yield lock.acquire_now()
    finally:
        lock.let_go()


def is_taken(path: str, *, host: System) -> bool:
    """Return whether any process holds the lock, shared or exclusive. Makes no lock file."""
    descriptor = _parked.take(path) or _opened(path, os.O_RDWR)
    if descriptor is None:
        # Who may not write it cannot hold a lock of Nova's either, which takes one that is exclusive.
        descriptor = _opened(path, os.O_RDONLY)
        if descriptor is None:
            return False
    try:
        return host.locking and bool(is_locked(descriptor.fd))
    finally:
        if not _close_locked(descriptor):
            _parked.put(path, descriptor)


def _opened(path: str, mode: int) -> HeldDescriptor | None:
    try:
        return HeldDescriptor(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
