# SPDX-License-Identifier: Apache-2.0
"""Who needs which base. A reference that cannot be determined counts as one: unknown means keep.

The sources are independent of each other: what the driver reports or last reported, the disks of every
instance directory, pins, leases, and a QEMU that has the base open. Hard links are in the inventory.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from imagecache_lib import errors, model
from imagecache_lib.store import last_scan, layout, named_roots, pins, trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.seen import LastScan
from imagecache_lib.system import block_devices, holders
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.upkeep.disks import Disks
from imagecache_lib.upkeep.follow import Follower, Looked
from imagecache_lib.upkeep.names import Names
from imagecache_lib.upkeep.owners import UUID
from imagecache_lib.upkeep.scan import Scan

#: How a running QEMU needs a base image, as a clause.
OPEN_IN_QEMU = "open in a running QEMU"

#: Why a base stays that is leased, or whose lock another process holds.
LEASED = "leased: it is being used or fetched now"


@dataclasses.dataclass(frozen=True)
class References:
    """Who needs what.

    :param users: for each base that is needed, one that needs it, as a clause.
    :param unknown: why no base may go, as a clause, or None if everything is known.
    :param problems: what could not be determined, a sentence each with what to do.
    :param seen: what to remember of this reading.
    :param unfinished: paths of disks in the making, or of what is left of one.
    :param removed: for each base to which no disk refers any more, one that did, and what proves that it was
        removed, as a clause.
    :param notes_seen: as :class:`~imagecache_lib.upkeep.roots.Roots` has them.
    :param notes_retired: likewise.
    """

    users: Mapping[str, str]
    unknown: str | None = None
    problems: tuple[str, ...] = ()
    seen: LastScan = dataclasses.field(default_factory=LastScan)
    unfinished: tuple[str, ...] = ()
    removed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes_seen: tuple[str, ...] = ()
    notes_retired: tuple[str, ...] = ()

    def not_remembered(self, path: str, error: OSError) -> References:
        """Return the same, with everything needed: the next pass would not know of the disks that were seen.

        :param path: of the file in which that is to be written down.
        :param error: why it cannot.
        """
        why = f"what was seen cannot be remembered: {path}: {error.strerror}"
        problem = f"Nothing is evicted: {why}. To go on: make it writable, or move away what is in its place."
        return dataclasses.replace(self, unknown=self.unknown or why, problems=(problem, *self.problems))


def collect(
    cache: CacheStore,
    names: Collection[str],
    instances: Sequence[model.Instance] | None,
    last: LastScan,
    *,
    follower: Follower,
    now: float,
) -> References:
    """Read all references to these names.

    :param names: bases in the cache and in the trash.
    :param instances: what the driver reports or last reported, or None if it could not tell: then everything
        is needed.
    :param last: what the last pass saw.
    :param now: epoch seconds of the filesystem's clock, for pins that expire.
    """
    report = instances if instances is not None else last.report or ()
    wanted = Names(names)
    named = named_roots.of_host(cache.layout, cache.host_id, now=now)
    others = dict.fromkeys([*last.roots, *sorted(named.roots)])
    found = Scan(cache, others, condense=wanted.condense, follower=follower).run(report)
    disks = Disks(cache, found, last, report, named=named, names=wanted, follower=follower)
    targets = dict(_files_of(cache, names))
    users: dict[str, str] = {}
    for name, user in disks.users(targets):
        if name in names:
            users.setdefault(name, user)
    problems = list(disks.problems)
    for name, user in reported(names, report, problems):
        users.setdefault(name, user)
    for name, user in _of_other_hosts(cache, names):
        users.setdefault(name, user)
    for name in set(pins.names(cache)).intersection(names):
        if (pinned := pins.look(cache, name, now)) is not None:
            users.setdefault(name, pinned.reason)
    users.update(_in_use_now(cache, set(names).difference(users)))
    for name, device in _attached(wanted, targets, follower):
        # What lies on the device may be a disk of which no file tells.
        users.setdefault(name, f"attached to /dev/{device} on this host")
    unknown = disks.unknown
    if instances is None:
        unknown = "the driver could not tell which instances there are"
        problems.insert(0, f"Nothing is evicted: {unknown}.")
    return References(
        users,
        unknown,
        tuple(dict.fromkeys(problems)),
        disks.seen(instances),
        tuple(disks.unfinished),
        {name: why for name, why in disks.removed.items() if name in names and name not in users},
        # A disk that could not be read was not seen.
        tuple(disks.roots.notes_seen) if disks.unknown is None else (),
        tuple(disks.roots.notes_retired),
    )


def _attached(
    wanted: Names, targets: Mapping[tuple[int, int], str], follower: Follower
) -> Iterator[tuple[str, str]]:
    """Yield the names of the bases that loop devices of this host have as their files, and the devices."""
    for device, file in block_devices.loop_files().items():
        found = wanted.find([file])
        if not found or file.endswith(block_devices.DELETED):
            continue  # a file without a name is no base that is in the cache
        looked = follower.look(os.fsdecode(file))
        if isinstance(looked, Looked):
            # Another cache's base may have the same name.
            found = {targets[looked.target]} if looked.target in targets else set()
        # A path that leads nowhere is one of another mount namespace: then the name counts.
        yield from ((name, device) for name in found)


def _files_of(cache: CacheStore, names: Collection[str]) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield ``(st_dev, st_ino)`` and the name of each base, in the cache or in the trash."""
    paths = [(name, cache.layout.base(name)) for name in names]
    paths += [(entry.name, entry.path) for entry in trash.find(cache)]
    for name, path in paths:
        try:
            found = os.stat(path, follow_symlinks=False)
        except OSError:
            continue
        yield (found.st_dev, found.st_ino), name


