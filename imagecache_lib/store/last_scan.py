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
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from imagecache_lib import errors, model
from imagecache_lib.store import layout
from imagecache_lib.system import durable

_VERSION = 1

#: The most bytes that a file of a last scan is read for.
_LIMIT = 2**30


class Boundary(enum.StrEnum):
    """How a directory hangs in the one above it."""

    #: It is an entry of the directory above.
    NONE = ""
    #: A filesystem, or another directory of the same one, is mounted there.
    MOUNT = "mount"
    #: It was reached through a symbolic link.
    LINK = "link"


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which directory a directory is.

    :param device: ``st_dev``, which may change at a boot.
    :param inode: ``st_ino``.
    :param fsid: a number of the filesystem that it keeps over a boot, as far as there is one: ``f_fsid`` of
        statvfs(3), or of a network filesystem, which has none, one that is made of where it is mounted from.
        0: there is none.
    :param boundary: how it hangs in the directory above it.
    """

    device: int
    inode: int
    fsid: int = 0
    boundary: Boundary = Boundary.NONE


@dataclasses.dataclass(frozen=True, eq=False)
class SeenDirectory:
    """A directory that was read.

    :param path: where it was found.
    :param identity: which directory it was. None: the release that read it did not write that down.
    :param above: the directory in which it was found. None: it is a disk root.
    """

    path: str
    identity: Identity | None
    above: SeenDirectory | None = None


@dataclasses.dataclass(frozen=True)
class SeenDisk:
    """A disk that refers to bases.

    :param names: the bases' names.
    :param directory: the directory that it was in.
    :param inode: ``st_ino`` of the file. 0: unknown.
    :param born: ``stx_btime`` of statx(2) in nanoseconds: two files that had one inode differ in it.
        0: the filesystem does not keep it.
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
    :param report: what the driver last reported. None: nothing yet.
    :param unreadable: why what was seen cannot be told, as a clause that names the file. None: it can.
    :param report_unknown: why the last report cannot be told, likewise.
    """

    disks: Mapping[str, SeenDisk] = dataclasses.field(default_factory=dict)
    roots: Mapping[str, Identity] = dataclasses.field(default_factory=dict)
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)
    report: tuple[model.Instance, ...] | None = None
    unreadable: str | None = None
    report_unknown: str | None = None

    def without(self, path: str) -> LastScan:
        """Return it without what was seen at a path and below it."""
        beneath = path.rstrip("/") + "/"

        def stays(other: str) -> bool:
            return other != path and not other.startswith(beneath)

        return dataclasses.replace(
            self,
            disks={disk: seen for disk, seen in self.disks.items() if stays(disk)},
            roots={root: identity for root, identity in self.roots.items() if stays(root)},
            lost={root: changed for root, changed in self.lost.items() if stays(root)},
        )


def load_last_scan(where: layout.Layout, host_id: str, roots: Mapping[str, tuple[int, int]]) -> LastScan:
    """Return what the last pass of a host saw, this release's or an older one's.

    An older release rewrites ``hosts/<id>.readings`` and knows nothing of ``hosts/<id>.scan``: a disk that
    only it saw is remembered without the identity of its directory, and counts until it is seen again.

    :param roots: ``(st_dev, f_fsid)`` by disk root, as the host's file has them, for roots that only an older
        release saw.
    """
    known, problem = _read(where.last_scan(host_id), parse)
    readings, old_problem = _read(where.readings(host_id), parse_readings)
    if problem is not None and readings is None:
        return LastScan(unreadable=problem)
    if old_problem is not None and known is None:
        return LastScan(unreadable=old_problem)
    last = known or LastScan()
    old_roots = {path: Identity(device, 0, fsid) for path, (device, fsid) in roots.items()}
    old_disks = {
        path: SeenDisk(path, names, SeenDirectory(os.path.dirname(path), None))
        for path, names in (readings or {}).items()
    }
    return dataclasses.replace(
        last,
        disks={**old_disks, **last.disks},
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
    now, _problem = _read(path, parse)
    if now is not None:
        foreign = {disk: seen for disk, seen in now.disks.items() if disk not in before.disks}
        new_roots = {root: identity for root, identity in now.roots.items() if root not in before.roots}
        last = dataclasses.replace(
            last,
            disks={**foreign, **last.disks},
            roots={**new_roots, **last.roots},
            report=last.report if last.report is not None else now.report,
        )
    replace(where, host_id, last)


def replace(where: layout.Layout, host_id: str, last: LastScan) -> None:
    """Write down what was seen, whatever is there.

    :raises OSError: it cannot be written.
    """
    _replace(where.last_scan(host_id), to_json(last))
    _replace(where.readings(host_id), readings_to_json(last))


def _replace(path: str, data: bytes) -> None:
    try:
        if durable.read_file(path, limit=_LIMIT) == data:
            return
    except OSError:
        pass  # it cannot be read, and is written anew
    durable.write_file(path, data)


def _read(path: str, parsed: Any) -> tuple[Any, str | None]:
    """Return a file's content, and why it cannot be told, as a clause."""
    try:
        if not os.path.lexists(path):
            return None, None
        data = durable.read_file(path, limit=_LIMIT)
    except OSError as error:
        return None, f"what the last pass saw cannot be read: {path}: {error.strerror}"
    found = parsed(data) if data is not None else None
    return found, None if found is not None else f"what the last pass saw cannot be read: {path} is damaged"


