# SPDX-License-Identifier: Apache-2.0
"""What the facts of a reading mean for the bases: which disk refers to which, and what cannot be told.

What cannot be told keeps as little as is safe: what that very file referred to before; in the directory of a
reported instance, that instance's images; else everything.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from imagecache_lib import errors, model
from imagecache_lib.store import named_roots
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.named_roots import Named
from imagecache_lib.store.seen import LastScan, SeenDisk, elsewhere
from imagecache_lib.system.names import is_at_or_below
from imagecache_lib.upkeep.absence import Absence
from imagecache_lib.upkeep.chains import Chains
from imagecache_lib.upkeep.facts import (
    DanglingLink,
    Fact,
    Found,
    LinkedFile,
    MissingInstance,
    NotADirectoryName,
    Overlay,
    PassedOver,
    Unfinished,
    Unreadable,
    Unsettled,
)
from imagecache_lib.upkeep.follow import Follower
from imagecache_lib.upkeep.names import Names, lasting
from imagecache_lib.upkeep.owners import UUID, Owners
from imagecache_lib.upkeep.roots import Roots, how_to_forget

#: Files of hypervisors and services that lie beside disks, and are none.
_NO_DISK = re.compile(r".*\.log(\.\d+)?|disk\.info|disk\.config|.*\.xml|.*\.pid|.*\.fifo")

#: A file shorter than this has no header that names another.
_SHORTEST_HEADER = 72

_WAIT = "wait for the next pass"


class Disks:
    """The references of one reading.

    :ivar problems: what could not be determined, a sentence each with what to do, the worst first.
    :ivar unknown: why no base may go, as a clause, or None if everything is known.
    :ivar roots: which directories the disk roots are.
    :ivar unfinished: paths of disks in the making, or of what is left of one.
    :ivar removed: by name of a base, a disk that referred to it and was removed, and the proof, as a clause.
    """

    def __init__(
        self,
        cache: CacheStore,
        found: Found,
        last: LastScan,
        report: Sequence[model.Instance],
        *,
        named: Named,
        names: Names,
        follower: Follower,
    ) -> None:
        self._configured = cache.config.roots
        self._found = found
        self._last = last
        self._report = report
        self._names = names
        self._follower = follower
        self._owners = Owners(report, {*cache.config.roots, *found.roots, *last.roots})
        # Of the others the driver says nothing that could be kept.
        tells = [each for each in report if any(each.images) or each.swap_mb or each.ephemerals]
        self._told = {each.uuid for each in tells}
        self._chains = Chains(
            follower,
            names,
            base_path=cache.layout.base_path,
            read={fact.path for fact in found.facts if isinstance(fact, Overlay)},
        )
        self._disks: dict[str, SeenDisk] = {}
        self._covered: list[SeenDisk] = []
        self._pending: list[SeenDisk] = []
        self.removed: dict[str, str] = {}
        uuids = [each.uuid for each in report] if report or last.report else None
        self._absence = Absence(last, found, uuids, self._owners)
        self.roots = Roots(
            found,
            last,
            named,
            absence=self._absence,
            report=report,
            host_name=cache.host.name,
            follower=follower,
        )
        self.problems: list[str] = []
        self.unknown: str | None = None
        self.unfinished = sorted({each.path for each in found.facts if isinstance(each, Unfinished)})
        if last.unreadable is not None:
            self._everything_stays(
                last.unreadable, "make it readable, or remove it once every disk root is mounted"
            )
        for note, why in named.damaged.items():
            # That of a disk root which was read, as the directory that it is now, would say nothing new.
            if note not in self._own_notes(cache):
                self._everything_stays(
                    why, "make it readable, or remove it if no process with other disk roots is here"
                )

    def users(self, targets: Mapping[tuple[int, int], str]) -> Iterator[tuple[str, str]]:
        """Yield the name of each base that a disk refers to, and which disk, as a clause.

        :param targets: the bases' names by ``(st_dev, st_ino)``.
        """
        for fact in self._found.facts:
            yield from self._users_of(fact, targets)
        for disk in self._not_proved():
            if self._disks.setdefault(disk.path, disk) is not disk:
                self._covered.append(disk)
            self._pending.append(disk)
            for name in disk.names:
                yield name, f"used by the disk {disk.path}, which is not to be seen now"
        for why, next_step in self.roots.unknown():
            self._everything_stays(why, next_step)

    def _own_notes(self, cache: CacheStore) -> set[str]:
        """Return the paths that the notes of the disk roots which this process names may have now."""
        return {
            path
            for root in self._configured
            for identity in (None, self._found.roots.get(root))
            for path in named_roots.paths(cache.layout, cache.host_id, root, identity)
        }

    def _users_of(self, fact: Fact, targets: Mapping[tuple[int, int], str]) -> Iterator[tuple[str, str]]:
        if isinstance(fact, Overlay):
            for name in self._refers_to(fact, targets):
                yield name, f"used by the disk {fact.path}"
        elif isinstance(fact, LinkedFile):
            if (linked := targets.get(fact.target)) is not None:
                owner = self._owners.one_of(fact.path)
                disk = SeenDisk(fact.path, (linked,), fact.directory, fact.inode, 0, owner)
                self._disks.setdefault(fact.path, disk)
                yield linked, f"used by the link {fact.path}"
        elif isinstance(fact, DanglingLink):
            for name in self._names.find([os.fsencode(fact.target)]):
                yield name, f"used by the link {fact.path}"
        elif isinstance(fact, Unreadable):
            for name in self._kept_for(fact):
                yield name, f"used by the disk {fact.path}"
        else:
            self._note(fact)

    def seen(self, instances: Sequence[model.Instance] | None) -> LastScan:
        """Return what to remember of this reading.

        :param instances: what the driver reported now, or None if it reported nothing.
        """
        last, found = self._last, self._found
        pending = [disk.path for disk in self._pending if disk.directory.identity is not None]
        roots = self.roots.to_remember(self._configured, self._disks)
        lost = dict(found.lost)
        # What fsck put aside since explains the absence of what was there before, until that is found.
        lost.update({top: then for top, then in last.lost.items() if _any_below(pending, top)})
        lost.update({top: 0 for top in found.lost if top not in last.lost and _any_below(pending, top)})
        report = tuple(instances) if instances is not None else last.report
        return LastScan(self._disks, roots, lost, report, tuple(self._covered))

    # -- what refers ---------------------------------------------------------------------------------

    def _refers_to(self, overlay: Overlay, targets: Mapping[tuple[int, int], str]) -> set[str]:
        path = overlay.path
        exact = [self._names.exact(reference) for reference in overlay.references]
        names = {name for name in exact if name is not None}
        if None in exact:
            names |= self._names.find(overlay.references)
        if None in exact or not self._chains.lie_in_cache(overlay.references):
            leads_on = None in exact or self._leads_on(overlay, targets, names)
            # A disk that is pinned raw counts by the names in it and no more: its guest wrote the header.
            is_followed = leads_on and self._follower.pinned(path) != "raw"
            if is_followed:
                followed = self._chains.follow(overlay, targets, names)
                if not followed.is_whole:
                    names |= self._chain_cannot_be_read(overlay)
                elif followed.device is not None:
                    names |= self._was_on_device(overlay, followed.device, names)
        remembered = names | lasting(overlay.references) if None in exact else names
        if remembered:
            self._disks[path] = SeenDisk(
                path,
                tuple(sorted(remembered)),
                overlay.directory,
                overlay.inode,
                overlay.born,
                self._owners.one_of(path),
            )
        return names

    def _leads_on(self, overlay: Overlay, targets: Mapping[tuple[int, int], str], names: set[str]) -> bool:
        before = self._before(overlay)
        return self._chains.leads_on(overlay, targets, names, () if before is None else before.names)

    def _chain_cannot_be_read(self, overlay: Overlay) -> set[str]:
        """Return what a disk referred to before whose backing files cannot all be read now."""
        before = self._before(overlay)
        if before is not None:
            self.problems.append(
                f"The backing files of {overlay.path} cannot all be read: what it referred to before stays."
                " Make them readable."
            )
            return set(before.names)
        owners = self._owners.of(overlay.path)
        told = bool(owners) and owners <= self._told
        if not told and self._follower.may_be_pinned(overlay.path, "qcow2"):
            # Its format is known, so that no guest wrote this; and it was never read while its chain was
            # there.
            self._everything_stays(
                f"the backing files of {overlay.path} cannot all be read",
                "make them readable, or remove the disk if it is not needed",
            )
        return set()

    def _was_on_device(self, overlay: Overlay, device: str, names: Collection[str]) -> set[str]:
        """Return what a disk referred to before whose chain leads through a block device: another device may
        have its path by now, as loop devices do after each boot."""
        before = self._before(overlay)
        more = set() if before is None else set(before.names).difference(names)
        if more:
            self.problems.append(
                f"The backing files of {overlay.path} lead through {device}, which may be another device than"
                " before: what the disk referred to before stays. Attach what belongs there; if the disk does"
                f" not need it any more, {how_to_forget(overlay.path)}"
            )
        return more

    def _before(self, disk: Overlay) -> SeenDisk | None:
        """Return what the last pass saw of a disk, also under the name that its directory had then."""
        found = self._last.disks.get(disk.path)
        if found is not None or not disk.born:
            return found
        return next((each for each in self._by_inode.get(disk.inode, ()) if each.born == disk.born), None)

    @functools.cached_property
    def _by_inode(self) -> Mapping[int, Sequence[SeenDisk]]:
        """What the last pass saw. Needed only for disks whose backing files cannot be read."""
        found: dict[int, list[SeenDisk]] = {}
        for disk in self._last.disks.values():
            found.setdefault(disk.inode, []).append(disk)
        return found

    # -- what is not there ---------------------------------------------------------------------------

    def _not_proved(self) -> list[SeenDisk]:
        """Return the disks that were seen before, are not seen now, and that nothing proves to be removed."""
        read = {fact.path for fact in self._found.facts if isinstance(fact, Unreadable)}
        missing = []
        for path in self._last.disks:
            if path in self._disks or path in read:
                continue
            disk = self._last.disks[path]
            if self._absence.is_proved(disk):
                why = f"the disk {path} was removed: {self._absence.proof(disk)}"
                self.removed.update(dict.fromkeys(disk.names, why))
            else:
                missing.append(disk)
        missing += self._covered_by_others()
        told: dict[str, list[str]] = {}
        passed_over = {fact.path for fact in self._found.facts if isinstance(fact, PassedOver)}
        for disk in missing:
            over = next((path for path in passed_over if is_at_or_below(disk.path, path)), None)
            told.setdefault(over or os.path.dirname(disk.path), []).append(disk.path)
        links = [fact.path for fact in self._found.facts if isinstance(fact, DanglingLink)]
        for directory, paths in sorted(told.items()):
            link = next((each for each in links if is_at_or_below(paths[0], each)), None)
            why, way_out = "and nothing proves that it was removed", "Mount what belongs there; if it is gone"
            if directory in passed_over:
                why, way_out = (
                    f"since {directory} is passed over",
                    "If no disk of a guest is there, and it stays so",
                )
            elif link is not None:
                why = f"since {link} leads nowhere"
            elif paths[0] in self._disks:
                why = "since what has its path now may be another disk"
                way_out = "Mount what belongs there; if what was there before is gone"
            elif paths[0] in self._absence.leading_elsewhere:
                why = "since what is there refers to no base image, and may be another disk than before"
                way_out = "Mount what belongs there; if it needs none any more"
            more = f" (and {len(paths) - 1} others there)" if len(paths) > 1 else ""
            self.problems.append(
                f"{paths[0]}{more} is not to be seen now, {why}: what it referred to before stays."
                f" {way_out} for good, {how_to_forget(directory)}"
            )
        return missing

    def _covered_by_others(self) -> Iterator[SeenDisk]:
        """Yield the disks at whose paths others are seen now, and that nothing proves to be removed."""
        last = self._last
        paths = dict.fromkeys(elsewhere(last.disks, self._disks))
        linked = (path for path in sorted(self._absence.linked) if path in self._disks)
        paths.update(dict.fromkeys(path for path in linked if path in last.disks))
        for disk in (*(last.disks[path] for path in paths), *last.covered):
            now = self._disks.get(disk.path)
            if now is None:
                if not self._absence.is_proved(disk):
                    yield disk
            elif now is not disk and not self._absence.is_replaced(disk, now):
                yield disk

    # -- what cannot be told -------------------------------------------------------------------------

    def _kept_for(self, fact: Unreadable) -> tuple[str, ...]:
        """Return the names that a file which cannot be read may refer to."""
        before = self._last.disks.get(fact.path)
        if not fact.is_directory and _is_no_disk(fact, was_disk=before is not None):
            return ()
        if before is not None:
            self._disks[fact.path] = before
            if _is_same_file(before, fact):
                self.problems.append(
                    f"{fact.path} cannot be read ({fact.cause}): what it referred to before stays."
                    " Make it readable."
                )
                return before.names
        owners = sorted(self._owners.of(fact.path))
        if fact.too_deep:
            self._note_too_deep(fact.path, owners)
            return before.names if before is not None else ()
        untold = [owner for owner in owners if owner not in self._told]
        if owners and not untold:
            self.problems.append(
                f"{fact.path} cannot be read ({fact.cause}): the images of instance {' and '.join(owners)}"
                " stay. Make it readable."
            )
        elif owners:
            self._everything_stays(
                f"{fact.path} cannot be read ({fact.cause}), and the driver reports nothing that instance"
                f" {untold[0]} uses",
                "make it readable, or report the images of the instance",
            )
        elif fact.foreign and not UUID.search(fact.path):
            self.problems.append(
                f"{fact.path} cannot be read ({fact.cause}), and is taken for a directory of another service."
                " Make it readable if it holds disks."
            )
        else:
            self._everything_stays(
                f"{fact.path} cannot be read ({fact.cause})",
                "make it readable, or remove it if no instance needs it",
            )
        return before.names if before is not None else ()

    def _note_too_deep(self, path: str, owners: Sequence[str]) -> None:
        """Take note of a directory whose path is too long for a hypervisor to open a disk in it.

        :param owners: the reported instances in whose directory it lies.
        """
        root = max((each for each in self._found.roots if is_at_or_below(path, each)), key=len, default="/")
        top = os.path.join(root, os.path.relpath(path, root).split("/")[0])
        why = f"directories below {top} are nested so deep that they cannot be read by their paths"
        if not owners:
            self._everything_stays(why, "remove them, or move them up or away")
            return
        problem = (
            f"{why[0].upper()}{why[1:]}: the images of instance {' and '.join(owners)} stay. Remove them."
        )
        if problem not in self.problems:
            self.problems.append(problem)

    def _note(self, fact: Fact) -> None:
        if isinstance(fact, MissingInstance):
            self.problems.append(
                f"Instance {fact.uuid} is on this host and has no directory: its images stay. Mount its disk"
                " root, add it to disk_roots, or correct what the driver reports."
            )
        elif isinstance(fact, NotADirectoryName):
            self.problems.append(
                f"The driver reports {errors.shown(fact.name)} as a directory of instance {fact.uuid!r},"
                " which is no name of one. It is passed over. Correct what the driver reports."
            )
        elif isinstance(fact, Unsettled):
            self._everything_stays(f"{fact.path} changed all the while it was read", _WAIT)

    def _everything_stays(self, why: str, next_step: str) -> None:
        self.problems.insert(0, f"Nothing is evicted: {why}. To go on: {next_step}.")
        if self.unknown is None:
            self.unknown = why


def _is_no_disk(fact: Unreadable, *, was_disk: bool) -> bool:
    """Whether a file that cannot be read is none of a guest's disks all the same.

    :param was_disk: one of that name referred to a base, which tells more than the name does.
    """
    if fact.size is not None and fact.size < _SHORTEST_HEADER:
        return True
    return not was_disk and _NO_DISK.fullmatch(os.path.basename(fact.path)) is not None


def _is_same_file(before: SeenDisk, fact: Unreadable) -> bool:
    """Whether a file is the one that was read before, as far as is known."""
    if before.inode == 0 or fact.inode == 0:
        return True
    if before.inode != fact.inode:
        return False
    return before.born == fact.born or 0 in (before.born, fact.born)


def _any_below(paths: Iterable[str], root: str) -> bool:
    return any(is_at_or_below(path, root) for path in paths)
