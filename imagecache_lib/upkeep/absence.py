# SPDX-License-Identifier: Apache-2.0
"""Whether a disk that was seen and is not seen now was removed. Pure: what is not there is not thereby
deleted.

It was removed if

(a) the same directory was read to its end without it, and without a link, a device's node or a mount of its
    name; or
(b) its directory is gone or another one, was where no mount and no link led, and the directory above is the
    same and was read, or is itself proved gone in this way; or
(c) its instance was in an earlier report, and is not in the last one, in which no other has its directory; or
(d) an operator says so, which takes it out of what is remembered.

Another disk of its path, in another directory or behind a link, is no proof either: both count.

A volume that is not mounted, a link that leads elsewhere, another mount namespace, a root that is another
directory than before, and what fsck moved into a ``lost+found`` that cannot be read prove nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence

from imagecache_lib.store.seen import Boundary, Identity, LastScan, SeenDirectory, SeenDisk
from imagecache_lib.system.names import is_at_or_below
from imagecache_lib.upkeep.facts import DanglingLink, DeviceNode, Found, LinkedFile, MountPoint, ReadDirectory
from imagecache_lib.upkeep.owners import Owners, key

_LINKS = (DanglingLink, LinkedFile, DeviceNode)


@dataclasses.dataclass(frozen=True)
class RootMoved:
    """A disk root that is another directory than before, and for which nothing vouches."""

    path: str


def same(one: Identity, other: Identity) -> bool:
    """Whether two identities are of one directory, as far as numbers tell.

    A device's number may be given to another filesystem; the filesystem's own id tells then, if it has one.
    """
    if not _same_numbers(one, other):
        return False
    if one.fsid and other.fsid:
        return one.fsid == other.fsid
    return one.device == other.device


def is_same_root(before: Identity, now: Identity) -> bool:
    """Whether a disk root in which no pass saw a disk yet is the directory that it was.

    Nothing was seen below it that tells whether a boot has only given its device another number. When it was
    born tells that, to the nanosecond.
    """
    return same(before, now) or (_is_only_renumbered(before, now) and before.born == now.born != 0)


def _same_numbers(one: Identity, other: Identity) -> bool:
    """Whether two directories are the same one if their filesystem is the same one."""
    return one.inode == other.inode and (one.born == other.born or 0 in (one.born, other.born))


class Absence:
    """What a reading proves about the disks that it did not find.

    :param last: what the last pass saw.
    :param found: what was read now.
    :param reported: uuids in the driver's last report, or None if there was no report.
    :param owners: tells whose a disk is by that report: a driver may report an instance by another uuid than
        before. With None no directory is in the report.
    """

    def __init__(
        self,
        last: LastScan,
        found: Found,
        reported: Collection[str] | None,
        owners: Owners | None = None,
    ) -> None:
        self._reported = None if reported is None else frozenset(key(uuid) for uuid in reported)
        self._owners = owners
        self._renumbered = _renumbered(last, found)
        self._directories = found.directories
        self._facts = found.facts
        # An older release did not look at what fsck puts aside.
        knows = any(root.inode for root in last.roots.values())
        self._lost = [top for top, changed in found.lost.items() if knows and last.lost.get(top) != changed]

    # Needed only if a disk is missing, which most passes do not see.

    @functools.cached_property
    def _by_path(self) -> Mapping[str, ReadDirectory]:
        return {each.seen.path: each for each in self._directories}

    @functools.cached_property
    def _mount_points(self) -> frozenset[str]:
        return frozenset(fact.path for fact in self._facts if isinstance(fact, MountPoint))

    @functools.cached_property
    def linked(self) -> frozenset[str]:
        """Paths of links that lead nowhere or to files, and of devices' nodes."""
        return frozenset(fact.path for fact in self._facts if isinstance(fact, _LINKS)) - self._mount_points

    @functools.cached_property
    def leading_elsewhere(self) -> frozenset[str]:
        """Paths of all that is not simply the file which has the name in the directory."""
        return self.linked | self._mount_points

    @functools.cached_property
    def _by_inode(self) -> Mapping[int, Sequence[ReadDirectory]]:
        found: dict[int, list[ReadDirectory]] = {}
        for each in self._directories:
            if each.seen.identity is not None:
                found.setdefault(each.seen.identity.inode, []).append(each)
        return found

    def is_proved(self, disk: SeenDisk) -> bool:
        """Whether a disk that was not seen now was removed."""
        if self._has_left_the_report(disk):
            return True
        if any(is_at_or_below(disk.path, top) for top in self._lost):
            return False
        directory = disk.directory
        if (now := self._read_now(directory)) is not None:
            # What a link leads to may not be mounted: then it leads nowhere, or to what lies below. A node's
            # device may be detached, and what is mounted on a file hides it.
            return os.path.join(now.seen.path, os.path.basename(disk.path)) not in self.leading_elsewhere
        while directory.above is not None and self._is_gone(directory):
            if self._read_now(directory.above) is not None:
                return True
            directory = directory.above
        return False

    def proof(self, disk: SeenDisk) -> str:
        """Return what proves that a disk was removed, as a clause."""
        if self._has_left_the_report(disk):
            return f"instance {disk.instance} is not in the driver's report any more"
        return f"{disk.directory.path} was read without it, or is gone"

    def _has_left_the_report(self, disk: SeenDisk) -> bool:
        if self._reported is None or disk.instance is None or key(disk.instance) in self._reported:
            return False
        return self._owners is None or not self._owners.of(disk.path)

    def is_replaced(self, before: SeenDisk, now: SeenDisk) -> bool:
        """Whether a disk that was seen became the one that has its path now, or was removed."""
        there, here = before.directory.identity, now.directory.identity
        if there is None or here is None:
            return True  # an older release saw it, and it counts until it is seen again
        is_on_same_bases = set(before.names) <= set(now.names)
        if same(self._renumbered_identity(there), here):
            # A link may lead to what was mounted again.
            return before.path not in self.linked or is_on_same_bases
        # A disk root that was moved has copies of its disks.
        return self.is_proved(before) or (is_on_same_bases and self._is_in_another_root(before))

    def _is_in_another_root(self, disk: SeenDisk) -> bool:
        """Whether the disk root in which a disk was seen is another directory now."""
        root = disk.directory
        while root.above is not None:
            root = root.above
        return root.identity is not None and self._read_now(root) is None and root.path in self._by_path

    def _is_gone(self, directory: SeenDirectory) -> bool:
        """Whether a directory that was not read is gone or another one, if the one above it is the same."""
        if directory.identity is None or directory.identity.boundary is not Boundary.NONE:
            return False
        now = self._by_path.get(directory.path)
        if now is not None:
            # Something may be mounted over it, or it was moved away and a link left in its place.
            return now.seen.identity is not None and now.seen.identity.boundary is Boundary.NONE
        assert directory.above is not None
        above = self._read_now(directory.above)
        return above is None or os.path.basename(directory.path) not in above.entries

    def _read_now(self, directory: SeenDirectory) -> ReadDirectory | None:
        """Return the same directory as it was read now, under whatever name."""
        if directory.identity is None:
            return None
        identity = self._renumbered_identity(directory.identity)
        for each in self._by_inode.get(identity.inode, ()):
            if each.seen.identity is not None and same(identity, each.seen.identity):
                return each
        return None

    def _renumbered_identity(self, identity: Identity) -> Identity:
        device = self._renumbered.get((identity.device, identity.fsid))
        if device is None:
            return identity
        return dataclasses.replace(identity, device=device[0], fsid=device[1])

    def moved_roots(self, last: LastScan, found: Found) -> Iterator[RootMoved]:
        """Yield the roots that are other directories than before, vouched for or not."""
        for path, now in found.roots.items():
            before = last.roots.get(path)
            if before is not None and not self._is_same_root(before, now):
                yield RootMoved(path)

    def _is_same_root(self, before: Identity, now: Identity) -> bool:
        if before.inode == 0:  # an older release wrote down no inode
            return before.device == now.device or (before.fsid == now.fsid and now.fsid != 0)
        return same(self._renumbered_identity(before), now)


