# SPDX-License-Identifier: Apache-2.0
"""Reading the disks on this host: every file of every directory below the disk roots, as facts.

A disk whose base had its name when the reading began was there by then, if only under the name of a disk in
the making. What has to be ruled out is that a rename hides it from the reading, of a file or of any directory
above it. So known instances are opened by name; and when everything was read, every directory is looked at a
second time: one that changed is listed again, and whatever is new in it is read, until no directory has
changed. What lay where when such a look began was then read, since its directory is unchanged since it was
listed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence

from imagecache_lib import model
from imagecache_lib.store import disk_roots, layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.seen import Boundary, Identity, SeenDirectory
from imagecache_lib.system import atomic_file, mounts
from imagecache_lib.system.filesystem_id import FilesystemIds
from imagecache_lib.system.statx import Statx
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.upkeep import headers
from imagecache_lib.upkeep.facts import (
    DanglingLink,
    Fact,
    Found,
    LinkedFile,
    MissingInstance,
    MissingRoot,
    NotADirectoryName,
    Overlay,
    PassedOver,
    ReadDirectory,
    Unfinished,
    Unreadable,
    Unsettled,
)
from imagecache_lib.upkeep.follow import Follower

#: Nova's other names for an instance's directory, while it is moved and while it is deleted.
SUFFIXES = ("", "_resize", "_del", "")

#: Directories that change while they are read are looked at again, this often.
_MOST_ROUNDS = 64

#: A directory's time of change that is younger than this proves nothing: the coarsest filesystems count whole
#: seconds, FAT two. In nanoseconds.
_GRANULARITY = 2 * 10**9

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

_NO_ANSWER = "it does not answer"

#: What a node says whose device is not there.
_NO_DEVICE = (errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM)


class _Directory:
    """A directory that is being read.

    :ivar prefix: what the paths of its entries begin with.
    :ivar entries: the inode of each name, by its last listing.
    :ivar changed: its ``st_mtime_ns`` before that listing.
    :ivar settled: whether its time of change tells if it has changed since. Else only another listing does.
    :ivar listed: it was listed at least once.
    """

    __slots__ = ("changed", "entries", "listed", "prefix", "seen", "settled")

    def __init__(self, seen: SeenDirectory, status: os.stat_result) -> None:
        self.seen = seen
        self.prefix = seen.path if seen.path.endswith("/") else seen.path + "/"
        self.entries: dict[str, int] = {}
        self.changed = status.st_mtime_ns
        self.settled = False
        self.listed = False


class Scan:
    """One reading of all disk roots. Not reusable.

    :param former_roots: disk roots that a former pass read, besides those that are configured.
    :param condense: makes of long texts what matters of them, so that what guests wrote takes no memory.
    :param follower: gives up what does not answer, or None for one of its own.
    """

    def __init__(
        self,
        cache: CacheStore,
        former_roots: Collection[str] = (),
        *,
        condense: Callable[[tuple[bytes, ...]], tuple[bytes, ...]] = lambda texts: texts,
        follower: Follower | None = None,
    ) -> None:
        self._host = cache.host
        self._condense = condense
        self._follower = follower or Follower()
        self._configured = cache.config.roots
        self._passed_over = cache.config.passed_over
        self._roots = (*self._configured, *(root for root in former_roots if root not in self._configured))
        # What is ours holds no disks, however it is reached.
        self._own = disk_roots.own_directories(cache.config)
        self._clock_device, self._now = _filesystem_clock(cache)
        self._filesystems = FilesystemIds()
        self._statx = Statx()
        self._mounts = mounts.below(self._roots)
        self._facts: list[Fact] = []
        self._found_roots: dict[str, Identity] = {}
        self._lost: dict[str, int] = {}
        self._directories: dict[tuple[int, int], _Directory] = {}
        self._tops: dict[str, _Directory] = {}
        self._again = False

    def run(self, instances: Sequence[model.Instance]) -> Found:
        """Read everything: known instances by name first, then whatever else there is."""
        for root in self._roots:
            self._open_root(root)
        for instance in instances:
            self._read_instance(instance)
        self._host.trace(TracePoint.REFERENCES_KNOWN)
        for root, top in self._tops.items():
            self._list(top, root)
        self._settle()
        self._host.trace(TracePoint.REFERENCES_SCANNED)
        read = tuple(ReadDirectory(each.seen, each.entries) for each in self._directories.values())
        return Found(tuple(self._facts), self._found_roots, read, self._lost)

    # -- roots and instances -------------------------------------------------------------------------

    def _open_root(self, root: str) -> None:
        try:
            # The server of a disk root may be gone, and whoever asks for it waits for ever.
            if not self._follower.roots.call(lambda: os.path.isdir(root)):
                raise OSError(errno.ETIMEDOUT, _NO_ANSWER)
            fd = os.open(root, _OPEN | os.O_DIRECTORY)
        except OSError as error:
            cause = error.strerror or str(error)
            self._facts.append(MissingRoot(root, cause, root in self._configured))
            return
        try:
            status = os.fstat(fd)
            identity = self._identity(fd, status, Boundary.NONE)
        finally:
            os.close(fd)
        self._found_roots[root] = identity
        self._tops[root] = _Directory(SeenDirectory(root, identity), status)
        self._note_lost_and_found(root)

    def _note_lost_and_found(self, root: str) -> None:
        """Note when fsck last put something aside on a root's filesystem, if that is not below the root."""
        top, device = os.path.realpath(root), self._found_roots[root].device
        while (above := os.path.dirname(top)) != top and _device(above) == device:
            top = above
        if top != os.path.realpath(root):
            self._lost_and_found(top)

    def _lost_and_found(self, top: str) -> None:
        try:
            found = os.stat(os.path.join(top, layout.LOST_AND_FOUND), follow_symlinks=False)
        except OSError:
            return
        self._lost[top] = found.st_mtime_ns

    def _read_instance(self, instance: model.Instance) -> None:
        """Read an instance's directories by name: a rename during a directory scan can hide an entry."""
        names = tuple(directory_names(instance))
        last = len(SUFFIXES) - 1
        if len(names) < len(SUFFIXES) * (1 + len(instance.directories)):
            for name in (instance.uuid, *instance.directories):
                if not _is_directory_name(name):
                    self._facts.append(NotADirectoryName(instance.uuid, name))
        found = False
        for root, top in self._tops.items():
            prefix = os.path.join(root, "")
            first = False
            for number, name in enumerate(names):
                place = number % len(SUFFIXES)
                if place == last:
                    if first:
                        continue  # it was there under this name at first
                elif place and first and not os.access(prefix + name, os.F_OK):
                    # Nearly all are absent, and an open that fails takes three times as long. Whatever else
                    # access(2) may mean by that: what keeps its name is in the listing that follows.
                    continue
                there = self._read_tree(prefix + name, top.seen)
                first = there if place == 0 else first
                found = found or there
        if not found and instance.host == self._host.name:
            self._facts.append(MissingInstance(str(instance.uuid)))

    # -- directories ---------------------------------------------------------------------------------

    def _read_tree(self, path: str, above: SeenDirectory, *, link: bool = False) -> bool:
        """Read a directory and all below it. Returns False if there is none of that name."""
        pending = self._read_directory(path, above, link)
        if pending is None:
            return False
        while pending:
            pending.extend(self._read_directory(*pending.pop()) or ())
        return True

    def _read_directory(
        self, path: str, above: SeenDirectory, link: bool
    ) -> list[tuple[str, SeenDirectory, bool]] | None:
        """Read a directory's files, and return its directories, or None if there is none of that name."""
        self._host.trace(TracePoint.REFERENCES_DIRECTORY)
        if path in self._mounts and not self._follower.inside.call(lambda: os.path.isdir(path)):
            self._facts.append(Unreadable(path, _NO_ANSWER, True))
            return []
        try:
            if link:
                fd = os.open(path, _OPEN | os.O_DIRECTORY)
            else:
                fd = os.open(path, _OPEN | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            self._again = True  # it may have another name now, which the listing missed
            return None
        except NotADirectoryError:
            # So says the kernel of a link, too, where a directory is asked for.
            if not link and os.path.islink(path):
                return self._read_directory(path, above, True)
            self._again = True  # it may have another name now, which the listing missed
            return None
        except OSError as error:
            if error.errno == errno.ELOOP and not link:
                return self._read_directory(path, above, True)
            if error.errno != errno.ELOOP:  # a link that leads to itself
                self._unreadable_directory(path, error)
            return []
        try:
            status = os.fstat(fd)
            key = (status.st_dev, status.st_ino)
            if key in self._own or key in self._directories:
                return []
            boundary = Boundary.LINK if link else Boundary.NONE
            seen = SeenDirectory(path, self._identity(fd, status, boundary, above), above)
            directory = self._directories[key] = _Directory(seen, status)
            return self._read_entries(directory, fd)
        except OSError as error:
            self._unreadable_directory(path, error)
            return []
        finally:
            os.close(fd)

    def _list(self, directory: _Directory, path: str) -> None:
        """List a directory, and read what is new in it."""
        self._host.trace(TracePoint.REFERENCES_DIRECTORY)
        try:
            fd = os.open(path, _OPEN | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            self._again = True
            return
        except OSError as error:
            self._unreadable_directory(path, error)
            return
        try:
            status = os.fstat(fd)
            key = (status.st_dev, status.st_ino)
            if key in self._own or self._directories.setdefault(key, directory) is not directory:
                return
            directory.changed = status.st_mtime_ns
            inner = self._read_entries(directory, fd)
        except OSError as error:
            self._unreadable_directory(path, error)
            return
        finally:
            os.close(fd)
        for each in inner:
            self._read_tree(each[0], each[1], link=each[2])

    def _read_entries(self, directory: _Directory, fd: int) -> list[tuple[str, SeenDirectory, bool]]:
        """Read the files that are new in a directory, and return its new directories."""
        inner: list[tuple[str, SeenDirectory, bool]] = []
        before, entries = directory.entries, {}
        path, seen = directory.seen.path, directory.seen
        with os.scandir(fd) as found:
            for entry in found:
                name = entry.name
                inode = entries[name] = entry.inode()
                if before and before.get(name) == inode:
                    continue
                if entry.is_file(follow_symlinks=False):
                    self._read_file(directory, name, fd, inode)
                elif entry.is_dir(follow_symlinks=False):
                    if name in self._passed_over:
                        self._facts.append(PassedOver(directory.prefix + name))
                    elif name == layout.LOST_AND_FOUND and not _is_open(name, fd):
                        self._lost_and_found(path)
                    elif not self._was_read(directory, name, inode):
                        inner.append((directory.prefix + name, seen, False))
                elif entry.is_symlink():
                    self._read_link(directory, name, fd, inode, inner)
                elif stat.S_ISBLK(entry.stat(follow_symlinks=False).st_mode):
                    self._read_device(directory, name, fd, inode)
        if entries != before and directory.listed:
            self._again = True
        directory.entries, directory.listed = entries, True
        # Another directory's clock is another server's, and its granularity unknown.
        identity = seen.identity
        directory.settled = (
            identity is not None
            and identity.device == self._clock_device
            and directory.changed < self._now - _GRANULARITY
        )
        return inner

    def _was_read(self, above: _Directory, name: str, inode: int) -> bool:
        """Whether a directory was read already, under this path. Whether it has changed is seen later."""
        assert above.seen.identity is not None
        known = self._directories.get((above.seen.identity.device, inode))
        return known is not None and known.seen.path == above.prefix + name

    def _settle(self) -> None:
        """Look at every directory again, until none has changed."""
        for _round in range(_MOST_ROUNDS):
            self._again = False
            for directory in list(self._directories.values()):
                self._look_again(directory)
            if not self._again:
                return
        self._facts.append(Unsettled(next(iter(self._tops), "")))

    def _look_again(self, directory: _Directory) -> None:
        path, identity = directory.seen.path, directory.seen.identity
        assert identity is not None
        try:
            status = os.stat(path)
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != (identity.device, identity.inode):
            # It was renamed or removed, and the directory above has changed: it is read anew where it is
            # found.
            self._directories.pop((identity.device, identity.inode))
            self._again = True
            if directory.seen.above is None:
                configured = path in self._configured
                self._facts.append(MissingRoot(path, "it went away while it was read", configured))
            return
        if directory.settled and status.st_mtime_ns == directory.changed:
            return
        self._list(directory, path)

    def _identity(
        self, fd: int, status: os.stat_result, boundary: Boundary, above: SeenDirectory | None = None
    ) -> Identity:
        is_mount, born = self._statx.of_directory(fd)
        if boundary is Boundary.NONE and above is not None and above.identity is not None:
            other = status.st_dev != above.identity.device
            boundary = Boundary.MOUNT if is_mount or other else boundary
        fsid = self._filesystems.of(fd, status.st_dev)
        return Identity(status.st_dev, status.st_ino, fsid, boundary, born)

    # -- files ---------------------------------------------------------------------------------------

    def _read_link(
        self,
        directory: _Directory,
        name: str,
        directory_fd: int,
        inode: int,
        inner: list[tuple[str, SeenDirectory, bool]],
    ) -> None:
        path = os.path.join(directory.seen.path, name)
        answers = self._follower.inside.call(lambda: _status_at(name, directory_fd))
        status = answers[0] if answers else OSError(errno.ETIMEDOUT, _NO_ANSWER)
        if isinstance(status, OSError):
            if status.errno == errno.ENOENT:
                self._facts.append(DanglingLink(path))
            elif status.errno != errno.ELOOP:
                self._facts.append(Unreadable(path, status.strerror or str(status), False, inode))
            return
        if stat.S_ISDIR(status.st_mode):
            if name in self._passed_over:
                self._facts.append(PassedOver(path))
            else:
                inner.append((path, directory.seen, True))
        elif stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
            # Nothing else is opened: opening alone does something to some devices.
            self._facts.append(LinkedFile(path, directory.seen, (status.st_dev, status.st_ino), inode))
            read = self._read_device if stat.S_ISBLK(status.st_mode) else self._read_file
            read(directory, name, directory_fd, inode)

    def _read_file(self, directory: _Directory, name: str, directory_fd: int, inode: int) -> None:
        """Read a file. Most are no overlay, and cost an open, a read and a close."""
        if name.endswith(".new") and atomic_file.UNFINISHED.fullmatch(name):
            self._facts.append(Unfinished(os.path.join(directory.seen.path, name)))
            self._host.trace(TracePoint.REFERENCES_UNFINISHED)
        try:
            fd = os.open(name, _OPEN, dir_fd=directory_fd)
            try:
                head = headers.read_head(fd)
                if not head:
                    return
                references = self._condense(headers.references(fd, head))
                born = self._statx.born(fd) if references else 0
            finally:
                os.close(fd)
        except FileNotFoundError:
            self._again = True  # it may have another name now, which the listing missed
            return
        except OSError as error:
            self._unreadable_file(directory, name, directory_fd, inode, error)
            return
        if references:
            path = directory.prefix + name
            self._facts.append(Overlay(path, directory.seen, references, inode, born))

    def _read_device(self, directory: _Directory, name: str, directory_fd: int, inode: int) -> None:
        """Read a block device: it may never answer, as multipath's while it queues for want of a path."""
        path = directory.prefix + name
        answers = self._follower.inside.call(lambda: _references_at(path))
        answer = answers[0] if answers else OSError(errno.ETIMEDOUT, _NO_ANSWER)
        if isinstance(answer, FileNotFoundError):
            self._again = True
        elif isinstance(answer, OSError):
            if answer.errno not in _NO_DEVICE:
                self._unreadable_file(directory, name, directory_fd, inode, answer)
        elif references := self._condense(answer):
            self._facts.append(Overlay(path, directory.seen, references, inode, 0))

    # -- what cannot be read -------------------------------------------------------------------------

    def _unreadable_file(
        self, directory: _Directory, name: str, directory_fd: int, inode: int, error: OSError
    ) -> None:
        size = None
        try:
            status = os.stat(name, dir_fd=directory_fd)
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
        except OSError:
            pass  # its size is not known then
        path, cause = os.path.join(directory.seen.path, name), error.strerror or str(error)
        born = self._statx.born_at(directory_fd, name)
        self._facts.append(Unreadable(path, cause, False, inode, born, size))

    def _unreadable_directory(self, path: str, error: OSError) -> None:
        try:
            owner = os.stat(path).st_uid
        except OSError:
            owner = os.geteuid()
        rights = (os.R_OK, os.W_OK, os.X_OK)
        foreign = owner != os.geteuid() and not any(os.access(path, right) for right in rights)
        self._facts.append(Unreadable(path, error.strerror or str(error), True, foreign=foreign))


def _status_at(name: str, directory_fd: int) -> os.stat_result | OSError:
    """Return what a link leads to, or why that cannot be told."""
    try:
        return os.stat(name, dir_fd=directory_fd)
    except OSError as error:
        return error


def _references_at(path: str) -> tuple[bytes, ...] | OSError:
    """Return the texts in the header of a block device that may name another file, or why it is not read."""
    try:
        fd = os.open(path, _OPEN)
        try:
            head = headers.read_head(fd) if stat.S_ISBLK(os.fstat(fd).st_mode) else b""
            return headers.references(fd, head) if head else ()
        finally:
            os.close(fd)
    except OSError as error:
        return error


def directory_names(instance: model.Instance) -> Iterator[str]:
    """Yield the names that an instance's directory may have, in the order in which to look for them."""
    for name in plain_names(instance):
        for suffix in SUFFIXES:
            yield name + suffix


def plain_names(instance: model.Instance) -> Iterator[str]:
    """Yield the names that an instance's directory may have while nothing is done to it."""
    return filter(_is_directory_name, (instance.uuid, *instance.directories))


def _is_directory_name(name: object) -> bool:
    """Whether it names one entry of a disk root. ``..`` would be found there, and prove nothing."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return name.isascii() or bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False


def _is_open(name: str, directory_fd: int) -> bool:
    return os.access(name, os.R_OK | os.X_OK, dir_fd=directory_fd)


def _device(path: str) -> int:
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1


def _filesystem_clock(cache: CacheStore) -> tuple[int, int]:
    """Return the device of the cache's filesystem, and the time by its own clock in nanoseconds."""
    try:
        status = os.stat(cache.layout.private)
    except OSError:
        return -1, 0
    return status.st_dev, status.st_mtime_ns
