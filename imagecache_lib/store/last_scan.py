# SPDX-License-Identifier: Apache-2.0
"""What a host's last pass saw of its disks, and what its driver last reported. Kept in ``hosts/<id>.scan``.

A disk that was seen and is not seen now may have been removed, or lie on a filesystem that is not mounted
now. So each disk is remembered with the identity of its directory and of every directory above it, up to the
disk root: :mod:`imagecache_lib.upkeep.absence` says what they prove. The driver's report is remembered for
those who evict between two passes.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from imagecache_lib import model
from imagecache_lib.store import layout
from imagecache_lib.system import durable

_T = TypeVar("_T")

_VERSION = 1

_FIELDS = {"version", "roots", "lost", "directories", "report", "readings"}

#: Stands in ``hosts/<id>.readings`` where a path would, and says that this release wrote it: the one before
#: makes the file anew from the disks that it saw, and no disk has an empty path.
_OURS = ""

#: How often what other processes wrote at the same time is merged before it is left to them.
_MOST_TURNS = 100

#: The most bytes that a file of a last scan is read for: two million disks take less.
_LIMIT = 2**28

#: What each form begins with. It takes minutes to find that as many zeros, as a crash may leave, are no JSON.
_BEGIN = b"{"


class Boundary(enum.StrEnum):
    """How a directory hangs in the one above it."""

    #: It is an entry of the directory above.
    NONE = ""
    #: A filesystem, or another directory of the same one, is mounted there.
    MOUNT = "mount"
    #: It was reached through a symbolic link.
    LINK = "link"


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Which directory a directory is.

    :param device: ``st_dev``, which may change at a boot.
    :param inode: ``st_ino``.
    :param fsid: a number of the filesystem that it keeps over a boot, as far as there is one: ``f_fsid`` of
        statvfs(3), or of a network filesystem, which has none, one that is made of where it is mounted from;
        0 if there is none.
    :param boundary: how it hangs in the directory above it.
    :param born: ``stx_btime`` of statx(2) in nanoseconds: a new directory may get the inode of one that was
        removed. It is 0 on a filesystem that does not keep it.
    """

    device: int
    inode: int
    fsid: int = 0
    boundary: Boundary = Boundary.NONE
    born: int = 0


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class SeenDirectory:
    """A directory that was read.

    :param path: where it was found.
    :param identity: which directory it was, or None if an older release read it and did not write that down.
    :param above: the directory in which it was found, or None for a disk root.
    """

    path: str
    identity: Identity | None
    above: SeenDirectory | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SeenDisk:
    """A disk that refers to bases.

    :param names: the bases' names.
    :param directory: the directory that it was in.
    :param inode: ``st_ino`` of the file, or 0 if it is unknown.
    :param born: ``stx_btime`` of statx(2) in nanoseconds: two files that had one inode differ in it. It is 0
        on a filesystem that does not keep it.
    :param instance: uuid of the instance whose directory it was in, as far as it was ever reported.
    """

    path: str
    names: tuple[str, ...]
    directory: SeenDirectory
    inode: int = 0
    born: int = 0
    instance: str | None = None


@dataclasses.dataclass(frozen=True)
class LastScan:
    """What the last pass of this host saw.

    :param disks: disks that refer to bases, by path.
    :param roots: which directory each disk root was.
    :param lost: ``st_mtime_ns`` of each ``lost+found`` that was not read, by the path of its filesystem's
        top.
    :param report: what the driver last reported, or None if it has not reported yet.
    :param unreadable: why what was seen cannot be told, as a clause that names the file, or None if it can.
    :param report_unknown: why the last report cannot be told, likewise.
    :param data: what it was parsed from.
    :param fields: the same, as JSON's values.
    :param is_whole: the older release's form beside it says the same.
    """

    disks: Mapping[str, SeenDisk] = dataclasses.field(default_factory=dict)
    roots: Mapping[str, Identity] = dataclasses.field(default_factory=dict)
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)
    report: Sequence[model.Instance] | None = None
    unreadable: str | None = None
    report_unknown: str | None = None
    data: bytes | None = dataclasses.field(default=None, compare=False, repr=False)
    fields: Any = dataclasses.field(default=None, compare=False, repr=False)
    is_whole: bool = dataclasses.field(default=False, compare=False, repr=False)

    def without(self, path: str) -> LastScan:
        """Return this scan without what was seen at a path and below it."""
        beneath = path.rstrip("/") + "/"

        def stays(other: str) -> bool:
            return other != path and not other.startswith(beneath)

        return dataclasses.replace(
            self,
            disks={disk: seen for disk, seen in self.disks.items() if stays(disk)},
            roots={root: identity for root, identity in self.roots.items() if stays(root)},
            lost={root: changed for root, changed in self.lost.items() if stays(root)},
        )


class Parsed:
    """The last scan that was parsed last: most passes find the file as the pass before left it."""

    def __init__(self) -> None:
        self._found: LastScan | None = None

    def parse(self, data: bytes) -> LastScan | None:
        """Return what :func:`parse` does."""
        found = self._found
        if found is None or found.data != data:
            found = self._found = parse(data)
        return found


