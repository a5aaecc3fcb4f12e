# SPDX-License-Identifier: Apache-2.0
"""Base images that were renamed away and are not yet proven unreferenced.

The rename takes the name, so that no new overlay can come to depend on the file: a spawn looks at the name
again before its disk appears. Only then are the references to it read once more. Nothing is lost until the
unlink, and a request that misses the base meanwhile links it back.

While a file lies here its name must stay free for it, or an overlay made from it would read another file's
bytes. So eviction and publication look out for each other, without locks. An evictor makes a directory here,
looks for stages that are complete, and renames the base into its directory. A publisher completes its stage,
removes the directories of its name, and links. The one that looks second sees the other: the evictor lets the
base be; the publisher takes the empty directory away, and with it the evictor's rename fails, or finds the
base in it and puts that back.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import logging
import os
import stat

from imagecache_lib import events
from imagecache_lib.store import evidence, layout, stage
from imagecache_lib.store.directory import CacheStore, OpenBase
from imagecache_lib.system import durable
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.maker import Maker
from imagecache_lib.system.trace import TracePoint

LOG = logging.getLogger(__name__)

_ID_LENGTH = 32

#: The file's name within its directory.
_FILE = "base"

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class TrashEntry:
    """One file in the trash.

    :param name: the base it was.
    :param directory: the directory that was made for it. A plain file of that name counts too.
    """

    name: str
    directory: str

    @property
    def id(self) -> str:
        """Its name in the trash."""
        return os.path.basename(self.directory)

    @property
    def path(self) -> str:
        """Where the file is."""
        inner = os.path.join(self.directory, _FILE)
        return self.directory if os.path.isfile(self.directory) else inner


def move_in(cache: CacheStore, name: str, *, mark: str = "") -> TrashEntry | None:
    """Rename a base into the trash.

    Returns its entry there, or None if the base is gone already or is just being published.

    :param mark: hex digits that the entry's id shall begin with.
    :raises OSError: as rename(2).
    """
    trash_id = (mark + durable.new_id())[:_ID_LENGTH]
    entry = TrashEntry(name, cache.layout.trashed(name, trash_id))
    maker = Maker()
    _write_intent(cache, entry)
    cache.host.trace(TracePoint.EVICT_ANNOUNCED)
    try:
        if not _is_being_published(cache, name):
            cache.host.trace(TracePoint.EVICT_RENAME)
            os.rename(cache.layout.base(name), entry.path)
            return entry
    except FileNotFoundError:
        pass
    except BaseException:
        if maker.is_here:
            _drop_intent(entry)
        raise
    _drop_intent(entry)
    return None


def _write_intent(cache: CacheStore, entry: TrashEntry) -> None:
    try:
        os.mkdir(entry.directory, layout.PRIVATE_DIR_MODE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # On a full filesystem nothing can be made, and eviction is what helps.
        try:
            # With the slash it can be nothing but a directory: a file there would be taken for a base.
            os.rename(_spare(cache) + "/", entry.directory)
        except (FileNotFoundError, NotADirectoryError):
            raise error from None


def _spare(cache: CacheStore) -> str:
    return os.path.join(cache.layout.private, "spare")


def _drop_intent(entry: TrashEntry) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(entry.directory)


def _is_being_published(cache: CacheStore, name: str) -> bool:
    return name in being_published(cache) or bool(stage.unreadable(cache))


def being_published(cache: CacheStore) -> set[str]:
    """Return the names of the bases whose publishers have a complete stage."""
    return {info.name for _stage_id, info in stage.iter_stages(cache) if info.record is not None}


def entries(cache: CacheStore, name: str | None = None) -> list[TrashEntry]:
    """Return the entries, empty ones too, of one base or of all.

    One not named ``<base>.<32 hex digits>`` is skipped: something else made it.
    """
    try:
        listed = os.listdir(cache.layout.trash)
    except FileNotFoundError:
        return []
    found = []
    for file_name in listed:
        base, _, trash_id = file_name.rpartition(".")
        known = layout.classify(base) is not layout.Kind.UNKNOWN and len(trash_id) == _ID_LENGTH
        if known and name in (None, base):
            found.append(TrashEntry(base, os.path.join(cache.layout.trash, file_name)))
    return found


def find(cache: CacheStore, name: str | None = None) -> list[TrashEntry]:
    """Return the files that lie in the trash: those of one base, or all of them.

    :raises OSError: the entry of the base that is asked for cannot be looked at: its name must stay free for
        it. Among all, such an entry is left out, and stays.
    """
    found = []
    for entry in entries(cache, name):
        try:
            if _is_regular(entry.path):
                found.append(entry)
        except OSError as error:
            if name is not None:
                raise
            LOG.warning("%s cannot be looked at (%s), and stays. Check the filesystem.", entry.path, error)
    return found


def _is_regular(path: str) -> bool:
    """Whether a path is a file. Nothing else was ever moved in, and nothing else may get a base's name."""
    try:
        return stat.S_ISREG(os.stat(path, follow_symlinks=False).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def open_entry(entry: TrashEntry) -> OpenBase | None:
    """Open a file in the trash for reading. Returns None if it is gone.

    :raises OSError: as open(2).
    """
    try:
        file = Descriptor(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        return OpenBase(entry.name, entry.path, file, os.fstat(file.fd))
    except BaseException:
        file.close()
        raise


def cancel_evictions(cache: CacheStore, name: str) -> None:
    """Stop every eviction of a base that is under way, and put back what was renamed already.

    To be called by a publisher whose stage is complete: no eviction of the name begins until that is gone.

    :raises OSError: the base cannot be put back.
    """
    for entry in entries(cache, name):
        try:
            os.rmdir(entry.directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if restore(cache, entry):
                cache.observers(events.Restored(name, reason="another copy of it was about to be published"))


def restore(cache: CacheStore, entry: TrashEntry) -> bool:
    """Give a file its name back. Returns False if another file has the name, or if the file is gone.

    The trash's own name goes afterwards; a crash in between leaves one file with two names, which
    :func:`is_restored` tells.

    :raises OSError: as link(2).
    """
    base = cache.layout.base(entry.name)
    if not _is_regular(entry.path):
        return False
    try:
        os.link(entry.path, base, follow_symlinks=False)
    except FileExistsError:
        if not is_restored(cache, entry):
            return False
    except FileNotFoundError:
        return False
    except PermissionError:
        # fs.protected_hardlinks (the kernel's sysctl/fs.rst) forbids a link to a file of another user, and
        # libvirt gave the base to QEMU's. A rename is still allowed.
        if not _rename_back(entry.path, base):
            return False
    durable.sync_directory(cache.layout.base_path)
    cache.host.trace(TracePoint.RESTORE_LINKED)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(entry.path)
    _drop_intent(entry)
    return True


def _rename_back(path: str, base: str) -> bool:
    failed = _libc.renameat2(
        _AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(base), ctypes.c_uint(_RENAME_NOREPLACE)
    )
    code = ctypes.get_errno() if failed else 0
    if code in (errno.EEXIST, errno.ENOENT):
        return False
    if code in (errno.EINVAL, errno.ENOSYS):
        # NFS and gluster cannot. Publishers leave the name alone while the file is here.
        if os.path.lexists(base):
            return False
        try:
            os.rename(path, base)
        except FileNotFoundError:
            return False  # another process put it back
    elif code:
        raise OSError(code, os.strerror(code), path)
    return True


def is_restored(cache: CacheStore, entry: TrashEntry) -> bool:
    """Whether the file has its base name back, beside the one here.

    A network filesystem's client may still find the base's name for a second after another host renamed it
    into the trash; that file has one name only.
    """
    try:
        found = os.stat(entry.path)
        return found.st_nlink > 1 and os.path.samestat(found, os.stat(cache.layout.base(entry.name)))
    except FileNotFoundError:
        return False


def unlink(cache: CacheStore, entry: TrashEntry) -> None:
    """Remove a file for good, its record, checksums and hashes unless the name has a base again.

    :raises OSError: the file is still there. What lies beside a base and cannot be removed with it is left to
        a later start or pass.
    """
    found = os.stat(entry.path, follow_symlinks=False)
    carried, path = _id_of(entry), entry.path
    os.unlink(path)
    # A power cut that brought the file back beside another base of that name would keep it here for as long
    # as disks need that one.
    with contextlib.suppress(OSError):
        durable.sync_directory(os.path.dirname(path))
    cache.host.trace(TracePoint.EVICT_UNLINKED)
    _drop_intent(entry)
    try:
        _unlink_beside(cache, entry, found, carried)
    except OSError as error:
        LOG.warning("What lies beside the evicted base image %s stays for now: %s", entry.name, error)


def _unlink_beside(cache: CacheStore, entry: TrashEntry, found: os.stat_result, carried: str | None) -> None:
    """Remove record, checksums and hashes of a base that is gone.

    :param found: of its file.
    :param carried: as :func:`_id_of` returned it.
    """
    record = cache.layout.record(entry.name)
    data = durable.read_file(record)
    described = evidence.parse(data) if data is not None else None
    # A base that was published since may have got the inode that became free.
    is_its = described is None or (
        described.inode == found.st_ino and carried in (None, "", described.base_id)
    )
    if is_its and not os.path.lexists(cache.layout.base(entry.name)):
        for path in (record, cache.layout.sums(entry.name), cache.layout.pieces(entry.name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _id_of(entry: TrashEntry) -> str | None:
    """Return the random id that a file carries, or None if that cannot be told."""
    with contextlib.suppress(OSError):
        return os.getxattr(entry.path, layout.ID_ATTRIBUTE, follow_symlinks=False).decode("ascii", "replace")
    return None


def sweep(cache: CacheStore, *, now: float) -> None:
    """Remove the empty directories of evictors that died before their rename. An evictor that lives gives up.

    A directory is kept in reserve, for the day on which the filesystem is full.
    """
    for entry in entries(cache):
        with contextlib.suppress(OSError):
            if now - os.stat(entry.directory).st_mtime >= cache.config.stage_idle_seconds:
                os.rmdir(entry.directory)
    with contextlib.suppress(OSError):
        os.mkdir(_spare(cache), layout.PRIVATE_DIR_MODE)
