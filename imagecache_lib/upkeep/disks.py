# SPDX-License-Identifier: Apache-2.0
"""Reading which bases the disks on this host refer to: every regular file of every instance directory.

A reference is any cached name that occurs in a backing string, with no path resolved, so that other mount
paths, relative and ``json:`` references all count. Each file gives one of three outcomes: it refers to
nothing, it refers to these names, or it cannot be told. Only a file that cannot be read cannot be told: a
guest may write any header into its raw disk, and must not stop eviction with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from imagecache_lib import layout, model, store
from imagecache_lib.backends import disk_info
from imagecache_lib.qcow2 import header as qcow2_header

if TYPE_CHECKING:
    from imagecache_lib.upkeep.references import Memory

#: As much of each file as is read at first; the header of nearly every overlay is within.
_HEAD = 4096

#: An unparseable header may still hold a name; it is looked for in this much of the file.
_DEEP = 2**20

#: Nova's other names for an instance's directory, while it is moved and while it is deleted.
_SUFFIXES = ("", "_resize", "_del", "")

#: Directories nest at most this deep below an instance's.
_DEEPEST = 16

#: Backing chains that leave the disk roots are followed this far.
_LONGEST_CHAIN = 32

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True)
class Found:
    """What a scan found.

    :param readings: cached names by path of the disk that refers to them.
    :param unknown: why nothing may be evicted, as a clause. None: all could be read.
    :param problems: what could not be read, a sentence each with what to do.
    :param roots: what each disk root is: ``(st_dev, f_fsid)``.
    """

    readings: dict[str, tuple[str, ...]]
    unknown: str | None
    problems: list[str]
    roots: dict[str, tuple[int, int]]


class Scan:
    """One reading of all disk roots. Not reusable."""

    def __init__(self, cache: store.CacheStore, names: Collection[str], memory: Memory) -> None:
        self._host = cache.host
        self._roots = cache.config.roots
        self._own = {os.path.realpath(cache.layout.base_path), os.path.realpath(cache.layout.locks_path)}
        self._names = frozenset(names)
        # Names that are no sha1 are few, and looked for one by one.
        self._short = [name for name in names if not layout.SHA1_ANYWHERE.match(name.encode())]
        self._memory = memory
        self._readings: dict[str, tuple[str, ...]] = {}
        self._unknown: str | None = None
        self._problems: list[str] = []
        self._found_roots: dict[str, tuple[int, int]] = {}
        self._visited: set[tuple[int, int]] = set()

    def run(self, instances: Sequence[model.Instance]) -> Found:
        """Read everything once: known instances by name first, then whatever else there is."""
        present = [root for root in self._roots if self._is_there(root, instances)]
        for instance in instances:
            self._read_instance(instance, present)
        self._host.trace("references:known")
        for root in present:
            self._read_directory(root, depth=0)
        self._host.trace("references:scanned")
        return Found(self._readings, self._unknown, self._problems, self._found_roots)

    # -- roots and directories -----------------------------------------------------------------------

    def _is_there(self, root: str, instances: Sequence[model.Instance]) -> bool:
        """Whether a disk root is mounted: an empty mount point would look like a host without disks."""
        try:
            status = os.stat(root)
            now = (status.st_dev, _fsid(root))
        except OSError as error:
            self._cannot_tell(root, error, "mount it, or take it out of disk_roots")
            return False
        before = self._memory.roots.get(root)
        moved = before is not None and before[0] != now[0] and before[1] != now[1]
        if moved and not self._holds_all(root, instances):
            self._everything_stays(
                f"the disk root {root} is on another device than before", "mount what belongs there"
            )
            self._found_roots[root] = before if before is not None else now
            return True
        self._found_roots[root] = now
        return True

    def _holds_all(self, root: str, instances: Sequence[model.Instance]) -> bool:
        """Whether the driver's report vouches for a root: there are local instances, and all are in it."""
        local = [instance for instance in instances if instance.host == self._host.name]
        return bool(local) and all(
            any(os.path.isdir(os.path.join(root, name)) for name in _directories(instance))
            for instance in local
        )

    def _read_instance(self, instance: model.Instance, roots: list[str]) -> None:
        """Read an instance's directories by name: a rename during a directory scan can hide an entry."""
        found = False
        for root in roots:
            for name in _directories(instance):
                path = os.path.join(root, name)
                if os.path.isdir(path):
                    found = True
                    self._read_directory(path, depth=1)
        if not found and instance.host == self._host.name:
            self._everything_stays(
                f"instance {instance.uuid} is on this host and has no directory",
                "mount its disk root, add it to disk_roots, or correct what the driver reports",
            )

    def _read_directory(self, path: str, *, depth: int) -> None:
        try:
            fd = os.open(path, _OPEN | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            self._cannot_tell(path, error, "make it readable")
            return
        try:
            status = os.fstat(fd)
            # A known instance is read by name and met again in the scan, where it may have changed; only
            # a link that leads back into itself must not be followed for ever, which the depth prevents.
            if depth > 1 and (status.st_dev, status.st_ino) in self._visited:
                return
            self._visited.add((status.st_dev, status.st_ino))
            self._read_entries(path, fd, depth)
        except OSError as error:
            self._cannot_tell(path, error, "make it readable")
        finally:
            os.close(fd)

    def _read_entries(self, path: str, fd: int, depth: int) -> None:
        formats: _Formats | None = None
        with os.scandir(fd) as entries:
            for entry in entries:
                name = entry.name
                if entry.is_file(follow_symlinks=False):
                    formats = formats or _Formats(path)
                    self._read_file(path, name, fd, formats)
                elif entry.is_dir(follow_symlinks=False) or entry.is_symlink():
                    inner = os.path.join(path, name)
                    if depth == 0 and os.path.realpath(inner) in self._own:
                        continue
                    if entry.is_symlink() and not os.path.isdir(inner):
                        formats = formats or _Formats(path)
                        self._read_file(path, name, fd, formats)
                    elif depth < _DEEPEST:
                        self._read_directory(inner, depth=depth + 1)

    # -- files ---------------------------------------------------------------------------------------

    def _read_file(self, directory: str, name: str, directory_fd: int, formats: _Formats) -> None:
        """The inner loop: most files are no overlay, and cost an open, a read and a close."""
        try:
            fd = os.open(name, _OPEN, dir_fd=directory_fd)
            try:
                head = os.read(fd, _HEAD)
                if not head.startswith(qcow2_header.MAGIC):
                    return
                path = os.path.join(directory, name)
                if formats.of(path) == "raw":
                    return
                reference = _backing(fd, head)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            return
        except OSError as error:
            self._unreadable(os.path.join(directory, name), error)
            return
        if reference:
            self._refer(path, reference)

    def _refer(self, path: str, reference: bytes) -> None:
        found = tuple(sorted(self._cached_names(reference)))
        if found:
            self._readings[path] = tuple(sorted({*self._readings.get(path, ()), *found}))
            return
        for name in self._follow(path, reference):
            self._readings[path] = tuple(sorted({*self._readings.get(path, ()), name}))

    def _cached_names(self, text: bytes) -> set[str]:
        found = set()
        for match in layout.SHA1_ANYWHERE.finditer(text):
            for name in (match.group(1), match.group(1) + match.group(2)):
                if (candidate := name.decode()) in self._names:
                    found.add(candidate)
        found.update(name for name in self._short if name.encode() in text)
        return found

    def _follow(self, path: str, reference: bytes) -> Iterator[str]:
        """Follow a chain that leaves the disk roots, by plain paths, as far as it goes."""
        seen = set()
        for _step in range(_LONGEST_CHAIN):
            if reference.startswith(b"json:") or reference in seen:
                return
            seen.add(reference)
            path = os.path.join(os.path.dirname(path), os.fsdecode(reference.removeprefix(b"file:")))
            try:
                fd = os.open(path, _OPEN)
            except (OSError, ValueError):
                return
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    return
                head = os.read(fd, _HEAD)
                following = _backing(fd, head) if head.startswith(qcow2_header.MAGIC) else None
            except OSError:
                return
            finally:
                os.close(fd)
            if not following:
                return
            if names := self._cached_names(following):
                yield from names
                return
            reference = following

    # -- what cannot be told -------------------------------------------------------------------------

    def _unreadable(self, path: str, error: OSError) -> None:
        if (before := self._memory.readings.get(path)) is not None:
            self._readings[path] = before
            self._problems.append(
                f"{path} cannot be read ({error.strerror}): what it referred to before stays. Make it readable."
            )
            return
        self._cannot_tell(path, error, "make it readable, or remove it if it is nobody's")

    def _cannot_tell(self, path: str, error: OSError, next_step: str) -> None:
        self._everything_stays(f"{path} cannot be read ({error.strerror})", next_step)

    def _everything_stays(self, why: str, next_step: str) -> None:
        self._problems.insert(0, f"Nothing is evicted: {why}. To go on: {next_step}.")
        if self._unknown is None:
            self._unknown = why


class _Formats:
    """The formats that an instance directory's disk.info pins, read when the first is asked for."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._found: Mapping[str, str] | None = None

    def of(self, path: str) -> str | None:
        if self._found is None:
            self._found = self._read()
        return disk_info.format_in(self._found, path)

    def _read(self) -> Mapping[str, str]:
        try:
            with open(os.path.join(self._directory, disk_info.NAME), "rb") as file:
                found = disk_info.parse(file.read(_DEEP))
        except OSError:
            return {}
        return found if found is not None else {}


def _directories(instance: model.Instance) -> Iterator[str]:
    for name in (instance.uuid, *instance.directories):
        for suffix in _SUFFIXES:
            yield name + suffix


def _fsid(path: str) -> int:
    """The filesystem's own id, which for most survives that its device gets another number."""
    return int(os.statvfs(path).f_fsid)


def _backing(fd: int, head: bytes) -> bytes | None:
    """Return what may hold a cached name: the backing string, or of a broken header all that is near it."""
    try:
        return qcow2_header.backing_reference(head)
    except qcow2_header.Truncated as error:
        more = os.pread(fd, min(error.needed, _DEEP), 0)
        try:
            return qcow2_header.backing_reference(more)
        except qcow2_header.HeaderError:
            return os.pread(fd, _DEEP, 0)
    except qcow2_header.HeaderError:
        return os.pread(fd, _DEEP, 0)


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
