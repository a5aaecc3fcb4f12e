# SPDX-License-Identifier: Apache-2.0
"""The cache directory as it lies on disk: opening a base, believing its record, noting its use.

:mod:`imagecache_lib.store.layout` says what the names mean. Nothing here fetches, decides or evicts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import stat
import threading

from imagecache_lib import errors, events
from imagecache_lib.config import CacheConfig
from imagecache_lib.store import evidence, layout, membership, pieces
from imagecache_lib.store.named_roots import NamedRoots
from imagecache_lib.system import attributes, durable, names
from imagecache_lib.system.bounded import Bounded
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.host import System
from imagecache_lib.system.translate import translated

LOG = logging.getLogger(__name__)

#: Letters of an image's name that are kept: as many as Glance allows.
_LONGEST_NAME = 255

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


#: A directory's time of change that is younger than this proves nothing: the coarsest filesystems count whole
#: seconds, FAT two.
_GRANULARITY = 2.0

#: How many parsed records are kept.
_RECORDS = 2048


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """The cache's own directory, when those within it were looked at.

    :param changed: its ``st_ctime_ns``.
    :param looked: when that time of change was first seen, in seconds of the monotonic clock.
    :param is_settled: those within were looked at so long after that that a later change has another time.
    """

    identity: tuple[int, int]
    changed: int
    looked: float
    is_settled: bool = False


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
        if self.cache is None or not self.cache.may_be_stale(self.fd):
            return False
        directory, name = os.path.split(self.path)
        known = os.path.basename(self.cache.layout.private)
        return not names.is_listed(directory, name, self.stat.st_ino, known=known)

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
        self._prepared: _Prepared | None = None
        self._starting = threading.Lock()
        self._named_roots = NamedRoots(config.roots, host, usual=not config.disk_roots)
        # Records are read for each spawn, and few differ.
        self._parse = functools.lru_cache(_RECORDS)(evidence.parse)

    def start(self) -> bool:
        """Make the directories that are missing and check those that are there, if need be.

        An operator may remove the cache, or mount a filesystem over it, while this process runs: then it is
        prepared once more. Returns True if it was prepared, the first time or again.

        :raises ConfigError: the instances directory is missing or read-only, belongs to another user, or the
            cache was written by a newer release.
        """
        if self.is_prepared():
            return False
        with self._starting:
            if self.is_prepared():
                return False
            if self._prepared is not None:
                LOG.warning("The cache %s is gone, or another one: preparing it anew", self.layout.private)
            self._check_owner()
            self._make_directories()
            self._check_version()
            self._prepared = self._look_at_private()
            return True

    def is_prepared(self) -> bool:
        """Whether the cache's directories are there, and the cache is the one that :meth:`start` prepared."""
        before, now = self._prepared, self._look_at_private()
        if before is None or now is None or now.identity != before.identity:
            return False
        if now.changed == before.changed and before.is_settled:
            return True  # no name in it was made or removed since those were looked at
        if any(_identity(path) is None for path in self._inner_directories()):
            return False
        if now.changed == before.changed:
            now = dataclasses.replace(before, is_settled=now.looked - before.looked > _GRANULARITY)
        self._prepared = now
        return True

    def _look_at_private(self) -> _Prepared | None:
        looked = self.host.monotonic()
        try:
            found = os.stat(self.layout.private)
        except OSError:
            return None  # preparing the cache says what is wrong with it
        return _Prepared((found.st_dev, found.st_ino), found.st_ctime_ns, looked)

    def _inner_directories(self) -> tuple[str, ...]:
        where = self.layout
        return (where.records, where.stages, where.trash, where.hosts, where.pins)

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

    def note_roots(self) -> None:
        """Have the disk roots written down that this process names, before a disk there needs a base.

        :raises OSError: they cannot be written.
        """
        try:
            self._named_roots.note(self.layout, self.host_id)
        except FileNotFoundError:
            self.start()  # the cache was removed meanwhile
            self._named_roots.note(self.layout, self.host_id)

    def may_be_stale(self, fd: int) -> bool:
        """Whether this host's kernel may still find a name in the cache that another host has taken away.

        :param fd: of a base image.
        :raises OSError: the hosts cannot be listed.
        """
        told = self.host.stale_names
        if not (names.may_be_stale(fd) if told is None else told):
            return False
        return sum(entry.endswith(".json") for entry in os.listdir(self.layout.hosts)) > 1

    def exists(self) -> bool:
        """Whether there is a cache yet."""
        return os.path.isdir(self.layout.base_path)

    def _check_owner(self) -> None:
        instances = self.config.instances_path
        try:
            owner = os.stat(instances).st_uid
        except FileNotFoundError:
            raise errors.ConfigError(
                "the instances directory does not exist",
                path=instances,
                next_step="create or mount it, owned by the service's user",
            ) from None
        except OSError as error:
            raise errors.ConfigError(
                f"the instances directory cannot be looked at: {error.strerror}",
                path=instances,
                next_step="let the service's user enter every directory above it",
            ) from error
        if os.geteuid() == 0 and owner != 0:
            # Files made by root here would lock the service out of its own cache.
            raise errors.ConfigError(
                f"the instances directory belongs to uid {owner}, and this is root",
                path=instances,
                next_step=f"run as that user, for example with: runuser -u '#{owner}' --",
            )

    def _make_directories(self) -> None:
        where = self.layout
        try:
            durable.make_directories(os.path.dirname(where.locks_path), layout.LOCKS_DIR_MODE)
            _make_directory(where.locks_path, layout.LOCKS_DIR_MODE)
            _make_directory(where.base_path, layout.BASE_DIR_MODE)
            for path in (where.private, *self._inner_directories()):
                _make_directory(path, layout.PRIVATE_DIR_MODE)
        except OSError as error:
            raise errors.ConfigError(
                f"the cache's directories cannot be made: {error.strerror}",
                path=error.filename or where.base_path,
                next_step=_step(error.errno),
            ) from error
        if not os.access(where.private, os.W_OK | os.X_OK):
            raise errors.ConfigError(
                "the cache directory is not writable",
                path=where.private,
                next_step=_step(errno.EROFS if _is_mounted_read_only(where.private) else errno.EACCES),
            )

    def _check_version(self) -> None:
        try:
            found = durable.read_file(self.layout.version)
        except OSError as error:
            raise errors.ConfigError(
                f"the cache's layout version cannot be read: {error.strerror}",
                path=self.layout.version,
                next_step="make it readable for the service's user",
            ) from error
        if found is None:
            durable.write_file(self.layout.version, b"%d\n" % layout.VERSION)
            return
        if not layout.is_known_version(found):
            version = layout.stated_version(found)
            if version is None:
                raise errors.ConfigError(
                    "the file with the version of the cache's layout is damaged: it states no version",
                    path=self.layout.version,
                    next_step=f"if no newer release uses the cache, write {layout.VERSION} into it",
                )
            raise errors.ConfigError(
                f"the cache has layout version {version}, this release knows {layout.VERSION}",
                path=self.layout.version,
                next_step="upgrade imagecache_lib on this host",
            )

    # -- bases ---------------------------------------------------------------------------------------

    def open_base(self, name: str) -> OpenBase | None:
        """Open a base image for reading. Returns None if there is none of that name.

        :raises CacheEntryError: something that is no regular file has its name.
        """
        path = self.layout.base(name)
        try:
            file = Descriptor(path, _READ)
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
        try:
            found = os.fstat(file.fd)
        except BaseException:
            file.close()
            raise
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
        carried = read_id(base.fd)
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


