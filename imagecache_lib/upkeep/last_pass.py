# SPDX-License-Identifier: Apache-2.0
"""What this host's last pass saw and was told, kept for the next one and for what is read between the two."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from imagecache_lib import errors, events, model
from imagecache_lib.store import last_scan, named_roots
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.hosts import Hosts
from imagecache_lib.store.last_scan_form import is_written
from imagecache_lib.store.seen import LastScan
from imagecache_lib.upkeep.follow import Follower
from imagecache_lib.upkeep.references import ReferenceReader, References

LOG = logging.getLogger(__name__)


class LastPass:
    """The disks that the last pass saw, and the instances that the driver reported to it.

    All of it is on disk. What an object of this class keeps in memory saves parsing and reading what did not
    change. Safe to share between threads.
    """

    def __init__(self, cache: CacheStore, hosts: Hosts) -> None:
        self._cache = cache
        self._hosts = hosts
        self._follower = Follower()
        self._parsed = last_scan.Parsed()
        # What the last pass of this process knew and saw, if that could not be written down.
        self._unsaved: tuple[LastScan, LastScan] | None = None

    def load(self) -> LastScan:
        """Return what the last pass saw, also if that could not be written down."""
        where, host_id = self._cache.layout, self._hosts.id
        known = last_scan.load_last_scan(where, host_id, self._hosts.own().roots, parsed=self._parsed)
        unsaved = self._unsaved
        return known if unsaved is None else last_scan.with_unsaved(known, *unsaved)

    def reader(self, instances: Sequence[model.Instance] | None, now: float) -> ReferenceReader:
        """Return what reads all references for a pass.

        :param instances: all that the driver reports now, or None if it could not tell.
        :param now: epoch seconds of the filesystem's clock.
        """
        return ReferenceReader(self._cache, instances, self.load(), self._follower, now, self)

    def reader_between_passes(self, now: float) -> ReferenceReader:
        """Return what reads all references while the driver is not asked: with its last report.

        :param now: epoch seconds of the filesystem's clock.
        """
        last = self.load()
        if last.report_unknown is not None:
            last = dataclasses.replace(last, unreadable=last.unreadable or last.report_unknown)
        return ReferenceReader(self._cache, tuple(last.report or ()), last, self._follower, now, self)

    def save(self, last: LastScan, read: References, now: float) -> OSError | None:
        """Keep what was seen, for the day on which a disk cannot be read or a root is not mounted.

        Returns None, or why that cannot be written down and is not there yet.

        :param last: what the pass before saw.
        :param read: what this one read.
        :param now: epoch seconds of the filesystem's clock, as this one began.
        """
        seen = read.seen
        if last.unreadable is not None or (last.report_unknown is not None and seen.report is None):
            return None  # what cannot be read now may be read again, and must not be replaced by less
        own = self._hosts.own()
        roots = {path: (root.device, root.fsid) for path, root in seen.roots.items()}
        if dict(own.roots) != roots:
            try:
                self._hosts.write(dataclasses.replace(own, roots=roots))
            except OSError as error:
                # The release before reads it. What this one goes by comes next.
                LOG.warning("Which directories the disk roots are cannot be told other releases: %s", error)
        try:
            self._write(last, seen)
            named_roots.retire(read.notes_retired)
            named_roots.note_seen(self._cache.layout, self._hosts.id, read.notes_seen, now=now)
        except OSError as error:
            LOG.warning("What was seen in the instance directories cannot be remembered: %s", error)
            # What is written for other releases, or tells when the pass was, may be all that is lacking.
            known = self.load()
            if known.data is not None and is_written(seen, known):
                return None
            self._unsaved = last, seen
            return error
        self._unsaved = None
        return None

    def forget(self, path: str) -> int:
        """Forget the disks that were seen at a path and below it, and the disk root if it is one.

        Returns how many disks are forgotten. What is there is seen again by the next pass.

        :raises BackendError: what was seen cannot be read, all of which would be replaced by nothing.
        :raises OSError: it cannot be written.
        """
        before = self.load()
        problem = before.unreadable or before.report_unknown
        if problem is not None:
            raise errors.BackendError(
                problem,
                path=self._cache.layout.last_scan(self._hosts.id),
                next_step="make it readable, or remove it once every disk root and volume is mounted",
            )
        after = before.without(path)
        stays = set(after.disks)
        gone = [disk for disk in before.all_disks() if disk.path not in stays]
        for name in sorted({name for disk in gone for name in disk.names}):
            self._cache.observers(events.Forgotten(name, reason=f"disks at {path}, as an operator said"))
        self._hosts.forget_roots(after.roots)
        named_roots.forget(self._cache.layout, self._hosts.id, path)
        self._write(before, after)
        self._unsaved = None
        return len(gone)

    def _write(self, before: LastScan, after: LastScan) -> None:
        # Whatever is written has today's time: it must not vouch for what an older copy knows nothing of.
        named_roots.drop_unfounded(self._cache.layout, self._hosts.id)
        # A pass of another process may have seen more meanwhile.
        last_scan.save_last_scan(self._cache.layout, self._hosts.id, before, after)
