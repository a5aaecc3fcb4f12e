# SPDX-License-Identifier: Apache-2.0
"""Reading which bases the disks on this host refer to: every regular file of every instance directory.

A reference is any cached name that occurs in a backing string, with no path resolved, so that other mount
paths, relative and ``json:`` references all count. Each file gives one of three outcomes: it refers to
nothing, it refers to these names, or it cannot be told. Only a file that cannot be read cannot be told: a
guest may write any header into its raw disk, and must not stop eviction with it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from imagecache_lib import model
from imagecache_lib.formats.qcow2 import header
from imagecache_lib.store import disk_roots, layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import host_id
from imagecache_lib.system import atomic_file
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.upkeep import headers

if TYPE_CHECKING:
    from imagecache_lib.upkeep.references import Memory

#: Nova's other names for an instance's directory, while it is moved and while it is deleted.
_SUFFIXES = ("", "_resize", "_del", "")

#: A directory that changed while it was listed is read again, this often.
_MOST_ROUNDS = 64

_WAIT = "wait for the next pass"

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True)
class Found:
    """What a scan found.

    :param readings: cached names by path of the disk that refers to them.
    :param unknown: why nothing may be evicted, as a clause. None: all could be read.
    :param problems: what could not be read, a sentence each with what to do.
    :param roots: what each disk root is: ``(st_dev, f_fsid)``.
    :param unfinished: paths of disks in the making, or of what is left of one.
    """

    readings: dict[str, tuple[str, ...]]
    unknown: str | None
    problems: list[str]
    roots: dict[str, tuple[int, int]]
    unfinished: list[str]


class Scan:
    """One reading of all disk roots. Not reusable.

    A disk whose base had its name when the reading began was there by then, if only under the name of a disk
    in the making. What has to be ruled out is that a rename hides it from the reading. One of the file: a
    directory that changed meanwhile is read again. One of the directory: known instances are opened by name,
    and a root is listed until it held still.
    """

    def __init__(self, cache: CacheStore, names: Collection[str], memory: Memory) -> None:
        self._host = cache.host
        self._roots = cache.config.roots
        self._names = frozenset(names)
        # Names that are no sha1 are few, and looked for one by one.
        self._short = [name for name in names if not layout.SHA1_ANYWHERE.match(name.encode())]
        self._memory = memory
        self._host_id = host_id(cache.host.name)
        self._readings: dict[str, tuple[str, ...]] = {}
        self._unknown: str | None = None
        self._problems: list[str] = []
        self._found_roots: dict[str, tuple[int, int]] = {}
        self._unfinished: list[str] = []
        # What is ours counts as visited: it holds no disks, however it is reached.
        self._visited = disk_roots.own_directories(cache.config)

    def run(self, instances: Sequence[model.Instance]) -> Found:
        """Read everything once: known instances by name first, then whatever else there is."""
        present = [root for root in self._roots if self._is_there(root, instances)]
        for instance in instances:
            self._read_instance(instance, present)
        self._host.trace(TracePoint.REFERENCES_KNOWN)
        for root in present:
            self._read_root(root)
        self._host.trace(TracePoint.REFERENCES_SCANNED)
        return Found(
            self._readings, self._unknown, self._problems, self._found_roots, sorted(set(self._unfinished))
        )

    # -- roots and directories -----------------------------------------------------------------------

    def _is_there(self, root: str, instances: Sequence[model.Instance]) -> bool:
        """Whether a disk root is mounted: an empty mount point would look like a host without disks."""
        try:
            status = os.stat(root)
            now = (status.st_dev, _fsid(root))
        except OSError as error:
            self._cannot_tell(root, error, "mount it, or take it out of disk_roots")
            if root in self._memory.roots:
                self._found_roots[root] = self._memory.roots[root]
            return False
        before = self._memory.roots.get(root)
        moved = before is not None and before[0] != now[0] and before[1] != now[1]
        if moved and not self._is_vouched_for(root, instances):
            self._everything_stays(
                f"the disk root {root} is on another device than before",
                "mount what belongs there; if this is right, run once:"
                f" imagecache host forget {self._host_id}",
            )
            self._found_roots[root] = before if before is not None else now
            return True
        self._found_roots[root] = now
        return True

    def _is_vouched_for(self, root: str, instances: Sequence[model.Instance]) -> bool:
        """Whether a root is the one it was, though its device's numbers changed, as they may at a boot.

        A disk that was read in it before is there, or there are local instances, and all are in it.
        """
        beneath = os.path.join(root, "")
        if any(path.startswith(beneath) and os.path.lexists(path) for path in self._memory.readings):
            return True
        local = [instance for instance in instances if instance.host == self._host.name]
        return bool(local) and all(
            any(os.path.isdir(os.path.join(root, name)) for name in _directories(instance))
            for instance in local
        )

    def _read_instance(self, instance: model.Instance, roots: list[str]) -> None:
        """Read an instance's directories by name: a rename during a directory scan can hide an entry."""
        for name in (instance.uuid, *instance.directories):
            if not _is_directory_name(name):
                self._problems.append(
                    f"The driver reports {name!r} as a directory of instance {instance.uuid!r}, which is"
                    " no name of one. It is passed over. Correct what the driver reports."
                )
        found = False
        for root in roots:
            for name in _directories(instance):
                found = self._read_tree(os.path.join(root, name)) or found
        if not found and instance.host == self._host.name:
            self._everything_stays(
                f"instance {instance.uuid} is on this host and has no directory",
                "mount its disk root, add it to disk_roots, or correct what the driver reports",
            )

    def _read_root(self, root: str) -> None:
        """Read a root until its listing held still. What was read before is not read again."""
        for _round in range(_MOST_ROUNDS):
            try:
                fd = os.open(root, _OPEN | os.O_DIRECTORY)
                try:
                    before = os.fstat(fd).st_mtime_ns
                    inner, _vanished = self._read_entries(root, fd)
                    for path in inner:
                        lost = os.path.basename(path) == layout.LOST_AND_FOUND
                        if not lost or os.access(path, os.R_OK | os.X_OK):
                            self._read_tree(path)
                    if os.fstat(fd).st_mtime_ns == before:
                        return
                finally:
                    os.close(fd)
            except OSError as error:
                self._cannot_tell(root, error, "mount it, or make it readable")
                return
        self._everything_stays(f"{root} changed all the while it was read", _WAIT)

    def _read_tree(self, path: str) -> bool:
        """Read a directory and all below it. False: there is none of that name."""
        inner = self._read_directory(path)
        if inner is None:
            return False
        pending = list(inner)
        while pending:
            pending.extend(self._read_directory(pending.pop()) or ())
        return True

    def _read_directory(self, path: str) -> Sequence[str] | None:
        """Read a directory's files, and return its directories. None: there is none of that name."""
        try:
            fd = os.open(path, _OPEN | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None  # a link that leads nowhere
            self._cannot_tell(path, error, "make it readable")
            return ()
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) in self._visited:
                return ()
            self._visited.add((status.st_dev, status.st_ino))
            for _round in range(_MOST_ROUNDS):
                inner, vanished = self._read_entries(path, fd)
                now = os.fstat(fd)
                if not vanished and now.st_mtime_ns == status.st_mtime_ns:
                    return inner
                status = now
        except OSError as error:
            self._cannot_tell(path, error, "make it readable")
            return ()
        finally:
            os.close(fd)
        self._everything_stays(f"{path} changed all the while it was read", _WAIT)
        return ()

    def _read_entries(self, path: str, fd: int) -> tuple[list[str], bool]:
        """Read a directory's files once. Returns its directories, and whether a file had gone when opened.

        A file that is gone may have been given another name, which the listing missed.
        """
        formats = headers.Formats(path)
        inner: list[str] = []
        vanished = False
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    vanished = self._read_file(path, entry.name, fd, formats) or vanished
                elif entry.is_dir(follow_symlinks=False):
                    inner.append(os.path.join(path, entry.name))
                elif entry.is_symlink():
                    self._read_link(path, entry.name, fd, formats, inner)
        return inner, vanished

    def _read_link(
        self, directory: str, name: str, directory_fd: int, formats: headers.Formats, inner: list[str]
    ) -> None:
        path = os.path.join(directory, name)
        try:
            mode = os.stat(name, dir_fd=directory_fd).st_mode
        except OSError as error:
            if error.errno == errno.ENOENT:
                self._dangling(path)
            elif error.errno != errno.ELOOP:
                self._unreadable(path, error)
            return
        if stat.S_ISDIR(mode):
            inner.append(path)
        elif stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            # Nothing else is opened: opening alone does something to some devices.
            self._read_file(directory, name, directory_fd, formats)

    # -- files ---------------------------------------------------------------------------------------

    def _read_file(self, directory: str, name: str, directory_fd: int, formats: headers.Formats) -> bool:
        """Read a file. True: it is gone. Most are no overlay, and cost an open, a read and a close."""
        if name.endswith(".new") and atomic_file.UNFINISHED.fullmatch(name):
            self._unfinished.append(os.path.join(directory, name))
            self._host.trace(TracePoint.REFERENCES_UNFINISHED)
        try:
            fd = os.open(name, _OPEN, dir_fd=directory_fd)
            try:
                head = os.read(fd, headers.HEAD)
                if not head.startswith(header.MAGIC):
                    return False
                reference = headers.backing(fd, head)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            self._unreadable(os.path.join(directory, name), error)
            return False
        if reference:
            path = os.path.join(directory, name)
            self._refer(path, reference, formats.of(path))
        return False

    def _refer(self, path: str, reference: bytes, pinned: str | None) -> None:
        if pinned == "raw":
            return  # whatever header its guest wrote into it
        found = self._cached_names(reference) or set(headers.follow(path, reference, self._cached_names))
        if found:
            self._readings[path] = tuple(sorted(found.union(self._readings.get(path, ()))))

    def _cached_names(self, text: bytes) -> set[str]:
        found = set()
        for match in layout.SHA1_ANYWHERE.finditer(text):
            for name in (match.group(1), match.group(1) + match.group(2)):
                if (candidate := name.decode()) in self._names:
                    found.add(candidate)
        found.update(name for name in self._short if name.encode() in text)
        return found

    # -- what cannot be told -------------------------------------------------------------------------

    def _unreadable(self, path: str, error: OSError) -> None:
        if (before := self._memory.readings.get(path)) is not None:
            self._readings[path] = before
            self._problems.append(
                f"{path} cannot be read ({error.strerror}): what it referred to before stays."
                " Make it readable."
            )
            return
        self._cannot_tell(path, error, "make it readable, or remove it if it is nobody's")

    def _dangling(self, path: str) -> None:
        """A link that leads nowhere: what was last read behind it stays, since that may be unmounted."""
        beneath = path + "/"
        for known, names in self._memory.readings.items():
            if known == path or known.startswith(beneath):
                self._readings[known] = names
                self._problems.append(
                    f"{known} cannot be read, since {path} leads nowhere: what it referred to before stays."
                    " Mount what the link leads to, or remove it."
                )

    def _cannot_tell(self, path: str, error: OSError, next_step: str) -> None:
        self._everything_stays(f"{path} cannot be read ({error.strerror})", next_step)

    def _everything_stays(self, why: str, next_step: str) -> None:
        self._problems.insert(0, f"Nothing is evicted: {why}. To go on: {next_step}.")
        if self._unknown is None:
            self._unknown = why


def _directories(instance: model.Instance) -> Iterator[str]:
    for name in filter(_is_directory_name, (instance.uuid, *instance.directories)):
        for suffix in _SUFFIXES:
            yield name + suffix


def _is_directory_name(name: object) -> bool:
    """Whether it names one entry of a disk root. ``..`` would be found there, and prove nothing."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _fsid(path: str) -> int:
    """The filesystem's own id, which for most survives that its device gets another number."""
    return int(os.statvfs(path).f_fsid)


def load(data: bytes | None) -> dict[str, tuple[str, ...]]:
    """Return remembered readings. What is torn remembers nothing, and then nothing is forgiven."""
    try:
        found = json.loads(data) if data is not None else {}
        return {str(path): tuple(str(name) for name in names) for path, names in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def dump(readings: Mapping[str, Sequence[str]]) -> bytes:
    """Return readings as they are remembered."""
    return json.dumps({path: list(names) for path, names in sorted(readings.items())}).encode()
