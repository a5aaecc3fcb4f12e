# SPDX-License-Identifier: Apache-2.0
"""Reading one directory of disks: each file in it as a fact, and which directories it holds.

The directory's server may cease to answer in the middle, and whoever waits for it then waits for ever. So a
look keeps what it finds to itself, until it has come back and whoever asked for it takes that over.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from imagecache_lib.store import layout
from imagecache_lib.store.identity import identity_of
from imagecache_lib.store.seen import Boundary, SeenDirectory
from imagecache_lib.system import atomic_file, block_devices
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.filesystem_id import FilesystemIds
from imagecache_lib.system.host import System
from imagecache_lib.system.statx import Statx
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.upkeep import headers
from imagecache_lib.upkeep.facts import (
    DanglingLink,
    DeviceNode,
    Fact,
    LinkedFile,
    Overlay,
    PassedOver,
    Unfinished,
    Unreadable,
)
from imagecache_lib.upkeep.follow import NO_ANSWER, Follower, Mount

#: A directory's time of change that is younger than this proves nothing: the coarsest filesystems count whole
#: seconds, FAT two. In nanoseconds.
_GRANULARITY = 2 * 10**9

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

#: Stands for the inode of a name that was listed, and was not there when it was to be read.
MISSED = 0

#: What a node says whose device is not there.
_NO_DEVICE = (errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM)


class Directory:
    """A directory that is being read.

    :ivar prefix: what the paths of its entries begin with.
    :ivar entries: the inode of each name, by its last listing, or :data:`MISSED`.
    :ivar changed: its times of change before that listing.
    :ivar settled: whether its time of change tells if it has changed since. Else only another listing does.
    :ivar listed: it was listed at least once.
    :ivar mount: by what :meth:`Follower.at` knows the filesystem that it is on, or None for the cache's.
    """

    __slots__ = ("changed", "entries", "listed", "mount", "prefix", "seen", "settled")

    def __init__(self, seen: SeenDirectory, status: os.stat_result, mount: Mount | None) -> None:
        self.seen = seen
        self.prefix = seen.path if seen.path.endswith("/") else seen.path + "/"
        self.entries: dict[str, int] = {}
        self.changed = changes(status)
        self.settled = False
        self.listed = False
        self.mount = mount

    def take(self, look: Look) -> None:
        """Take over what a look found."""
        self.changed = look.changed
        self.entries, self.listed = look.entries, True
        self.settled = look.settled

    def miss(self, name: str) -> None:
        """Have a name that was listed read at the next listing: it was not there when it was to be read."""
        if name in self.entries:
            self.entries[name] = MISSED
            self.settled = False

    def missed(self) -> Iterator[str]:
        """Yield the paths of what was listed and never read."""
        return (self.prefix + name for name, inode in self.entries.items() if inode == MISSED)


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What every look of a scan needs to know.

    :param condense: makes of long texts what matters of them.
    :param own: the directories that are the cache's own, by ``(st_dev, st_ino)``.
    :param passed_over: names of directories that hold no disks.
    :param mounts: paths below the disk roots at which something is mounted.
    :param directories: what was read already, by ``(st_dev, st_ino)``.
    :param statx: for looks that are not given up.
    :param device: of the cache's filesystem.
    :param now: the time by that filesystem's clock, in nanoseconds.
    """

    host: System
    follower: Follower
    condense: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]
    own: Collection[tuple[int, int]]
    passed_over: Collection[str]
    mounts: Collection[str]
    directories: Mapping[tuple[int, int], Directory]
    filesystems: FilesystemIds
    statx: Statx
    device: int
    now: int


class Inner(NamedTuple):
    """A directory in a directory, or a link to one.

    :param mount: as that of :class:`Directory`.
    :param leads_to: the path without links of what a link leads to, or None if it is none.
    """

    path: str
    above: SeenDirectory
    mount: Mount | None
    leads_to: str | None = None


