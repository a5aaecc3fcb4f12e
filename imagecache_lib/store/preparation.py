# SPDX-License-Identifier: Apache-2.0
"""Preparing a cache: its directories are made where they are missing, and its owner and version are checked.

An operator may remove the cache, or mount a filesystem over it, while a process uses it. So the process looks
before each use whether the cache is still the one that it prepared.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import stat

from imagecache_lib import errors
from imagecache_lib.store import layout
from imagecache_lib.system import durable, threads
from imagecache_lib.system.host import System

LOG = logging.getLogger(__name__)

#: A directory's time of change that is younger than this proves nothing: the coarsest filesystems count whole
#: seconds, FAT two.
_GRANULARITY = 2.0

_WRITE_VERSION = f"if no newer release uses the cache, put a file there in which is {layout.VERSION}"


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


class Preparation:
    """One cache, as this process prepared it. Safe to share between threads.

    Touches nothing before :meth:`ensure`.

    :param where: the paths of the cache.
    :param instances_path: absolute path of the directory that has to be there already, and says whose the
        cache is.
    :param host: the machine, for its monotonic clock.
    """

    def __init__(self, where: layout.Layout, instances_path: str, host: System) -> None:
        self._where = where
        self._instances_path = instances_path
        self._host = host
        self._prepared: _Prepared | None = None
        self._ensuring = threads.lock()

    def ensure(self) -> bool:
        """Make the directories that are missing and check those that are there, if need be.

        An operator may remove the cache, or mount a filesystem over it, while this process runs: then it is
        prepared once more. Returns True if it was prepared, the first time or again.

        :raises ConfigError: the instances directory is missing or read-only, belongs to another user, or the
            cache was written by a newer release.
        """
        if self.holds():
            return False
        with self._ensuring:
            if self.holds():
                return False
            if self._prepared is not None:
                LOG.warning("The cache %s is gone, or another one: preparing it anew", self._where.private)
            self._check_owner()
            self._make_directories()
            self._check_version()
            self._prepared = self._look_at_private()
            return True

    def holds(self) -> bool:
        """Whether the directories are there, and the cache is the one that :meth:`ensure` prepared."""
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
        looked = self._host.monotonic()
        try:
            found = os.stat(self._where.private)
        except OSError:
            return None  # preparing the cache says what is wrong with it
        return _Prepared((found.st_dev, found.st_ino), found.st_ctime_ns, looked)

    def _inner_directories(self) -> tuple[str, ...]:
        where = self._where
        return (where.records, where.stages, where.trash, where.hosts, where.pins)

    def _check_owner(self) -> None:
        instances = self._instances_path
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
        where = self._where
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
            found = durable.read_file(self._where.version)
        except OSError as error:
            raise errors.ConfigError(
                f"the cache's layout version cannot be read: {error.strerror}",
                path=self._where.version,
                next_step=(
                    _WRITE_VERSION
                    if error.errno == errno.ELOOP
                    else "make it readable for the service's user"
                ),
            ) from error
        if found is None and not _is_odd(self._where.version):
            durable.write_file(self._where.version, b"%d\n" % layout.VERSION)
            return
        if found is None or not layout.is_known_version(found):
            version = None if found is None else layout.stated_version(found)
            if version is None:
                raise errors.ConfigError(
                    "the file with the version of the cache's layout is damaged: it states no version",
                    path=self._where.version,
                    next_step=_WRITE_VERSION,
                )
            raise errors.ConfigError(
                f"the cache has layout version {version}, this release knows {layout.VERSION}",
                path=self._where.version,
                next_step="upgrade imagecache_lib on this host",
            )


def _is_odd(path: str) -> bool:
    """Whether something that is no regular file is at a path."""
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


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