def read_id(fd: int) -> str | None:
    """Return the random id that a base file carries; an empty one if it carries none.

    Returns None if the filesystem has no extended attributes.
    """
    try:
        return os.getxattr(fd, layout.ID_ATTRIBUTE).decode("ascii", "replace")
    except OSError as error:
        if error.errno == errno.ENODATA:
            return ""
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
            return None
        raise


def write_id(fd: int, base_id: str) -> bool:
    """Give a file its random id.

    Returns False if the filesystem has no extended attributes or is read-only, or if this process may not
    change the file.
    """
    try:
        os.setxattr(fd, layout.ID_ATTRIBUTE, base_id.encode())
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EROFS):
            return False
        raise
    return True


def read_name(fd: int) -> str | None:
    """Return the name that the image service had for a base file's image, or None if the file carries
    none."""
    with contextlib.suppress(OSError):
        return attributes.read(fd, layout.NAME_ATTRIBUTE) or None
    return None


def write_name(fd: int, name: object) -> None:
    """Let a base file carry the image service's name of its image, as far as there is one and that is
    possible.

    :param name: as the image service says it: nothing about it is trusted.
    """
    if not isinstance(name, str):
        return
    shown = "".join(each if each.isprintable() else "\ufffd" for each in name[:_LONGEST_NAME]).strip()
    if shown:
        with contextlib.suppress(OSError, UnicodeEncodeError):  # it is for people, and fails no fetch
            attributes.write(fd, layout.NAME_ATTRIBUTE, shown)


def mark(fd: int) -> str:
    """Make a base file carry a random id, if it carries none, and return the id that it carries.

    Returns an empty id if it carries none all the same: this process cannot mark a file that libvirt gave to
    QEMU's user, nor any file on a filesystem without extended attributes. Inode and size have to bind its
    record then.
    """
    carried = read_id(fd)
    if carried == "" and write_id(fd, fresh := durable.new_id()):
        return fresh
    return carried or ""


def _identity(path: str) -> tuple[int, int] | None:
    """Return ``(st_dev, st_ino)`` of a directory, or None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None  # preparing the cache says what is wrong with it
    return found.st_dev, found.st_ino


def _make_directory(path: str, mode: int) -> None:
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    os.chmod(path, mode)  # mkdir() let the umask take bits away


def _is_mounted_read_only(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _step(number: int | None) -> str:
    """Return what to do about an error of the kernel that keeps the cache from being written."""
    if number == errno.EROFS:
        return "mount it for writing; dmesg tells whether the kernel made it read-only"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "make room"
    return "run as the service's user, or make it writable for this one"


def _odd_entry(path: str, what: str) -> errors.CacheEntryError:
    return errors.CacheEntryError(
        f"the cache entry is {what}, not a base image",
        path=path,
        next_step="find out who put it there and move it away; this library does not touch it",
    )