class Look:
    """One look at a directory: a listing of it, and a reading of what is new in it. Not reusable.

    :param mount: as that of :class:`Directory`.
    :param above: the directory that it is in, or None for a disk root.
    :param follow: whether a link is followed.
    :param directory: what is known of it, or None if it has not been read yet.
    :param anew: whether its files are read again that have the inode which they had. A file that was made
        since may have the number of one that was removed.
    :ivar found: the directory if it was read to its end, or None.
    :ivar key: its ``(st_dev, st_ino)`` then.
    :ivar changed: its times of change before the listing.
    :ivar settled: as that of :class:`Directory`.
    :ivar entries: the inode of each name, or :data:`MISSED`. It grows as the look gets on.
    :ivar facts: of its files.
    :ivar inner: the directories in it that were not read before.
    :ivar lost: what :func:`note_lost_and_found` noted.
    :ivar is_link: there is a link of that name, which was not to be followed.
    :ivar is_absent: there is no directory of that name.
    :ivar is_unreadable: it cannot be read, or not to its end.
    :ivar again: something has another name than it had, and may have been missed.
    """

    # Most keep these, and there is a look for each directory.
    found: Directory | None = None
    key = (0, 0)
    changed = (0, 0)
    settled = is_link = is_absent = is_unreadable = again = _has_missed = False

    def __init__(
        self,
        path: str,
        around: Surroundings,
        *,
        mount: Mount | None,
        above: SeenDirectory | None = None,
        follow: bool = False,
        directory: Directory | None = None,
        anew: bool = False,
    ) -> None:
        self.path = path
        self.mount = mount
        self.facts: list[Fact] = []
        self.inner: list[Inner] = []
        self.lost: dict[str, int] = {}
        self.entries: dict[str, int] = {}
        self.directory = directory
        self._around = around
        self._above = above
        self._follow = follow
        self._anew = anew
        # The buffer of one that was given up may be written to at any time.
        self._statx = around.statx if mount is None else Statx()

    def make(self) -> None:
        """Make the look. Raises nothing: what cannot be read is a fact."""
        try:
            directory = Descriptor(self.path, _OPEN | os.O_DIRECTORY | (0 if self._follow else os.O_NOFOLLOW))
        except FileNotFoundError:
            self.is_absent = self.again = True  # it may have another name now, which the listing missed
            return
        except NotADirectoryError:
            # So says the kernel of a link, too, where a directory is asked for.
            self.is_link = not self._follow and os.path.islink(self.path)
            self.is_absent = self.again = not self.is_link
            return
        except OSError as error:
            self.is_link = error.errno == errno.ELOOP and not self._follow
            if error.errno != errno.ELOOP:  # a link that leads to itself
                self._unreadable_directory(error)
            return
        try:
            with directory as fd:
                self._read(fd)
        except OSError as error:
            self.inner = []
            if error.errno in (errno.ENOENT, errno.ESTALE):
                self.is_absent = self.again = True  # another host took it away from under us
                return
            self._unreadable_directory(error)

    def _read(self, fd: int) -> None:
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        if key in self._around.own and not self._is_root():
            return
        if self._around.directories.get(key, self.directory) is not self.directory:
            return  # it was read already, under another name
        directory = self.directory
        if directory is None:
            boundary = Boundary.LINK if self._follow else Boundary.NONE
            identity = identity_of(fd, status, self._around.filesystems, self._statx, boundary, self._above)
            directory = Directory(SeenDirectory(self.path, identity, self._above), status, self.mount)
        self.key, self.changed = key, changes(status)
        self._read_entries(directory, fd)
        # Another directory's clock is another server's, and its granularity unknown.
        here = directory.seen.identity is not None and directory.seen.identity.device == self._around.device
        old = here and max(self.changed) < self._around.now - _GRANULARITY
        self.settled = old and not self._has_missed
        self.found = directory

    def _is_root(self) -> bool:
        """Whether a disk root is looked at. It may have disks though it is the cache's own, by a link."""
        return self.directory is not None and self.directory.seen.above is None

    def _read_entries(self, directory: Directory, fd: int) -> None:
        """Read the files that are new in a directory, and note its new directories."""
        before, entries = directory.entries, self.entries
        with os.scandir(fd) as listing:
            for entry in listing:
                name = entry.name
                inode = entries[name] = entry.inode()
                if before and not self._anew and before.get(name) == inode:
                    continue
                if entry.is_file(follow_symlinks=False):
                    self._read_file(directory, name, fd, inode)
                elif entry.is_dir(follow_symlinks=False):
                    self._note_directory(directory, name, fd, inode)
                elif entry.is_symlink():
                    self._read_link(directory, name, fd, inode)
                elif self._is_block_device(name, fd):
                    self.facts.append(DeviceNode(directory.prefix + name))
                    self._read_device(directory, name, fd, inode)
        if entries != before and directory.listed:
            self.again = True

    def _is_block_device(self, name: str, directory_fd: int) -> bool:
        try:
            return stat.S_ISBLK(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            self._missed(name)  # a QEMU's socket, most likely, that went with it
            return False

    def _note_directory(self, directory: Directory, name: str, fd: int, inode: int) -> None:
        if name in self._around.passed_over:
            self.facts.append(PassedOver(directory.prefix + name))
        elif name == layout.LOST_AND_FOUND and not os.access(name, os.R_OK | os.X_OK, dir_fd=fd):
            note_lost_and_found(directory.seen.path, self.lost)
        elif not self._was_read(directory, name, inode):
            self.inner.append(Inner(directory.prefix + name, directory.seen, self.mount))

    def _was_read(self, above: Directory, name: str, inode: int) -> bool:
        """Whether a directory was read already, under this path. Whether it has changed is seen later."""
        assert above.seen.identity is not None
        known = self._around.directories.get((above.seen.identity.device, inode))
        return known is not None and known.seen.path == above.prefix + name

    def _read_link(self, directory: Directory, name: str, directory_fd: int, inode: int) -> None:
        path = directory.prefix + name
        answers = self._around.follower.inside.call(lambda: _where_it_leads(name, directory_fd, path))
        status, real = answers[0] if answers else (OSError(errno.ETIMEDOUT, NO_ANSWER), path)
        if isinstance(status, OSError):
            if status.errno == errno.ENOENT:
                # A base has another name while an eviction looks who needs it, and the link has not.
                target = self._around.follower.inside.call(lambda: os.path.realpath(path))
                self.facts.append(DanglingLink(path, target[0] if target else ""))
            elif status.errno != errno.ELOOP:
                self.facts.append(Unreadable(path, status.strerror or str(status), False, inode))
            return
        if stat.S_ISDIR(status.st_mode):
            if name in self._around.passed_over:
                self.facts.append(PassedOver(path))
            else:
                mount = _mount(status, self._around.device)
                self.inner.append(Inner(path, directory.seen, mount, real))
        elif stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
            # Nothing else is opened: opening alone does something to some devices.
            self.facts.append(LinkedFile(path, directory.seen, (status.st_dev, status.st_ino), inode))
            known = directory.seen.identity
            near = (self._around.device, self._around.device if known is None else known.device)
            if stat.S_ISREG(status.st_mode) and status.st_dev in near:
                self._read_file(directory, name, directory_fd, inode, status.st_size)
            else:
                size = status.st_size if stat.S_ISREG(status.st_mode) else None
                self._read_device(directory, name, directory_fd, inode, size)

    def _read_file(
        self, directory: Directory, name: str, directory_fd: int, inode: int, size: int | None = None
    ) -> None:
        """Read a file. Most are no overlay, and cost an open, a read and a close."""
        # Whoever closes a lock file drops the locks that Nova has on it in this process.
        if name.startswith(layout.LOCK_PREFIX) and _size_at(name, directory_fd) == 0:
            return
        if name.endswith(".new") and atomic_file.UNFINISHED.fullmatch(name):
            self.facts.append(Unfinished(directory.prefix + name))
            self._around.host.trace(TracePoint.REFERENCES_UNFINISHED)
        try:
            with Descriptor(name, _OPEN, dir_fd=directory_fd) as fd:
                if self._around.mounts:
                    self._note_mounted(directory, name, fd, inode)
                head = headers.read_head(fd)
                if not head:
                    return
                references = self._around.condense(headers.references(fd, head))
                if not references:
                    return
                is_mount, born = self._statx.mount_and_birth(fd)
                seen = self._mounted(fd, directory.seen) if is_mount else directory.seen
        except FileNotFoundError:
            self._missed(name)
            return
        except OSError as error:
            if size is None:
                size = _size_at(name, directory_fd)
            self._unreadable_file(directory, name, directory_fd, inode, error, size)
            return
        self.facts.append(Overlay(directory.prefix + name, seen, references, inode, born))

    def _note_mounted(self, directory: Directory, name: str, fd: int, inode: int) -> None:
        """Note which file is mounted under a name: it may be a base itself."""
        path = directory.prefix + name
        if path in self._around.mounts:
            status, seen = os.fstat(fd), self._mounted(fd, directory.seen)
            self.facts.append(LinkedFile(path, seen, (status.st_dev, status.st_ino), inode))

    def _mounted(self, fd: int, directory: SeenDirectory) -> SeenDirectory:
        """Return what stands for the directory of a file that is itself a mount: without that, another file
        has its name in the directory."""
        filesystems, boundary = self._around.filesystems, Boundary.MOUNT
        identity = identity_of(fd, os.fstat(fd), filesystems, self._statx, boundary, None)
        return SeenDirectory(directory.path, identity, directory)

    def _read_device(
        self, directory: Directory, name: str, directory_fd: int, inode: int, size: int | None = None
    ) -> None:
        """Read what may never answer: a block device, as multipath's while it queues for want of a path; or
        what a link leads to on another filesystem."""
        path = directory.prefix + name
        answers = self._around.follower.inside.call(lambda: _references_at(path))
        named, error = answers[0] if answers else ((), OSError(errno.ETIMEDOUT, NO_ANSWER))
        if references := self._around.condense(named):
            self.facts.append(Overlay(path, directory.seen, references, inode, 0))
        if isinstance(error, FileNotFoundError):
            self._missed(name)
        elif error is not None and error.errno not in _NO_DEVICE:
            self._unreadable_file(directory, name, directory_fd, inode, error, size)

    def _missed(self, name: str) -> None:
        """Note that what was listed was not there: it may have another name now, which the listing missed,
        and have got this one back when the directory is listed again."""
        self.entries[name] = MISSED
        self.again = self._has_missed = True

    # -- what cannot be read -------------------------------------------------------------------------

    def _unreadable_file(
        self,
        directory: Directory,
        name: str,
        directory_fd: int,
        inode: int,
        error: OSError,
        size: int | None,
    ) -> None:
        born = self._statx.born_at(directory_fd, name)
        cause = error.strerror or str(error)
        self.facts.append(Unreadable(directory.prefix + name, cause, False, inode, born, size))

    def _unreadable_directory(self, error: OSError) -> None:
        try:
            owner = os.stat(self.path).st_uid
        except OSError:
            owner = os.geteuid()
        rights = (os.R_OK, os.W_OK, os.X_OK)
        foreign = owner != os.geteuid() and not any(os.access(self.path, right) for right in rights)
        cause, too_deep = error.strerror or str(error), error.errno == errno.ENAMETOOLONG
        self.facts.append(Unreadable(self.path, cause, True, foreign=foreign, too_deep=too_deep))
        self.is_unreadable = True


def changes(status: os.stat_result) -> tuple[int, int]:
    """Return when a directory changed, in nanoseconds. A program that copies files sets ``st_mtime``, also
    back to what it was, and some filesystems have no ``st_ctime``."""
    return status.st_mtime_ns, status.st_ctime_ns


def mount_of(path: str, device: int) -> tuple[Mount | None, str]:
    """Return by what :meth:`Follower.at` knows the filesystem that a link leads to, or None for the cache's,
    and the path of what it leads to, without links.

    :param device: of the cache's filesystem.
    """
    status, real = _where_it_leads(path, None, path)
    if isinstance(status, OSError):
        return None, real  # what it is, if it is there at all, shows as it is opened
    return _mount(status, device), real


def _mount(status: os.stat_result, device: int) -> int | None:
    return None if status.st_dev == device else status.st_dev


def note_lost_and_found(top: str, lost: dict[str, int]) -> None:
    """Note when fsck last put something aside on the filesystem of which a directory is the top."""
    try:
        found = os.stat(os.path.join(top, layout.LOST_AND_FOUND), follow_symlinks=False)
    except OSError:
        return
    lost[top] = found.st_mtime_ns


def _size_at(name: str, directory_fd: int) -> int | None:
    """Return the apparent bytes of a regular file, or None if it is none or they cannot be told."""
    try:
        status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _where_it_leads(name: str, directory_fd: int | None, path: str) -> tuple[os.stat_result | OSError, str]:
    """Return what a link leads to, or why that cannot be told, and the path of that without links."""
    try:
        return os.stat(name, dir_fd=directory_fd), os.path.realpath(path)
    except OSError as error:
        return error, path


def _references_at(path: str) -> tuple[tuple[bytes, ...], OSError | None]:
    """Return the texts in the header of a file or a block device that may name another file, and the files
    that a device is made of; and why that is not all of them, if it is not."""
    beneath: tuple[bytes, ...] = ()
    untold: OSError | None = None
    try:
        status = os.stat(path)
        is_device = stat.S_ISBLK(status.st_mode)
        if is_device:
            try:
                beneath = block_devices.files_beneath(status.st_rdev)
            except OSError as error:
                untold = error  # of a device that is not there, opening it says so
        with Descriptor(path, _OPEN) as fd:
            head = headers.read_head(fd) if is_device or stat.S_ISREG(status.st_mode) else b""
            return (*(headers.references(fd, head) if head else ()), *beneath), untold
    except OSError as error:
        return beneath, error