def reported(
    names: Iterable[str], instances: Sequence[model.Instance], problems: list[str]
) -> Iterable[tuple[str, str]]:
    """Yield the name of each base that the driver's report refers to, and which instance does, as a clause.

    An image that is used needs its legacy resized bases too.

    :param problems: gets a sentence for each id that no image can have, and so no base.
    """
    by_original: dict[str, list[str]] = {}
    for name in names:
        by_original.setdefault(name.partition("_")[0], []).append(name)
    originals: dict[str, tuple[str, ...]] = {}
    for instance in instances:
        user = f"used by instance {instance.uuid} on {instance.host}"
        for image_id in instance.images:
            found = originals.get(image_id) if isinstance(image_id, str) else None
            if found is None:
                try:
                    found = _originals_of(image_id)
                except errors.ImageRejected as error:
                    problems.append(
                        f"The driver reports that instance {instance.uuid} uses an image, and {error.cause}."
                        " Leave out what it does not have, and correct the rest."
                    )
                    continue
                originals[image_id] = found
            for original in found:
                for name in by_original.get(original, ()):
                    yield name, user
        if instance.swap_mb:
            yield layout.swap_name(instance.swap_mb), user
        for ephemeral in instance.ephemerals:
            # Which filesystem it has is the guest's type's and the operator's choice: any of that size.
            for name in by_original.get("ephemeral", ()):
                if name.startswith(f"ephemeral_{ephemeral.size_gb}_"):
                    yield name, user


def _originals_of(image_id: str) -> tuple[str, ...]:
    """Return the names that the base of an image may have: a uuid means the same image in capitals.

    :raises ImageRejected: no image can have that id.
    """
    name = layout.base_name(image_id)
    if not UUID.fullmatch(image_id):
        return (name,)
    return tuple({name, *(layout.base_name(each) for each in (image_id.lower(), image_id.upper()))})


def _of_other_hosts(cache: CacheStore, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each base that the last pass of another host saw in use, and where, as a clause.

    Nothing is unlinked before those hosts have looked again. But while a base lies in the trash, a guest on
    it cannot be started, and QEMU does not know that it could be put back.
    """
    try:
        members = os.listdir(cache.layout.hosts)
    except FileNotFoundError:
        return
    for entry in members:
        host_id = entry.removesuffix(".json")
        if host_id in (entry, cache.host_id):
            continue
        for path, referred in last_scan.load_readings(cache.layout, host_id).items():
            for name in referred:
                if name in names:
                    yield name, f"used by the disk {path} of another host, as its last pass saw it"


def _in_use_now(cache: CacheStore, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each base that a lease or a QEMU on this host uses, in the cache or in the trash, and
    which of them does, as a clause."""
    paths = [(name, cache.layout.base(name)) for name in names]
    paths += [(entry.name, entry.path) for entry in trash.find(cache) if entry.name in names]
    for name, path in paths:
        if (user := _user_now(path)) is not None:
            yield name, user


def _user_now(path: str) -> str | None:
    try:
        file = Descriptor(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        # If it is gone or no file, no QEMU has it open as an image. If it cannot be read, one may have.
        gone = error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO)
        return None if gone else OPEN_IN_QEMU
    with file as fd:
        if holders.is_leased(fd):
            return LEASED
        return OPEN_IN_QEMU if holders.is_open_in_qemu(fd) else None


def is_leased(path: str) -> bool:
    """Whether the base image at a path is leased."""
    return _user_now(path) == LEASED


class Memory(Protocol):
    """What the passes of this host remember."""

    def load(self) -> LastScan:
        """Return what the last pass saw and was told."""


@dataclasses.dataclass(frozen=True)
class ReferenceReader:
    """Reads who refers to base images, as often as it is asked.

    :param instances: all instances on this host, on shared storage those of all hosts; or None if they are
        unknown.
    :param last: what the last pass saw.
    :param now: epoch seconds of the filesystem's clock.
    :param memory: may know more by now, from another process.
    """

    cache: CacheStore
    instances: Sequence[model.Instance] | None
    last: LastScan
    follower: Follower
    now: float
    memory: Memory

    def read(self, names: Collection[str]) -> References:
        """Read all references to these base images anew."""
        return collect(self.cache, names, self.instances, self.last, follower=self.follower, now=self.now)

    def read_again(self, names: Collection[str]) -> References:
        """Read them once more, with what other processes of this host saw and were told meanwhile."""
        # This one may have been stopped since it read them, while another one's pass saw disks that are not
        # to be seen any more.
        known, instances = self.memory.load(), self.instances
        last = dataclasses.replace(known, unreadable=self.last.unreadable or known.unreadable)
        if instances is not None and known.report is not None and known.report is not self.last.report:
            there = {each.uuid: each for each in instances}
            instances = (
                *instances,
                *(each for each in known.report if there.get(each.uuid) != each),
            )
        return collect(self.cache, names, instances, last, follower=self.follower, now=self.now)
