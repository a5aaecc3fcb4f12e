# SPDX-License-Identifier: Apache-2.0
"""What single files on a host say: a backing reference, where a chain leads, which format is pinned.

Headers are hostile input: a guest may write one into its raw disk. They are searched, and nothing but regular
files is opened because of them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping

from imagecache_lib.formats.qcow2 import header
from imagecache_lib.formats.qcow2.header import HeaderError, Truncated
from imagecache_lib.nova import disk_info
from imagecache_lib.system import durable

#: As much of each file as is read at first; the header of nearly every overlay is within.
HEAD = 4096

#: An unparseable header may still hold a name; it is looked for in this much of the file.
_DEEP = 2**20

#: Backing chains that leave the disk roots are followed this far.
_LONGEST_CHAIN = 32

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


def backing(fd: int, head: bytes) -> bytes | None:
    """Return what may hold a cached name: the backing string, or of a broken header all that is near it."""
    try:
        return header.backing_reference(head)
    except Truncated as error:
        more = os.pread(fd, min(error.needed, _DEEP), 0)
        try:
            return header.backing_reference(more)
        except HeaderError:
            return os.pread(fd, _DEEP, 0)
    except HeaderError:
        return os.pread(fd, _DEEP, 0)


def _backing_of(path: str) -> bytes | None:
    """Return the backing reference of a file that a chain leads to, if it is a regular file that has one."""
    try:
        # A guest may have written the name: nothing that is no regular file is even opened.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        fd = os.open(path, _OPEN)
    except (OSError, ValueError):
        return None
    try:
        head = os.read(fd, HEAD)
        return backing(fd, head) if head.startswith(header.MAGIC) else None
    except OSError:
        return None
    finally:
        os.close(fd)


def named_files(path: str, reference: bytes) -> list[str]:
    """Return the paths of the files that a backing reference in the file ``path`` may mean."""
    if reference.startswith(b"json:"):
        try:
            named = list(_texts(json.loads(reference.removeprefix(b"json:"))))
        except (ValueError, RecursionError):
            return []
    else:
        named = [os.fsdecode(reference)]
    directory = os.path.dirname(path)
    return [os.path.join(directory, each.removeprefix("file:")) for each in named]


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a JSON value: QEMU nests a file's name in many ways."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def follow(path: str, reference: bytes, names_in: Callable[[bytes], set[str]]) -> Iterator[str]:
    """Yield the cached names that a chain leads to which leaves the disk roots.

    :param path: the disk that it begins with.
    :param reference: what its header says.
    :param names_in: finds cached names in a text.
    """
    seen: set[str] = set()
    pending = named_files(path, reference)
    while pending and len(seen) < _LONGEST_CHAIN:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        following = _backing_of(path)
        if not following:
            continue
        names = names_in(following)
        yield from names
        if not names:
            pending.extend(named_files(path, following))


class Formats:
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
            data = durable.read_file(os.path.join(self._directory, disk_info.NAME), limit=_DEEP)
        except OSError:
            return {}
        # What is torn pins nothing: the header counts then, which keeps more.
        return (disk_info.parse(data) if data is not None else None) or {}