def load_last_scan(
    where: layout.Layout,
    host_id: str,
    roots: Mapping[str, tuple[int, int]],
    *,
    parsed: Parsed | None = None,
) -> LastScan:
    """Return what the last pass of a host saw, this release's or an older one's.

    An older release rewrites ``hosts/<id>.readings`` and knows nothing of ``hosts/<id>.scan``: a disk that
    only it saw is remembered without the identity of its directory, and counts until it is seen again.

    :param roots: ``(st_dev, f_fsid)`` by disk root, as the host's file has them, for roots that only an older
        release saw.
    :param parsed: keeps what is parsed, for the next call.
    """
    known, problem = _read(where.last_scan(host_id), (parsed or Parsed()).parse)
    data, old_problem = _data(where.readings(host_id))
    if known is not None and data is not None and known.fields.get("readings") == _digest(data):
        return dataclasses.replace(known, is_whole=True)
    readings = parse_readings(data) if data is not None else None
    if data is not None and readings is None:
        old_problem = f"what the last pass saw cannot be read: {where.readings(host_id)} is damaged"
    if known is not None and readings is not None and _OURS in readings:
        # Another process of this release wrote it, for which the other file speaks: with identities.
        return known
    if problem is not None and readings is None:
        return LastScan(unreadable=problem)
    if old_problem is not None and known is None:
        return LastScan(unreadable=old_problem)
    last = known or LastScan()
    old_roots = {path: Identity(device, 0, fsid) for path, (device, fsid) in roots.items()}
    old_disks = {
        path: SeenDisk(path, names, SeenDirectory(os.path.dirname(path), None))
        for path, names in (readings or {}).items()
        if path not in last.disks and path != _OURS
    }
    return dataclasses.replace(
        last,
        disks={**old_disks, **last.disks} if old_disks else last.disks,
        roots={**old_roots, **last.roots},
        report_unknown=problem,
    )


def save_last_scan(where: layout.Layout, host_id: str, before: LastScan, last: LastScan) -> None:
    """Write down what a pass saw, for this release and in the older one's form.

    Another process of this host may have written meanwhile what it saw, maybe with other disk roots: disks
    and roots that only it knows are kept.

    :param before: what :func:`load_last_scan` returned when the pass began.
    :raises OSError: it cannot be written.
    """
    path = where.last_scan(host_id)
    data, _problem = _data(path)
    if data is not None and data == before.data:
        if before.is_whole and _is_written(last, before):
            os.utime(path)  # nothing has changed; when the pass was is told
            return
    elif data is not None:
        last = _merged(last, before, parse(data))
    for _turn in range(_MOST_TURNS):
        readings = readings_to_json(last)
        # The one that has the identities comes first: a crash in between leaves no disk that is in neither.
        replaced = durable.exchange_file(path, to_json(last, _digest(readings)), limit=_LIMIT)
        durable.write_file(where.readings(host_id), readings)
        if replaced == data or replaced is None:
            return
        # Another process wrote between our look and this: what it saw is put back beside what we saw.
        data = to_json(last, _digest(readings))
        last = _merged(last, before, parse(replaced))


