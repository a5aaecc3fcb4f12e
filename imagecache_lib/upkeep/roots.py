# SPDX-License-Identifier: Apache-2.0
"""Which directories the disk roots are now, by what they were.

One that is not mounted is an empty directory, or none, and says nothing of the disks in it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence

from imagecache_lib import model
from imagecache_lib.store.identity import identity_now
from imagecache_lib.store.named_roots import Named, Noted
from imagecache_lib.store.seen import Identity, LastScan
from imagecache_lib.system import names
from imagecache_lib.upkeep.absence import Absence, is_same_root
from imagecache_lib.upkeep.facts import Found, MissingRoot, Overlay
from imagecache_lib.upkeep.follow import Follower
from imagecache_lib.upkeep.scan import directory_names


class Roots:
    """The disk roots of one reading.

    :ivar moved: paths of those that are other directories than before, and for which nothing vouches.
    :ivar unmatched: paths of those in which a process of this host made disks as they were directories that
        they are not now, and that no pass remembers.
    :ivar unmounted: paths at which a filesystem was mounted as a process of this host made disks in it that
        no pass has seen, and at which another directory is now, or none.
    :ivar notes_seen: paths of the notes whose directories this reading has read.
    :ivar notes_retired: paths of the notes of directories that the root was, and is now by another identity.
    :param absence: what the reading proves.
    :param report: the instances that there are.
    :param host_name: this host's name in the report.
    """

    def __init__(
        self,
        found: Found,
        last: LastScan,
        named: Named,
        *,
        absence: Absence,
        report: Sequence[model.Instance],
        host_name: str,
        follower: Follower,
    ) -> None:
        self._found = found
        self._last = last
        self._named = named
        self._follower = follower
        self._local = [instance for instance in report if instance.host == host_name]
        self._missing = [fact for fact in found.facts if isinstance(fact, MissingRoot)]
        self._overlays = {fact.path for fact in found.facts if isinstance(fact, Overlay)}
        moved = [each.path for each in absence.moved_roots(last, found)]
        self.moved = [path for path in moved if not self._is_vouched_for(path)]
        self._right = set(found.roots).difference(self.moved, (fact.path for fact in self._missing))
        self.unmatched: set[str] = set()
        self.unmounted: set[str] = set()
        self.notes_seen: list[str] = []
        self.notes_retired: list[str] = []
        self._judge_notes()

    def _judge_notes(self) -> None:
        """Compare what processes wrote down with what the roots are now."""
        gone = {fact.path for fact in self._missing}
        for noted in self._named.noted:
            root, identity = noted.root, noted.identity
            if identity is None:
                continue
            if noted.is_volume:
                self._judge_volume(noted, identity)
                continue
            now = None if root in gone else self._found.roots.get(root)
            before = self._last.roots.get(root)
            if now is not None and is_same_root(identity, now):
                self.notes_seen += [] if noted.is_seen else [noted.note]
            elif before is not None and is_same_root(identity, before):
                # What is remembered of it counts until its absence is proved. From now on another directory,
                # if that was accepted, is remembered, or the same one by its device's new number.
                self.notes_retired += [noted.note] if root in self._right else []
            elif now is not None and self._has_all(root):
                self.notes_seen += [] if noted.is_seen else [noted.note]
            else:
                self.unmatched.add(root)

    def _judge_volume(self, noted: Noted, identity: Identity) -> None:
        """Compare what was mounted between a disk root and a disk with what is there now.

        If a pass has seen the disks, what is remembered of them keeps their bases.
        """
        if noted.is_seen:
            return
        answers = self._follower.at(noted.root).call(lambda: _is_there(noted.root, identity))
        if answers == [True]:
            self.notes_seen.append(noted.note)
        else:
            self.unmounted.add(noted.root)

    def _is_vouched_for(self, root: str) -> bool:
        """Whether a root that is another directory than before is the right one all the same.

        A disk that was read in it before is there, or there are local instances, and all are in it.
        """
        if any(names.is_at_or_below(path, root) and path in self._overlays for path in self._last.disks):
            return True
        return self._has_all(root)

    def _has_all(self, root: str) -> bool:
        """Whether there are local instances, and all have a directory in a disk root."""
        answers = self._follower.roots.call(lambda: _has_all(root, self._local))
        return bool(self._local) and bool(answers) and answers[0]

    def unknown(self) -> Iterator[tuple[str, str]]:
        """Yield why everything stays, as a clause, and what to do."""
        for root in self.moved:
            yield (
                f"the disk root {root} is another directory than before, or on another device",
                f"mount what belongs there; if this is right, {how_to_forget(root)}",
            )
        for fact in self._missing:
            yield from self._unknown_of(fact)
        gone = {fact.path for fact in self._missing}
        for root in sorted(self.unmatched.difference(self.moved, gone)):
            yield (
                f"the disk root {root} is not the directory in which a process of this host made disks",
                f"mount what belongs there; or if no disk is in it, {how_to_forget(root)}",
            )

        for path in sorted(self.unmounted):
            yield (
                f"at {path} is not what was mounted there as a process of this host made disks in it",
                f"mount what belongs there; or if no disk is in it, {how_to_forget(path)}",
            )

    def _unknown_of(self, fact: MissingRoot) -> Iterator[tuple[str, str]]:
        path, named = fact.path, self._named
        if fact.configured:
            yield f"{path} cannot be read ({fact.cause})", "mount it, or take it out of disk_roots"
        elif path in named.unseen or (path in named.roots and path not in self._last.roots):
            who = "which another process of this host names"
            yield (
                f"the disk root {path}, {who}, cannot be read ({fact.cause})",
                f"mount it; or if no disk is there, {how_to_forget(path)}",
            )

    def to_remember(self, configured: Sequence[str], disks: Iterable[str]) -> dict[str, Identity]:
        """Return which directories the roots are, or were last as they were what they have to be.

        :param configured: paths of those that the configuration names. Others are left out that have no disk
            which is below no other one.
        :param disks: paths of the disks that are remembered.
        """
        found, wrong = self._found.roots, {*self.moved, *self.unmatched}
        roots = {path: identity for path, identity in found.items() if path not in wrong}
        for path, identity in self._last.roots.items():
            if path in wrong or path not in found:
                roots[path] = identity
        more = sorted((path for path in roots if path not in configured), key=len, reverse=True)
        if not more:
            return roots
        left = {path for path in disks if not any(names.is_at_or_below(path, root) for root in configured)}
        for root in more:
            below = {path for path in left if names.is_at_or_below(path, root)}
            if not below:
                del roots[root]
            left -= below
        return roots


def _has_all(root: str, instances: Iterable[model.Instance]) -> bool:
    """Whether a disk root has a directory of each instance."""
    return all(
        any(os.path.isdir(os.path.join(root, name)) for name in directory_names(instance))
        for instance in instances
    )


def _is_there(path: str, identity: Identity) -> bool:
    """Whether a directory is the one that it was."""
    try:
        return is_same_root(identity, identity_now(path, identity))
    except OSError:
        return False


def how_to_forget(path: str) -> str:
    """Return what an operator does to forget the disks at a path and below it, as a clause."""
    return f"run once: imagecache disk forget {shlex.quote(path)}"
