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
from collections.abc import Callable, Collection, Iterator, Sequence

from imagecache_lib import model
from imagecache_lib.store import disk_roots
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.identity import identity_of
from imagecache_lib.store.seen import Boundary, Identity, SeenDirectory
from imagecache_lib.system import mounts
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.filesystem_id import FilesystemIds
from imagecache_lib.system.statx import Statx
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.upkeep.facts import (
    Fact,
    Found,
    MissingInstance,
    MissingRoot,
    MountPoint,
    NotADirectoryName,
    ReadDirectory,
    Unreadable,
    Unsettled,
)
from imagecache_lib.upkeep.follow import NO_ANSWER, Follower
from imagecache_lib.upkeep.reading import (
    Directory,
    Inner,
    Look,
    Surroundings,
    changes,
    mount_of,
    note_lost_and_found,
)

#: Nova's other names for an instance's directory, while it is moved and while it is deleted.
SUFFIXES = ("", "_resize", "_del", "")

#: Directories that change while they are read are looked at again, this often.
_MOST_ROUNDS = 64

#: Most bytes of a file's name, in any filesystem of Linux (NAME_MAX of linux/limits.h).
_LONGEST_NAME = 255

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class Scan:
    """One reading of all disk roots. Not reusable.

    :param more_roots: disk roots that a former pass read, or that another process of this host names, besides
        those that are configured.
    :param condense: makes of long texts what matters of them, so that what guests wrote takes no memory.
    :param follower: gives up what does not answer, or None for one of its own.
    """

    def __init__(
        self,
        cache: CacheStore,
        more_roots: Collection[str] = (),
        *,
        condense: Callable[[tuple[bytes, ...]], tuple[bytes, ...]] = lambda texts: texts,
        follower: Follower | None = None,
    ) -> None:
        self._host = cache.host
        self._follower = follower or Follower()
        self._configured = cache.config.roots
        self._roots = (*self._configured, *(root for root in more_roots if root not in self._configured))
        self._table = mounts.table()
        self._mounted = [path for path, _which in self._table]
        self._mounts: set[str] = set()
        self._without_links: dict[str, str] = {}
        self._facts: list[Fact] = []
        self._found_roots: dict[str, Identity] = {}
        self._lost: dict[str, int] = {}
        self._directories: dict[tuple[int, int], Directory] = {}
        self._tops: dict[str, Directory] = {}
        self._again = False
        device, now = _filesystem_clock(cache)
        self._around = Surroundings(
            host=self._host,
            follower=self._follower,
            condense=condense,
            # What is ours holds no disks, however it is reached.
            own=disk_roots.own_directories(cache.config),
            passed_over=cache.config.passed_over,
            mounts=self._mounts,
            directories=self._directories,
            filesystems=FilesystemIds(),
            statx=Statx(),
            device=device,
            now=now,
        )

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
        # No directory changes as something is mounted on it, or is not any more. What was read there is
        # covered now, or what was mounted there may not have been read.
        if changed := {path for path, _which in set(self._table).symmetric_difference(mounts.table())}:
            self._mounted += changed
            unsettled: set[str] = set()
            for path, real in list(self._without_links.items()):
                self._note_mounts(path, real)
                unsettled.update(mounts.below(path, real, changed))
            self._facts += [Unsettled(path) for path in sorted(unsettled)]
        self._facts += [MountPoint(path) for path in sorted(self._mounts)]
        read = tuple(ReadDirectory(each.seen, each.entries) for each in self._directories.values())
        return Found(tuple(self._facts), self._found_roots, read, self._lost)

    # -- roots and instances -------------------------------------------------------------------------

    def _open_root(self, root: str) -> None:
        # The server of a disk root may be gone, and whoever asks for it waits for ever.
        # One that this process does not name must not hide those that it does.
        looks = self._follower.roots if root in self._configured else self._follower.at(root)
        answers = looks.call(lambda: _opened(root, self._around.filesystems))
        opened = answers[0] if answers else OSError(errno.ETIMEDOUT, NO_ANSWER)
        if isinstance(opened, OSError):
            cause = opened.strerror or str(opened)
            self._facts.append(MissingRoot(root, cause, root in self._configured))
            return
        identity, status, real, lost = opened
        self._note_mounts(root, real)
        self._found_roots[root] = identity
        mount = None if identity.device == self._around.device else root
        self._tops[root] = Directory(SeenDirectory(root, identity), status, mount)
        self._lost.update(lost)

    def _note_mounts(self, path: str, real: str) -> None:
        """Note where something is mounted below a directory to which a disk root or a link in one leads.

        :param real: its path without links.
        """
        self._without_links[path] = real
        self._mounts.update(mounts.below(path, real, self._mounted))

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
                elif place and first and top.mount is None and not os.access(prefix + name, os.F_OK):
                    # Nearly all are absent, and an open that fails takes three times as long. Whatever else
                    # access(2) may mean by that: what keeps its name is in the listing that follows.
                    continue
                there = self._read_tree(Inner(prefix + name, top.seen, top.mount))
                first = there if place == 0 else first
                found = found or there
        if not found and instance.host == self._host.name:
            self._facts.append(MissingInstance(instance.uuid))

    # -- directories ---------------------------------------------------------------------------------

    def _read_tree(self, top: Inner) -> bool:
        """Read a directory and all below it. Returns False if there is none of that name."""
        pending = self._read_directory(top)
        if pending is None:
            return False
        while pending:
            pending.extend(self._read_directory(pending.pop()) or ())
        return True

    def _read_directory(self, which: Inner) -> list[Inner] | None:
        """Read a directory's files, and return its directories, or None if there is none of that name."""
        path, mount = which.path, which.mount
        if path in self._mounts:
            mount = path
            if not self._follower.inside.call(lambda: os.path.isdir(path)):
                self._facts.append(Unreadable(path, NO_ANSWER, True))
                return []
        if which.leads_to is not None:
            self._note_mounts(path, which.leads_to)
        look = Look(path, self._around, mount=mount, above=which.above, follow=which.leads_to is not None)
        self._host.trace(TracePoint.REFERENCES_DIRECTORY)
        self._take(look)
        if look.is_absent:
            self._miss(which)
            return None
        return self._read_link(which) if look.is_link else look.inner

    def _miss(self, which: Inner) -> None:
        """Have what was listed and is not there looked for in the next listing: renamed away, it may have
        got its name back by then."""
        identity = which.above.identity
        assert identity is not None
        if (above := self._directories.get((identity.device, identity.inode))) is not None:
            above.miss(os.path.basename(which.path))

    def _read_link(self, which: Inner) -> list[Inner] | None:
        """Read the directory to which a link leads."""
        path = which.path
        answers = self._follower.inside.call(lambda: mount_of(path, self._around.device))
        if answers:
            return self._read_directory(Inner(path, which.above, *answers[0]))
        self._facts.append(Unreadable(path, NO_ANSWER, True))
        return []

    def _list(self, directory: Directory, path: str, *, anew: bool = False) -> None:
        """List a directory, and read what is new in it.

        :param anew: as that of :class:`Look`.
        """
        look = Look(path, self._around, mount=directory.mount, follow=True, directory=directory, anew=anew)
        self._host.trace(TracePoint.REFERENCES_DIRECTORY)
        self._take(look)
        for each in look.inner:
            self._read_tree(each)

    def _take(self, look: Look) -> None:
        """Let a look be made, and take over what it found."""
        if look.mount is None:
            look.make()
        elif not self._follower.at(look.mount).call(look.make, progress=look.entries):
            self._facts.append(Unreadable(look.path, NO_ANSWER, True))
            self._forget(look.directory)
            look.inner = []
            return
        self._facts += look.facts
        if look.lost:
            self._lost.update(look.lost)
        if look.again:
            self._again = True
        if look.found is None:
            if look.is_unreadable:
                self._forget(look.directory)
            return
        look.found.take(look)
        self._directories[look.key] = look.found

    def _forget(self, directory: Directory | None) -> None:
        """Take a directory for one that was not read: that something is not in it proves nothing."""
        for key, each in list(self._directories.items()):
            if each is directory:
                del self._directories[key]

    def _settle(self) -> None:
        """Look at every directory again, until none has changed."""
        for _round in range(_MOST_ROUNDS):
            self._again = False
            for directory in list(self._directories.values()):
                self._look_again(directory)
            if not self._again:
                return
        missed = [path for each in self._directories.values() for path in each.missed()]
        self._facts += [Unreadable(path, "it is listed, and is not found", False) for path in missed]
        if not missed:
            self._facts.append(Unsettled(next(iter(self._tops), "")))

    def _look_again(self, directory: Directory) -> None:
        path, identity = directory.seen.path, directory.seen.identity
        assert identity is not None
        if directory.mount is None:
            status = _status(path)
        elif answers := self._follower.at(directory.mount).call(lambda: _status(path)):
            status = answers[0]
        else:
            self._facts.append(Unreadable(path, NO_ANSWER, True))
            self._forget(directory)
            return
        if status is None or (status.st_dev, status.st_ino) != (identity.device, identity.inode):
            # It was renamed or removed, and the directory above has changed: it is read anew where it is
            # found.
            if self._directories.get((identity.device, identity.inode)) is directory:
                del self._directories[identity.device, identity.inode]
            else:
                self._forget(directory)  # another one was read in its place, as it went away
            self._again = True
            if directory.seen.above is None:
                configured = path in self._configured
                self._facts.append(MissingRoot(path, "it went away while it was read", configured))
            return
        is_changed = changes(status) != directory.changed
        if is_changed or not directory.settled:
            self._list(directory, path, anew=is_changed)


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
        return len(os.fsencode(name)) <= _LONGEST_NAME
    except UnicodeEncodeError:
        return False


def _opened(
    root: str, filesystems: FilesystemIds
) -> tuple[Identity, os.stat_result, str, dict[str, int]] | OSError:
    """Return which directory a disk root is, its path without links, and when fsck last put something aside
    on its filesystem, if that is not below the root; or why it cannot be opened."""
    try:
        with Descriptor(root, _OPEN | os.O_DIRECTORY) as fd:
            status = os.fstat(fd)
            identity = identity_of(fd, status, filesystems, Statx(), Boundary.NONE, None)
    except OSError as error:
        return error
    lost: dict[str, int] = {}
    real = top = os.path.realpath(root)
    while (above := os.path.dirname(top)) != top and _device(above) == identity.device:
        top = above
    if top != real:
        note_lost_and_found(top, lost)
    return identity, status, real, lost


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _device(path: str) -> int:
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1


def _filesystem_clock(cache: CacheStore) -> tuple[int, int]:
    """Return the device of the cache's filesystem, and the time by its own clock in nanoseconds, or 0."""
    try:
        status = os.stat(cache.layout.private)
    except OSError:
        return _device(cache.layout.base_path), 0  # another program made it
    return status.st_dev, status.st_mtime_ns