def _is_written(last: LastScan, before: LastScan) -> bool:
    """Whether what a pass saw is what was parsed, and would be written down as that was.

    They are compared as they are: the form on disk, made anew, is more objects than Python collects quickly.
    """
    fields = before.fields
    if fields.keys() != _FIELDS or fields["version"] != _VERSION or fields["lost"] != dict(last.lost):
        return False
    if fields["roots"] != {path: _pack(identity) for path, identity in last.roots.items()}:
        return False
    return (
        isinstance(before.disks, _Disks)
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


def _merged(last: LastScan, before: LastScan, now: LastScan | None) -> LastScan:
    """Return what a pass saw with what another process wrote down meanwhile.

    :param before: what was known when the pass began: what is in it and not in ``last`` is gone, unless the
        other process saw another file there since.
    """
    if now is None:
        return last

    def is_news(seen: SeenDisk) -> bool:
        known = before.disks.get(seen.path)
        facts = (seen.names, seen.inode, seen.born)
        return known is None or (known.names, known.inode, known.born) != facts

    foreign = {disk: seen for disk, seen in now.disks.items() if is_news(seen)}
    new_roots = {root: identity for root, identity in now.roots.items() if root not in before.roots}
    return dataclasses.replace(
        last,
        disks={**foreign, **last.disks},
        roots={**new_roots, **last.roots},
        report=last.report if last.report is not None else now.report,
    )


def replace(where: layout.Layout, host_id: str, last: LastScan) -> None:
    """Write down what was seen, whatever is there.

    :raises OSError: it cannot be written.
    """
    readings = readings_to_json(last)
    # The one that has the identities comes first: a crash in between leaves no disk that is in neither.
    durable.write_file(where.last_scan(host_id), to_json(last, _digest(readings)))
    durable.write_file(where.readings(host_id), readings)


def _digest(readings: bytes) -> str:
    return hashlib.sha256(readings).hexdigest()


def _data(path: str) -> tuple[bytes | None, str | None]:
    """Return a file's bytes, and why it cannot be read, as a clause.

    Returns None for both if there is no such file.
    """
    try:
        if not os.path.lexists(path):
            return None, None
        data = durable.read_file(path, limit=_LIMIT)
    except OSError as error:
        return None, f"what the last pass saw cannot be read: {path}: {error.strerror}"
    return data, None if data is not None else f"what the last pass saw cannot be read: {path} is no file"


def _read(path: str, parsed: Callable[[bytes], _T | None]) -> tuple[_T | None, str | None]:
    """Return a file's content, and why it cannot be told, as a clause.

    Returns None for both if there is no such file.
    """
    data, problem = _data(path)
    if data is None:
        return None, problem
    found = parsed(data)
    return found, None if found is not None else f"what the last pass saw cannot be read: {path} is damaged"


# -- the forms on disk -------------------------------------------------------------------------------


def to_json(last: LastScan, mark: str | None = None) -> bytes:
    """Return a last scan as it is kept in ``hosts/<id>.scan``.

    :param mark: SHA-256 of the content of ``hosts/<id>.readings`` that says the same.
    """
    # What a driver reports that can be no id or name stands there as text, and is no image's.
    return json.dumps(_fields(last, mark), default=str).encode() + b"\n"


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
        found = index[id(directory)] = [directory.path, _pack(directory.identity), above, {}]
        directories.append(found)
        return found

    for path, disk in sorted(last.disks.items()):
        found = index.get(id(disk.directory)) or place(disk.directory)
        found[3][path.rpartition("/")[2]] = [disk.inode, disk.born, disk.instance, list(disk.names)]
    report = last.report.packed if isinstance(last.report, _Report) else _pack_report(last.report)
    return {
        "version": _VERSION,
        "roots": {path: _pack(identity) for path, identity in sorted(last.roots.items())},
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
        roots = {path: _unpack(identity) for path, identity in fields["roots"].items()}
        lost = {path: int(changed) for path, changed in fields["lost"].items()}
        if not all(_is_directory(number, each) for number, each in enumerate(directories)):
            return None
        if report is not None and not all(_is_instance(each) for each in report):
            return None
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    known = {path: identity for path, identity in roots.items() if identity is not None}
    return LastScan(
        _Disks(directories),
        known,
        lost,
        None if report is None else _Report(report),
        data=data,
        fields=fields,
    )


def _is_directory(number: int, packed: Sequence[Any]) -> bool:
    path, identity, above, disks = packed
    return (
        type(path) is str
        and (identity is None or _unpack(identity) is not None)
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


class _Disks(Mapping[str, SeenDisk]):
    """The disks of a last scan, each made when it is asked for: most are seen again, and never are."""

    def __init__(self, packed: list[list[Any]]) -> None:
        self._packed = packed
        self._directories: dict[int, SeenDirectory] = {}
        self._where = {
            f"{directory[0].rstrip('/')}/{name}": (number, name)
            for number, directory in enumerate(packed)
            for name in directory[3]
        }

    def __getitem__(self, path: str) -> SeenDisk:
        number, name = self._where[path]
        inode, born, instance, names = self._packed[number][3][name]
        return SeenDisk(path, tuple(names), self._directory(number), inode, born, instance)

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
        if directory.path != path or _pack(directory.identity) != identity:
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
            found = self._directories[number] = SeenDirectory(path, _unpack(identity), higher)
        return found


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


def _pack(identity: Identity | None) -> list[Any] | None:
    if identity is None:
        return None
    return [identity.device, identity.inode, identity.fsid, identity.boundary.value, identity.born]


def _unpack(packed: Sequence[Any] | None) -> Identity | None:
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
        list(instance.images),
        list(instance.directories),
        instance.swap_mb,
        [each.size_gb for each in instance.ephemerals],
    ]


def _unpack_instance(packed: Sequence[Any]) -> model.Instance:
    uuid, host, images, directories, swap_mb, ephemerals = packed
    sizes = tuple(model.Ephemeral(int(size)) for size in ephemerals)
    return model.Instance(uuid, host, tuple(images), tuple(directories), int(swap_mb), sizes)


def parse_readings(data: bytes) -> dict[str, tuple[str, ...]] | None:
    """Return the names by path of disk in an older release's form. Returns None for anything torn."""
    if not data.startswith(_BEGIN):
        return None
    try:
        found = json.loads(data)
        return {str(path): tuple(str(name) for name in names) for path, names in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def load_readings(where: layout.Layout, host_id: str) -> dict[str, tuple[str, ...]]:
    """Return the names by path of disk that a host's last pass saw. What cannot be read says nothing."""
    readings, _problem = _read(where.readings(host_id), parse_readings)
    return {path: names for path, names in (readings or {}).items() if path != _OURS}


def readings_to_json(last: LastScan) -> bytes:
    """Return the names by path of disk in an older release's form."""
    readings = {path: sorted(disk.names) for path, disk in sorted(last.disks.items())}
    return json.dumps({_OURS: [], **readings}).encode()
