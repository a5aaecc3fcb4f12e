# SPDX-License-Identifier: Apache-2.0
"""The cache directory as it lies on disk: opening a base, believing its record, noting its use.

:mod:`imagecache_lib.store.layout` says what the names mean, :mod:`imagecache_lib.store.preparation` makes the
directories. Nothing here fetches, decides or evicts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import stat

from imagecache_lib import errors, events
from imagecache_lib.config import CacheConfig
from imagecache_lib.store import base_attributes, disk_roots, evidence, layout, membership, pieces
from imagecache_lib.store.named_roots import NamedRoots
from imagecache_lib.store.preparation import Preparation
from imagecache_lib.store.seen import Identity
from imagecache_lib.system import durable, names
from imagecache_lib.system.bounded import Bounded
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.host import System
from imagecache_lib.system.translate import translated

LOG = logging.getLogger(__name__)

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

#: How many parsed records are kept.
_RECORDS = 2048


@dataclasses.dataclass(frozen=True)
class OpenBase:
    """A base file that is open: while it is, no other file can get its inode number.

    :param name: its name in the cache.
    :param path: its absolute path.
    :param file: open for reading. It is closed, and a lease on it ends, with the last reference to this.
    :param stat: of the descriptor.
    :param cache: the cache in which it has its name, or None for a file in the trash.
    """

    name: str
    path: str
    file: Descriptor
    stat: os.stat_result
    cache: CacheStore | None = None

    @property
    def fd(self) -> int:
        """The descriptor's number, or -1 once it is closed."""
        return self.file.fd

    def is_current(self) -> bool:
        """Return whether the name still means this very file, also where another host may have taken it.

        An evictor asks which hosts share the cache after it has taken the name away. This host is a member
        before it looks at the name: so a host that evicts the base later waits for this one.

        Where several hosts share the cache on a filesystem whose client may remember names, the server is
        asked.

        :raises OSError: this host was forgotten while it lives, and cannot register again; or the cache
            cannot be listed.
        """
        if self.cache is not None:
            self.cache.ensure_member()
        try:
            now = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if (now.st_dev, now.st_ino) != (self.stat.st_dev, self.stat.st_ino):
            return False
        return not self.is_only_remembered()

    def is_only_remembered(self) -> bool:
        """Return whether another host has taken the name, and only this host's kernel still finds it.

        :raises OSError: the cache cannot be listed.
        """
        if self.cache is None or not self._may_be_stale or not self.cache.is_shared():
            return False
        directory, name = os.path.split(self.path)
        known = os.path.basename(self.cache.layout.private)
        return not names.is_listed(directory, name, self.stat.st_ino, known=known)

    @functools.cached_property
    def _may_be_stale(self) -> bool:
        """Whether this host's kernel may still find a name that another host has taken away."""
        told = None if self.cache is None else self.cache.host.stale_names
        return names.may_be_stale(self.fd) if told is None else told

    def close(self) -> None:
        self.file.close()