# -- the forms on disk -------------------------------------------------------------------------------


def to_json(last: LastScan) -> bytes:
    """Return it as it is kept in ``hosts/<id>.scan``."""
    directories: list[list[Any]] = []
    index: dict[int, int] = {}

    def place(directory: SeenDirectory) -> int:
        found = index.get(id(directory))
        if found is None:
            above = None if directory.above is None else place(directory.above)
            found = index[id(directory)] = len(directories)
            directories.append([directory.path, _pack(directory.identity), above, {}])
        return found

    for path, disk in sorted(last.disks.items()):
        entry = [disk.inode, disk.born, disk.instance, sorted(disk.names)]
        directories[place(disk.directory)][3][os.path.basename(path)] = entry
    fields = {
        "version": _VERSION,
        "roots": {path: _pack(identity) for path, identity in sorted(last.roots.items())},
        "lost": dict(sorted(last.lost.items())),
        "directories": directories,
        "report": None if last.report is None else [_pack_instance(each) for each in last.report],
    }
    return json.dumps(fields).encode() + b"\n"


def parse(data: bytes) -> LastScan | None:
    """Return the last scan in ``data``. Returns None for anything torn or unknown."""
    try:
        fields = json.loads(data)
        directories: list[SeenDirectory] = []
        disks: dict[str, SeenDisk] = {}
        for path, identity, above, entries in fields["directories"]:
            if above is not None and not 0 <= above < len(directories):
                return None
            higher = None if above is None else directories[above]
            directory = SeenDirectory(str(path), _unpack(identity), higher)
            directories.append(directory)
            for name, (inode, born, instance, names) in entries.items():
                disk = os.path.join(directory.path, name)
                owner = None if instance is None else str(instance)
                disks[disk] = SeenDisk(
                    disk, tuple(str(each) for each in names), directory, int(inode), int(born), owner
                )
        roots = {path: _unpack(identity) for path, identity in fields["roots"].items()}
        lost = {path: int(changed) for path, changed in fields["lost"].items()}
        reported = fields["report"]
        report = None if reported is None else tuple(_unpack_instance(each) for each in reported)
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    except errors.ImageCacheError:
        return None
    known = {path: identity for path, identity in roots.items() if identity is not None}
    return LastScan(disks, known, lost, report)


def _pack(identity: Identity | None) -> list[Any] | None:
    if identity is None:
        return None
    return [identity.device, identity.inode, identity.fsid, identity.boundary.value]


def _unpack(packed: Sequence[Any] | None) -> Identity | None:
    if packed is None:
        return None
    device, inode, fsid, boundary = packed
    return Identity(int(device), int(inode), int(fsid), Boundary(boundary))


def _pack_instance(instance: model.Instance) -> list[Any]:
    return [
        instance.uuid,
        instance.host,
        _texts(instance.images),
        _texts(instance.directories),
        instance.swap_mb,
        [each.size_gb for each in instance.ephemerals],
    ]


def _unpack_instance(packed: Sequence[Any]) -> model.Instance:
    uuid, host, images, directories, swap_mb, ephemerals = packed
    sizes = tuple(model.Ephemeral(int(size)) for size in ephemerals)
    return model.Instance(uuid, host, tuple(images), tuple(directories), int(swap_mb), sizes)


def _texts(values: Iterable[object]) -> list[str]:
    """Return what can be an id or a name. The pass that was given the rest has reported it."""
    return [value for value in values if isinstance(value, str)]


def parse_readings(data: bytes) -> dict[str, tuple[str, ...]] | None:
    """Return the names by path of disk in an older release's form. Returns None for anything torn."""
    try:
        found = json.loads(data)
        return {str(path): tuple(str(name) for name in names) for path, names in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def load_readings(where: layout.Layout, host_id: str) -> dict[str, tuple[str, ...]]:
    """Return the names by path of disk that a host's last pass saw. What cannot be read says nothing."""
    readings, _problem = _read(where.readings(host_id), parse_readings)
    return readings or {}


def readings_to_json(last: LastScan) -> bytes:
    """Return the names by path of disk in an older release's form."""
    return json.dumps({path: sorted(disk.names) for path, disk in sorted(last.disks.items())}).encode()
