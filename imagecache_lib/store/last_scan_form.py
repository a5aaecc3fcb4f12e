# SPDX-License-Identifier: Apache-2.0
"""The forms on disk of what a host's last pass saw: ``hosts/<id>.scan``, and an older release's beside it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from imagecache_lib import errors, model
from imagecache_lib.store.seen import Boundary, Identity, LastScan, LazyDisks, SeenDirectory, SeenDisk

_VERSION = 1

_FIELDS = {"version", "roots", "lost", "directories", "report", "readings"}

#: Stands in ``hosts/<id>.readings`` where a path would, and says that this release wrote it: the one before
#: makes the file anew from the disks that it saw, and no disk has an empty path.
OURS = ""

#: What each form begins with. It takes minutes to find that as many zeros, as a crash may leave, are no JSON.
_BEGIN = b"{"


def to_json(last: LastScan, mark: str | None = None) -> bytes:
    """Return a last scan as it is kept in ``hosts/<id>.scan``.

    :param mark: SHA-256 of the content of ``hosts/<id>.readings`` that says the same.
    """
    return json.dumps(_fields(last, mark)).encode() + b"\n"


def _fields(last: LastScan, mark: str | None) -> dict[str, Any]:
    directories: list[list[Any]] = []
    index: dict[int, list[Any]] = {}
    numbers: dict[int, int] = {}

    def place(directory: SeenDirectory) -> list[Any]:
        above = None
        if directory.above is not None:
            if id(directory.above) not in index:
                place(directory.above)
            above = numbers[id(directory.above)]
        numbers[id(directory)] = len(directories)
        found = index[id(directory)] = [directory.path, pack_identity(directory.identity), above, {}]
        directories.append(found)
        return found

    # Of several disks of one path the last one counts for who reads this as one by path.
    for disk in (*last.covered, *(disk for _path, disk in sorted(last.disks.items()))):
        found = index.get(id(disk.directory)) or place(disk.directory)
        name = disk.path.rpartition("/")[2]
        if name in found[3]:
            directory = found[:3]
            found = [*directory, {}]
            directories.append(found)
        found[3][name] = [disk.inode, disk.born, disk.instance, list(disk.names)]
    report = last.report.packed if isinstance(last.report, _Report) else _pack_report(last.report)
    return {
        "version": _VERSION,
        "roots": {path: pack_identity(identity) for path, identity in sorted(last.roots.items())},
        "lost": dict(sorted(last.lost.items())),
        "directories": directories,
        "report": report,
        "readings": mark,
    }


def parse(data: bytes) -> LastScan | None:
    """Return the last scan in ``data``. Returns None for anything torn or unknown."""
    if not data.startswith(_BEGIN):
        return None
    try:
        fields = json.loads(data)
        directories, report = fields["directories"], fields["report"]
        roots = {path: unpack_identity(identity) for path, identity in fields["roots"].items()}
        lost = {path: int(changed) for path, changed in fields["lost"].items()}
        if not all(_is_directory(number, each) for number, each in enumerate(directories)):
            return None
        if report is not None and not all(_is_instance(each) for each in report):
            return None
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    known = {path: identity for path, identity in roots.items() if identity is not None}
    disks = _Disks(directories)
    return LastScan(
        disks,
        known,
        lost,
        None if report is None else _Report(report),
        tuple(disks.covered()),
        data=data,
        fields=fields,
    )


def _is_directory(number: int, packed: Sequence[Any]) -> bool:
    path, identity, above, disks = packed
    return (
        type(path) is str
        and (identity is None or unpack_identity(identity) is not None)
        and (above is None or (type(above) is int and 0 <= above < number))
        and all(
            type(inode) is int
            and type(born) is int
            and (instance is None or type(instance) is str)
            and type(names) is list
            and all(type(name) is str for name in names)
            for inode, born, instance, names in disks.values()
        )
    )


def _is_instance(packed: Sequence[Any]) -> bool:
    uuid, host, images, directories, swap_mb, ephemerals = packed
    return (
        type(images) is type(directories) is type(ephemerals) is list
        and type(swap_mb) is int
        and all(type(size) is int for size in ephemerals)
        and not isinstance(uuid, list | dict)
        and not isinstance(host, list | dict)
    )


class _Disks(LazyDisks):
    """The disks of a last scan."""

    def __init__(self, packed: list[list[Any]]) -> None:
        self._packed = packed
        self._directories: dict[int, SeenDirectory] = {}
        self._where = {
            _path(directory[0], name): (number, name)
            for number, directory in enumerate(packed)
            for name in directory[3]
        }

    def __getitem__(self, path: str) -> SeenDisk:
        return self._made(path, *self._where[path])

    def _made(self, path: str, number: int, name: str) -> SeenDisk:
        inode, born, instance, names = self._packed[number][3][name]
        return SeenDisk(path, tuple(names), self._directory(number), inode, born, instance)

    def covered(self) -> Iterator[SeenDisk]:
        """Yield those that are not had by their paths, which others have."""
        if len(self._where) == sum(len(directory[3]) for directory in self._packed):
            return
        for number, directory in enumerate(self._packed):
            for name in directory[3]:
                path = _path(directory[0], name)
                if self._where[path] != (number, name):
                    yield self._made(path, number, name)

    def elsewhere(self, disks: Mapping[str, SeenDisk]) -> Iterator[str]:
        known: dict[int, int] = {}
        for path, disk in disks.items():
            number, _name = self._where.get(path, (-1, ""))
            if number < 0 or known.get(id(disk.directory)) == number:
                continue
            identity, packed = disk.directory.identity, self._packed[number][1]
            # Nearly all are where they were, and each pass asks of each.
            if (
                identity is not None
                and packed is not None
                and identity.inode == packed[1]
                and identity.device == packed[0]
                and identity.fsid == packed[2]
                and identity.born == packed[4]
            ):
                known[id(disk.directory)] = number
            else:
                yield path

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, path: object) -> bool:
        return path in self._where

    def are(self, disks: Mapping[str, SeenDisk]) -> bool:
        """Whether these are the same disks, in the same directories."""
        if len(disks) != len(self._where):
            return False
        known: dict[int, int] = {}
        for path, disk in disks.items():
            number, name = self._where.get(path, (-1, ""))
            if number < 0:
                return False
            if self._packed[number][3][name] != [disk.inode, disk.born, disk.instance, list(disk.names)]:
                return False
            if known.get(id(disk.directory)) != number and not self._is(number, disk.directory, known):
                return False
        return True

    def _is(self, number: int, directory: SeenDirectory, known: dict[int, int]) -> bool:
        """Whether a directory, and each above it, is the one of that number.

        :param known: numbers of directories by their ``id``, which gets the number of this one.
        """
        path, identity, above, _disks = self._packed[number]
        if directory.path != path or pack_identity(directory.identity) != identity:
            return False
        if above is None or directory.above is None:
            same = above is None and directory.above is None
        else:
            same = known.get(id(directory.above)) == above or self._is(above, directory.above, known)
        if same:
            known[id(directory)] = number
        return same

    def _directory(self, number: int) -> SeenDirectory:
        found = self._directories.get(number)
        if found is None:
            path, identity, above, _disks = self._packed[number]
            higher = None if above is None else self._directory(above)
            found = self._directories[number] = SeenDirectory(path, unpack_identity(identity), higher)
        return found


def _path(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"


class _Report(Sequence[model.Instance]):
    """The instances of a last report, made when they are asked for: a pass has a report of its own."""

    def __init__(self, packed: list[list[Any]]) -> None:
        self.packed = packed

    @functools.cached_property
    def _instances(self) -> tuple[model.Instance, ...]:
        return tuple(_unpack_instance(each) for each in self.packed)

    def __getitem__(self, index: Any) -> Any:
        return self._instances[index]

    def __len__(self) -> int:
        return len(self.packed)


def pack_identity(identity: Identity | None) -> list[Any] | None:
    """Return an identity as values of JSON."""
    if identity is None:
        return None
    return [identity.device, identity.inode, identity.fsid, identity.boundary.value, identity.born]


def unpack_identity(packed: Sequence[Any] | None) -> Identity | None:
    """Return what :func:`pack_identity` was given.

    :raises ValueError, TypeError, OverflowError: it is something else.
    """
    if packed is None:
        return None
    device, inode, fsid, boundary, born = packed
    return Identity(int(device), int(inode), int(fsid), Boundary(boundary), int(born))


def _pack_report(report: Sequence[model.Instance] | None) -> list[list[Any]] | None:
    return None if report is None else [_pack_instance(each) for each in report]


def _pack_instance(instance: model.Instance) -> list[Any]:
    return [
        instance.uuid,
        instance.host,
        [_plain(each) for each in instance.images],
        [_plain(each) for each in instance.directories],
        instance.swap_mb,
        [each.size_gb for each in instance.ephemerals],
    ]


def _plain(value: Any) -> str | None:
    """Return an id or a name as it is kept: what can be none stands there as text."""
    return value if value is None or isinstance(value, str) else errors.shown(value)


def _unpack_instance(packed: Sequence[Any]) -> model.Instance:
    uuid, host, images, directories, swap_mb, ephemerals = packed
    sizes = tuple(model.Ephemeral(_size(size)) for size in ephemerals)
    return model.Instance(uuid, host, tuple(images), tuple(directories), _size(swap_mb), sizes)


def _size(packed: int) -> int:
    """Return a size that an older release may have written as the driver reported it."""
    return min(max(packed, 0), model.MOST_BYTES)


def parse_readings(data: bytes) -> dict[str, tuple[str, ...]] | None:
    """Return the names by path of disk in an older release's form. Returns None for anything torn."""
    if not data.startswith(_BEGIN):
        return None
    try:
        found = json.loads(data)
        return {str(path): tuple(str(name) for name in names) for path, names in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def readings_to_json(last: LastScan) -> bytes:
    """Return the names by path of disk in an older release's form."""
    readings: dict[str, list[str]] = {}
    for disk in sorted(last.all_disks(), key=lambda each: each.path):
        readings[disk.path] = sorted({*readings.get(disk.path, ()), *disk.names})
    return json.dumps({OURS: [], **readings}).encode()


def is_written(last: LastScan, before: LastScan) -> bool:
    """Whether what a pass saw is what was parsed, and would be written down as that was.

    They are compared as they are: the form on disk, made anew, is more objects than Python collects quickly.
    """
    fields = before.fields
    if fields.keys() != _FIELDS or fields["version"] != _VERSION or fields["lost"] != dict(last.lost):
        return False
    if fields["roots"] != {path: pack_identity(identity) for path, identity in last.roots.items()}:
        return False
    return (
        not (last.covered or before.covered)
        and isinstance(before.disks, _Disks)
        and before.disks.are(last.disks)
        and _is_reported(last.report, fields["report"])
    )


def _is_reported(report: Sequence[model.Instance] | None, packed: list[list[Any]] | None) -> bool:
    if report is None or packed is None:
        return report is None and packed is None
    if isinstance(report, _Report):
        return report.packed == packed
    return len(report) == len(packed) and all(
        _pack_instance(instance) == each for instance, each in zip(report, packed, strict=True)
    )
