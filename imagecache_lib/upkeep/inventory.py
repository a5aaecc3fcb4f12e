# SPDX-License-Identifier: Apache-2.0
"""What is in the cache: one look at every name, without opening any base."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Collection

from imagecache_lib.store import evidence, layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import durable


@dataclasses.dataclass(frozen=True)
class Entry:
    """One base image.

    :param name: its name in the cache.
    :param kind: what the name stands for.
    :param allocated: bytes it takes on disk.
    :param apparent: its length in bytes.
    :param last_use: epoch seconds of the filesystem's clock.
    :param links: how many names the file has.
    """

    name: str
    kind: layout.Kind
    allocated: int
    apparent: int
    last_use: float
    links: int


@dataclasses.dataclass(frozen=True)
class Inventory:
    """Everything in ``_base``, sorted by name.

    :param bases: the base images.
    :param foreign_stages: what Nova has or had in flight.
    :param unknown: names of entries that are no regular file, or that neither Nova nor this cache gives. They
        are not touched.
    :param unreadable: names of entries that cannot be looked at, each with why.
    """

    bases: tuple[Entry, ...]
    foreign_stages: tuple[Entry, ...]
    unknown: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...] = ()


def take(cache: CacheStore) -> Inventory:
    """List the cache. An entry that vanishes meanwhile is left out."""
    bases: list[Entry] = []
    foreign: list[Entry] = []
    unknown: list[str] = []
    unreadable: list[tuple[str, str]] = []
    noted = _notes_of_use(cache)
    passed_over = {layout.LOST_AND_FOUND, *cache.config.passed_over}
    try:
        entries = os.scandir(cache.layout.base_path)
    except FileNotFoundError:
        return Inventory((), (), ())
    with entries:
        for found in entries:
            if found.name.startswith(".") or found.name in passed_over:
                continue
            kind = layout.classify(found.name)
            try:
                status = found.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                # A damaged inode is one entry's affair: the others are looked at all the same.
                unreadable.append((found.name, error.strerror or str(error)))
                continue
            if kind is layout.Kind.UNKNOWN or not stat.S_ISREG(status.st_mode):
                unknown.append(found.name)
                continue
            entry = _entry(cache, found.name, kind, status, noted.get(found.name, 0.0))
            (foreign if kind is layout.Kind.FOREIGN_STAGE else bases).append(entry)
    by_name = lambda entry: entry.name  # noqa: E731
    return Inventory(
        tuple(sorted(bases, key=by_name)),
        tuple(sorted(foreign, key=by_name)),
        tuple(sorted(unknown)),
        tuple(sorted(unreadable)),
    )


def foreign_stages(cache: CacheStore) -> list[str]:
    """Return the names of what Nova has or had in flight, sorted. Nothing else is looked at."""
    try:
        entries = os.scandir(cache.layout.base_path)
    except FileNotFoundError:
        return []
    with entries:
        named = [each for each in entries if layout.classify(each.name) is layout.Kind.FOREIGN_STAGE]
        return sorted(each.name for each in named if each.is_file(follow_symlinks=False))


def look(cache: CacheStore, name: str) -> Entry | None:
    """Return one base, or None if it is not there or is no regular file."""
    try:
        status = os.stat(cache.layout.base(name), follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    noted = 0.0
    with contextlib.suppress(OSError):
        noted = os.stat(cache.layout.record(name), follow_symlinks=False).st_mtime
    return _entry(cache, name, layout.classify(name), status, noted)


def _entry(cache: CacheStore, name: str, kind: layout.Kind, status: os.stat_result, noted: float) -> Entry:
    """Return what a look found.

    :param noted: mtime of the record of that name. It counts if the record is this file's.

    Nova may have put another file there since. Few records have to be read to find out: a use is noted in the
    base's own mtime wherever that is possible.
    """
    if noted > status.st_mtime and not _is_of(cache.layout.record(name), status):
        noted = 0.0
    return Entry(
        name=name,
        kind=kind,
        allocated=status.st_blocks * 512,
        apparent=status.st_size,
        last_use=max(status.st_mtime, noted),
        links=status.st_nlink,
    )


def _is_of(record_path: str, status: os.stat_result) -> bool:
    """Whether a record is a file's, as far as its inode and size tell. One that cannot be read may be."""
    try:
        data = durable.read_file(record_path)
    except OSError:
        return True
    record = evidence.parse(data) if data is not None else None
    return record is not None and (record.inode, record.size) == (status.st_ino, status.st_size)


def _notes_of_use(cache: CacheStore) -> dict[str, float]:
    """Our own notes of last use: the mtimes of the records."""
    noted: dict[str, float] = {}
    try:
        entries = os.scandir(cache.layout.records)
    except FileNotFoundError:
        return noted
    with entries:
        for found in entries:
            if found.name.endswith(".json"):
                with contextlib.suppress(OSError):
                    noted[found.name.removesuffix(".json")] = found.stat(follow_symlinks=False).st_mtime
    return noted


def disk_usage(cache: CacheStore) -> int:
    """Return the bytes that the cache takes of the instances' filesystem: 0 if it has its own."""
    try:
        if os.stat(cache.layout.base_path).st_dev != os.stat(cache.config.instances_path).st_dev:
            return 0
    except FileNotFoundError:
        return 0
    return allocated(cache)


def allocated(cache: CacheStore) -> int:
    """Return the allocated bytes of everything under the cache's directory, each file counted once.

    What lies in a directory that may not be read is not counted: nothing of the cache is there.
    """
    return allocated_under(cache.layout.base_path, passed_over=cache.config.passed_over)


def allocated_under(path: str, *, passed_over: Collection[str] = ()) -> int:
    """Return the allocated bytes of all files under a directory, each counted once. 0 if it is not there.

    :param passed_over: names of directories that are left out.
    """
    total = 0
    counted: set[int] = set()
    pending = [path]
    while pending:
        try:
            entries = os.scandir(pending.pop())
        except (FileNotFoundError, PermissionError):
            continue  # lost+found of a filesystem of its own is root's
        with entries:
            for found in entries:
                try:
                    if found.is_dir(follow_symlinks=False):
                        if found.name in passed_over:
                            continue  # what snapshots hold is freed with them
                        pending.append(found.path)
                        continue
                    status = found.stat(follow_symlinks=False)
                except OSError:
                    continue  # it is gone, or damaged
                if status.st_ino not in counted:
                    counted.add(status.st_ino)
                    total += status.st_blocks * 512
    return total