def _renumbered(last: LastScan, found: Found) -> dict[tuple[int, int], tuple[int, int]]:
    """Return devices that got another number, as they may at a boot, by what they were.

    The numbers of a directory's inode, and of one that was seen below it, are what they were: the filesystem
    is the same one, though its device's number is not.
    """
    renumbered: dict[tuple[int, int], tuple[int, int]] = {}
    roots = {path: now for path, now in found.roots.items() if _is_only_renumbered(last.roots.get(path), now)}
    if not roots:
        return renumbered
    seen: dict[str, Identity] = {}
    for disk in last.all_disks():
        directory: SeenDirectory | None = _place(disk)
        while directory is not None and directory.path not in seen:
            if directory.identity is not None:
                seen[directory.path] = directory.identity
            directory = directory.above
    for root, now in roots.items():
        before = last.roots[root]
        for each in found.directories:
            old, new = seen.get(each.seen.path), each.seen.identity
            if (
                old is None
                or new is None
                or each.seen.path == root
                or not is_at_or_below(each.seen.path, root)
            ):
                continue
            if _same_numbers(old, new) and (old.device, new.device) == (before.device, now.device):
                renumbered[(before.device, before.fsid)] = (now.device, now.fsid)
                break
    return renumbered


def _place(disk: SeenDisk) -> SeenDirectory:
    """Return the directory of a disk, also of one that is itself a mount."""
    directory, above = disk.directory, disk.directory.above
    return above if above is not None and above.path == directory.path else directory


def _is_only_renumbered(before: Identity | None, now: Identity) -> bool:
    """Whether a root may be the same, on a filesystem whose own id is its device's number, as that of xfs."""
    return (
        before is not None
        and _same_numbers(before, now)
        and before.device != now.device
        and before.fsid in (0, before.device)
        and now.fsid in (0, now.device)
    )
