# SPDX-License-Identifier: Apache-2.0
"""Who has a file: its maker, those that lease it, or QEMU. OFD locks on bytes of the file itself tell.

Unlike for those of :mod:`imagecache_lib.system.locks` nobody waits for them. A filesystem without locks tells
nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator

from imagecache_lib.system.host import System
from imagecache_lib.system.locks import NO_LOCKS, HeldDescriptor, is_locked, set_lock
from imagecache_lib.system.maker import Maker

# QEMU locks bytes 100 to 204 of the images it has open, and leaves those up to 299 free (its
# include/block/block-common.h and block/file-posix.c); qemu-img must be able to write into a stage file that
# we own. A lease's byte is among those of which earlier releases ask who locks them: for them QEMU has the
# base open, and they keep it.
_OWNER_BYTE = (0, 1)
_QEMU_BYTES = (100, 199)
_LEASE_BYTE = (299, 1)


def lease(fd: int, host: System) -> Callable[[], None]:
    """Mark a base image as leased, through the lease's own descriptor. Returns what takes the mark away.

    That is taken away also where a child that was forked meanwhile has the file open still. In the child,
    which shares the mark, nothing is: it may end in the middle of the lease's body.

    On a filesystem without locks nothing shows the lease; the look at the base's name at its end has to do.
    """
    maker = Maker()

    def end() -> None:
        if maker.is_here:
            with contextlib.suppress(OSError):
                set_lock(fd, fcntl.F_UNLCK, *_LEASE_BYTE)

    if host.locking:
        with contextlib.suppress(OSError):
            set_lock(fd, fcntl.F_RDLCK, *_LEASE_BYTE)
    return end


def is_leased(fd: int) -> bool:
    """Whether a lease of any process, through another descriptor, is on a base image."""
    return bool(is_locked(fd, *_LEASE_BYTE))


def is_open_in_qemu(fd: int) -> bool:
    """Whether a QEMU on this host has the image open."""
    return bool(is_locked(fd, *_QEMU_BYTES))


class OwnerLock:
    """The lock that marks a file in flight as owned, held on the file itself for the owner's life."""

    def __init__(self, held: HeldDescriptor, host: System) -> None:
        """Take over a file of our own, and lock it. A filesystem without locks is fine."""
        self._held = held
        self._locking = host.locking
        if self._locking:
            with contextlib.suppress(OSError):
                set_lock(held.fd, fcntl.F_WRLCK, *_OWNER_BYTE)

    @property
    def fd(self) -> int:
        return self._held.fd

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Drop the lock for the body, for a program that takes its own lock on the whole file.

        Until the file is idle for long it still counts as owned.
        """
        with contextlib.suppress(OSError):
            set_lock(self.fd, fcntl.F_UNLCK, *_OWNER_BYTE)
        try:
            yield
        finally:
            if self._locking:
                with contextlib.suppress(OSError):
                    set_lock(self.fd, fcntl.F_WRLCK, *_OWNER_BYTE)

    def close(self) -> None:
        """Drop the lock, also where a child that was forked as the file was opened has it, and close it."""
        with contextlib.suppress(OSError):  # it is closed already, as in a forked child
            set_lock(self.fd, fcntl.F_UNLCK, *_OWNER_BYTE)
        self._held.close()


def has_owner(fd: int) -> bool | None:
    """Whether another open file description holds an :class:`OwnerLock` on the file.

    Returns None if the filesystem has no locks.
    """
    return is_locked(fd, *_OWNER_BYTE)


def try_own(fd: int) -> bool:
    """Take the owner's lock of a file if it is free. Returns whether the lock was got.

    The lock ends when the descriptor is closed. On a filesystem without locks it is always free.
    """
    try:
        set_lock(fd, fcntl.F_WRLCK, *_OWNER_BYTE)
    except OSError as error:
        return error.errno in NO_LOCKS
    return True