class CacheStore:
    """The directories of one cache on one host, and what everything that works on them needs to know.

    Touches nothing before :meth:`start`.

    :ivar config: how to cache.
    :ivar host: the machine.
    :ivar observers: told what happens.
    :ivar layout: where everything lies.
    :ivar elsewhere: makes looks at directories outside of the cache, whose server may be gone.
    """

    def __init__(self, config: CacheConfig, host: System, observers: events.Observers | None = None) -> None:
        self.config = config
        self.host = host
        self.observers = observers or events.Observers(())
        self.layout = layout.Layout(config.base_path, config.locks_path)
        self.elsewhere = Bounded()
        self._preparation = Preparation(self.layout, config.instances_path, host)
        self._named_roots = NamedRoots(config.roots, host, usual=not config.disk_roots)
        # Records are read for each spawn, and few differ.
        self._parse = functools.lru_cache(_RECORDS)(evidence.parse)

    def start(self) -> bool:
        """Make the directories that are missing and check those that are there, if need be.

        Returns True if the cache was prepared, the first time or again since it was removed meanwhile.

        :raises ConfigError: the instances directory is missing or read-only, belongs to another user, or the
            cache was written by a newer release.
        """
        return self._preparation.ensure()

    def is_prepared(self) -> bool:
        """Whether the cache's directories are there, and the cache is the one that :meth:`start` prepared."""
        return self._preparation.holds()

    @functools.cached_property
    def host_id(self) -> str:
        """The id of this host among those who share the cache."""
        return membership.host_id(self.host.name)

    def ensure_member(self) -> None:
        """Be registered, should an operator have forgotten this host while it lives.

        :raises OSError: this host cannot be registered.
        """
        try:
            membership.ensure(self.layout, self.host_id, self.host.name)
        except FileNotFoundError:
            self.start()  # the cache was removed meanwhile
            membership.ensure(self.layout, self.host_id, self.host.name)

    def note_roots(self, target: str | None = None, *, anywhere: bool = False) -> None:
        """Have the disk roots written down that this process names, before a disk there needs a base.

        Which directory the disk root is, is written down as well.

        :param target: absolute path of the disk, in an existing directory, or None if there is none that
            needs a base, or it is unknown where.
        :param anywhere: the disk may be below any disk root.
        :raises OSError: they cannot be written.
        """
        above = () if target is None else disk_roots.named_above(target, self.config)
        looked, volumes = self._look(target, above)
        if not above and (anywhere or target is not None):
            # A look at a disk root that is not above the disk takes for ever if its server is gone.
            answers = self.elsewhere.call(lambda: self._look(target, self._above(target)))
            looked, volumes = answers[0] if answers else ({}, {})
        try:
            self._named_roots.note(self.layout, self.host_id, looked, volumes)
        except FileNotFoundError:
            self.start()  # the cache was removed meanwhile
            self._named_roots.note(self.layout, self.host_id, looked, volumes)

    def _look(
        self, target: str | None, roots: tuple[str, ...]
    ) -> tuple[dict[str, Identity], dict[str, Identity]]:
        """Return which directories disk roots are, and what is mounted between them and a disk."""
        looked = self._named_roots.look(roots)
        if target is None or not roots:
            return looked, {}
        return looked, self._named_roots.look_at_volume(os.path.dirname(target), roots)

    def _above(self, target: str | None) -> tuple[str, ...]:
        return self.config.roots if target is None else disk_roots.above(target, self.config)

    def is_shared(self) -> bool:
        """Whether other hosts are members of the cache.

        :raises OSError: the hosts cannot be listed.
        """
        return sum(entry.endswith(".json") for entry in os.listdir(self.layout.hosts)) > 1

    def exists(self) -> bool:
        """Whether there is a cache yet."""
        return os.path.isdir(self.layout.base_path)

    # -- bases ---------------------------------------------------------------------------------------

    def open_base(self, name: str) -> OpenBase | None:
        """Open a base image for reading. Returns None if there is none of that name.

        :raises CacheEntryError: it cannot be opened, or something that is no regular file has its name.
        """
        path = self.layout.base(name)
        try:
            file = Descriptor(path, _READ)
            found = os.fstat(file.fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _odd_entry(path, "a symbolic link") from error
            raise errors.CacheEntryError(
                f"the base image cannot be opened: {error.strerror}",
                path=path,
                next_step="check its owner and mode",
            ) from error
        if not stat.S_ISREG(found.st_mode):
            file.close()
            raise _odd_entry(path, "a directory" if stat.S_ISDIR(found.st_mode) else "no regular file")
        return OpenBase(name, path, file, found, self)

    def record_of(self, base: OpenBase) -> evidence.Record | None:
        """Return the evidence that was written for this very file, or None if there is none.

        On a filesystem without extended attributes, inode and size have to do; evidence bound so weakly
        says that the base was checked, and no longer who vouched for it.
        """
        record = self.read_record(base.name)
        if record is None or (record.inode, record.size) != (base.stat.st_ino, base.stat.st_size):
            return None
        carried = base_attributes.read_id(base.fd)
        if carried is None:
            adopted = evidence.Origin.ADOPTED
            return dataclasses.replace(record, origin=adopted, certificates=(), signed_by=None)
        return record if carried == record.base_id else None

    def evidence_of(self, name: str) -> evidence.Record | None:
        """Return the evidence of the base of that name, as :meth:`record_of`, or None if there is none.

        :raises CacheEntryError: something that is no regular file has its name.
        :raises BackendError: it cannot be read.
        """
        opened = self.open_base(name)
        if opened is None:
            return None
        with contextlib.closing(opened), translated(opened.path):
            return self.record_of(opened)

    def read_record(self, name: str) -> evidence.Record | None:
        """Return the record of that name, whichever file it was written for, or None if none can be read."""
        try:
            data = durable.read_file(self.layout.record(name))
        except OSError as error:
            LOG.warning("The record of base image %s cannot be read: %s", self.layout.base(name), error)
            return None
        return self._parse(data) if data is not None else None

    def write_record(self, record: evidence.Record) -> None:
        """Put a record in its place, durably."""
        durable.write_file(self.layout.record(record.name), record.to_json())

    def pieces_of(self, record: evidence.Record) -> pieces.Pieces | None:
        """Return the hashes of the pieces of a base's source, or None if there are none of this very base."""
        if record.digest is None or not record.digest_checked:
            return None
        try:
            data = durable.read_file(self.layout.pieces(record.name), limit=pieces.LIMIT)
        except OSError as error:
            LOG.debug("The hashes of %s cannot be read: %s", self.layout.base(record.name), error)
            return None
        found = pieces.parse(data, record.base_id) if data is not None else None
        return found if found is not None and found.digest == record.digest else None

    def touch(self, base: OpenBase) -> None:
        """Note that the base is used now.

        The base's own mtime is what Nova looks at; where it may not be changed, since libvirt gave the file
        to QEMU's user or the server forbids it, our record's mtime says the same.
        """
        try:
            os.utime(base.fd)
        except OSError:
            try:
                os.utime(self.layout.record(base.name))
            except OSError as error:
                LOG.debug("The use of base image %s could not be noted: %s", base.path, error)

    def filesystem_now(self) -> float:
        """Return the time in epoch seconds by the filesystem's own clock, on shared storage the server's.

        Nothing is made to learn it: on a full filesystem that may fail, and eviction is what helps then.
        """
        os.utime(self.layout.private)  # the cache's own directory: no other program looks at its time
        return os.stat(self.layout.private).st_mtime


def _odd_entry(path: str, what: str) -> errors.CacheEntryError:
    return errors.CacheEntryError(
        f"the cache entry is {what}, not a base image",
        path=path,
        next_step="find out who put it there and move it away; this library does not touch it",
    )
