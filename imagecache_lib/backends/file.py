# SPDX-License-Identifier: Apache-2.0
"""What the backends have in common whose disks are files: names, placement, copying, growing."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Self

from imagecache_lib import dates, errors, model
from imagecache_lib.backends import interface
from imagecache_lib.backends.chain import HEADER_BYTES, ChainReader
from imagecache_lib.backends.interface import Feature, PendingDisk, StorageBackend
from imagecache_lib.config import CacheConfig
from imagecache_lib.formats import qemu_img
from imagecache_lib.formats.qcow2 import header as qcow2_header
from imagecache_lib.formats.qcow2.cut_off import end_of_tables
from imagecache_lib.formats.qcow2.header import Header, HeaderError, Incompatible, NotQcow2
from imagecache_lib.formats.qemu_img import DiskFile
from imagecache_lib.nova import disk_info
from imagecache_lib.nova.disk_info import FORMAT_MARK
from imagecache_lib.store import disk_roots, layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import atomic_file, attributes, names, sparse
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.host import System
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

LOG = logging.getLogger(__name__)

#: Extended attribute of a disk whose content was not synced before it got its name: the boot id of the host
#: that made it, and when it was made, in epoch seconds of its filesystem.
UNSYNCED_MARK = "user.imagecache.unsynced"

#: A disk that was written to so many seconds after it was made has had its first content on the disk long
#: since: Linux writes back what is older than 30 seconds (vm.dirty_expire_centisecs).
_WRITTEN_BACK = 3600

_COPY_AGAIN = "copy it again from where it came, or remove it, and ask again"


class FileBackend(StorageBackend):
    """Disks that are files on the host. Targets are absolute paths in existing directories.

    :param grow_filesystem: called with the path of each raw disk that has just grown, in which a filesystem
        may lie without any partition, to grow that filesystem. A new disk does not have its name yet then.
        With None a filesystem stays as large as it was.
    """

    def __init__(
        self, config: CacheConfig, host: System, *, grow_filesystem: Callable[[str], None] | None = None
    ) -> None:
        self._config = config
        self._host = host
        self._grow_filesystem = grow_filesystem
        self._formats = disk_info.DiskInfo(config, host)
        self._waiter: Waiter | None = None
        self._qemu_img = qemu_img.QemuImg(config, host)
        self._chains = ChainReader(CacheStore(config, host))

    @classmethod
    def from_config(cls, config: CacheConfig, host: System) -> Self:
        return cls(config, host)

    def for_caller(self, waiter: Waiter) -> Self:
        bound = copy.copy(self)
        bound._waiter = waiter
        bound._formats = self._formats.for_caller(waiter)
        bound._qemu_img = self._qemu_img.for_caller(waiter)
        return bound

    # -- targets -------------------------------------------------------------------------------------

    def check_target(self, target: str) -> None:
        atomic_file.check_target(target)
        if Feature.OVERLAY in self.features:
            disk_roots.check_seen(target, self._config)
        if Feature.OVERLAY not in self.features or os.path.lexists(target):
            self._check_no_base(target)

    def _check_no_base(self, target: str) -> None:
        """Refuse to change a file of the cache, which disks were made from or are yet to be.

        :raises BackendError: it is one.
        """
        names.require_path(target)
        with translated(self._config.base_path):
            disk_roots.check_no_base(target, self._config)

    def exists(self, target: str) -> bool:
        return os.path.lexists(target)

    # -- making --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def prepare_standalone(
        self, base: model.BaseImage, target: str, size: int | None
    ) -> Iterator[PendingDisk]:
        wanted = base.virtual_size if size is None else size
        if base.format != "raw":
            wanted = interface.whole_sectors(wanted)
        assert base.fd is not None  # a held base is open
        notes = disk_roots.notes_for(target, self._config)
        with atomic_file.unfinished(target, self._host, notes=notes) as file:
            with translated(target):
                atomic_file.copy_content(base.fd, file.fd, self._waiter)
                if base.format == "raw":
                    self._grow_raw(file.fd, wanted, target)
                    if wanted > base.virtual_size:
                        self._let_filesystem_grow(file.path)
                elif wanted > base.virtual_size:
                    self._qemu_img.resize(DiskFile(file.path, base.format), wanted)
            # An empty swap area or filesystem is a few blocks, and no check could tell that they were lost.
            optional = layout.classify(base.name) in (layout.Kind.ORIGINAL, layout.Kind.RESIZED)
            sync = self._config.sync_copied_disks or not optional
            yield self._sealed(file, model.Disk(target, base.format, wanted), sync=sync)

    def _sealed(
        self,
        file: atomic_file.UnfinishedFile,
        disk: model.Disk,
        *,
        sync: bool = True,
        draft: disk_info.Draft | None = None,
    ) -> PendingDisk:
        """Mark a complete disk with its format and make it durable, so that it can get its name.

        :param draft: what will most likely pin its format, if that is written already.
        :param sync: False leaves writing the content to the kernel, if the file can be marked as such.
        """
        with translated(disk.target):
            attributes.write(file.fd, FORMAT_MARK, disk.format)
            sync = sync or not _mark_unsynced(file.fd, self._host)
        file.seal(sync=sync)
        return _PendingFile(file, disk, self._formats, draft)

    def _grow_raw(self, fd: int, size: int, target: str) -> None:
        before = os.fstat(fd).st_size
        try:
            self._preallocate(fd, size, target)
        except OSError:
            os.ftruncate(fd, before)  # gives back what was allocated behind the end
            raise
        if size > before:
            os.ftruncate(fd, size)

    def _preallocate(self, fd: int, size: int, target: str) -> None:
        """Allocate the whole size of a disk if that is configured, and say so where it is not possible.

        :param target: the disk, for the message.
        :raises OSError: there is no room.
        """
        if self._config.preallocate_images == "space" and not atomic_file.allocate(fd, size):
            LOG.warning(
                "The space of %s is not allocated ahead, which preallocate_images asks for: its filesystem"
                " cannot do that. The guest may find it full.",
                target,
            )

    def _let_filesystem_grow(self, path: str) -> None:
        if self._grow_filesystem is None:
            return
        try:
            self._grow_filesystem(path)
        except errors.ImageCacheError:
            raise
        except Exception as error:  # whatever the driver's function raises
            raise errors.BackendError(
                f"the filesystem in it could not be grown: {error}", path=path, next_step="check the image"
            ) from error

    # -- disks that exist ----------------------------------------------------------------------------

    def inspect(self, target: str) -> model.Disk:
        return self._read(target)[0]

    def _read(self, target: str) -> tuple[model.Disk, Header | None]:
        """Return what a disk is, and its header if it is qcow2."""
        with translated(target), _open_disk(target) as fd:
            size = os.fstat(fd).st_size
            data = os.pread(fd, HEADER_BYTES, 0)
            marked = attributes.read(fd, FORMAT_MARK)
        # The file's own mark cannot be lost apart from it, nor be another disk's.
        format = marked or self._format(target, data)
        if format == "raw":
            return model.Disk(target, "raw", size), None
        if format != "qcow2":
            return model.Disk(target, format, self._qemu_img.virtual_size(DiskFile(target, format))), None
        try:
            header = qcow2_header.parse(data)
        except (HeaderError, NotQcow2) as error:
            raise errors.BackendError(f"the disk is no qcow2: {error}", path=target) from error
        if header.incompatible_features & Incompatible.DATA_FILE:
            # Nothing here makes such disks, and QEMU would open and write whatever file the header names.
            raise errors.BackendError(
                "its header says that its data is in another file",
                path=target,
                next_step="find out where the disk came from; convert it if it is trusted",
            )
        return model.Disk(target, "qcow2", header.virtual_size, self._base_of(target, header)), header

    def _base_of(self, target: str, header: Header) -> str | None:
        """Return the name of the base that a disk needs, as far as its header is one to believe."""
        found = layout.NAME_PATTERN.search(os.path.basename(header.backing_file or b""))
        if found is not None:
            return found.group().decode()
        try:
            return self._chains.read(target, header).base
        except errors.ImageCacheError:
            return None  # a call that needs the base reads the chain itself, and raises

    def _chain(self, target: str, format: str, header: Header | None) -> DiskFile:
        """Return a disk as qemu-img is to open it, with the base under it."""
        return DiskFile(target, format) if header is None else self._chains.stated(target, header)

    def _format(self, target: str, data: bytes) -> str:
        looks_like_qcow2 = data.startswith(qcow2_header.MAGIC)
        try:
            pinned = self._formats.format_of(target)
        except disk_info.Damaged:
            # Raw is the one reading that hands no other file to the guest. What looks like qcow2 could be
            # either, and a guest that wrote the header itself must not be believed.
            if looks_like_qcow2:
                raise
            return "raw"
        # Where no record pins the format, the header decides: disks from before such records are found too.
        return pinned or ("qcow2" if looks_like_qcow2 else "raw")

    def ensure_durable(self, target: str) -> bool:
        # Its name may be durable where the file that pins its format is not. The disk itself is marked.
        self._formats.complete(target)
        with translated(target), _open_disk(target) as fd:
            mark = attributes.read(fd, UNSYNCED_MARK)
            if mark is None:
                return True
            boot, _, made = mark.partition(" ")
            if boot == self._host.boot_id:
                os.fsync(fd)
                attributes.remove(fd, UNSYNCED_MARK)
                return True
            return made.isdecimal() and os.fstat(fd).st_mtime - int(made) >= _WRITTEN_BACK

    def check_content(self, target: str, base: str | None) -> None:
        disk, header = self._read(target)
        with translated(target), _open_disk(target) as fd:
            if header is not None:
                _check_tables(fd, header, target)
            is_empty = disk.format == "raw" and not _has_data(fd)
        if not is_empty or base is None:
            return
        with contextlib.suppress(OSError), Descriptor(base, os.O_RDONLY | os.O_NOFOLLOW) as fd:
            if _has_data(fd):
                raise errors.BackendError(
                    "there is nothing in the disk, and there is in its image: a copy or a crash lost its"
                    " content, or its guest discarded all of it",
                    path=target,
                    next_step=_COPY_AGAIN,
                )

    def resize(self, disk: model.Disk, size: int) -> model.Disk:
        self._check_no_base(disk.target)
        current, header = self._read(disk.target)
        if current.format != "raw":
            size = interface.whole_sectors(size)
        if size < current.virtual_size:
            now, wanted = dates.sizes(current.virtual_size, size)
            raise errors.DiskTooSmallError(
                f"the disk has {now} and is never shrunk to {wanted}",
                path=disk.target,
                next_step="ask for at least its size",
                size=size,
                virtual_size=current.virtual_size,
            )
        if size > current.virtual_size:
            if current.format == "raw":
                with translated(disk.target), _open_disk(disk.target, os.O_RDWR) as fd:
                    self._grow_raw(fd, size, disk.target)
                self._let_filesystem_grow(disk.target)
            else:
                self._qemu_img.resize(self._chain(disk.target, current.format, header), size)
        return model.Disk(disk.target, current.format, max(size, current.virtual_size), current.base)

    def remove(self, disk: model.Disk) -> None:
        names.require_path(disk.target)
        disk_roots.check_not_in_cache(disk.target, self._config)
        with translated(disk.target):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(disk.target)
            if os.path.isdir(os.path.dirname(disk.target)):
                self._formats.forget(disk.target)

    def preflight(self) -> list[str]:
        if self._config.preallocate_images != "space":
            return []
        return [
            f"The filesystem of {root} cannot allocate space ahead, so that preallocate_images = space has no"
            " effect there: a guest may find it full. Use ext4, xfs, btrfs or NFS 4.2, or set it to none."
            for root in self._config.roots
            if not _can_allocate(root)
        ]


def _check_tables(fd: int, header: Header, target: str) -> None:
    end, there = end_of_tables(fd, header), os.fstat(fd).st_size
    if end > there:
        found, wanted = dates.sizes(there, end)
        raise errors.BackendError(
            f"what is there has {found}, and its tables take {wanted}: it is cut off",
            path=target,
            next_step=_COPY_AGAIN,
        )


def _has_data(fd: int) -> bool:
    return next(sparse.data_extents(fd), None) is not None


def _can_allocate(directory: str) -> bool:
    """Whether space can be allocated ahead in a directory. One that cannot be tried is another finding's."""
    try:
        # The file never has a name, or as long as it takes to remove that one.
        with tempfile.TemporaryFile(dir=directory) as probe:
            return atomic_file.allocate(probe.fileno(), 1)
    except OSError:
        return True


def _mark_unsynced(fd: int, host: System) -> bool:
    """Mark a file whose content will be written back later. False if it cannot be marked."""
    made = int(os.fstat(fd).st_mtime)
    return bool(host.boot_id) and attributes.write(fd, UNSYNCED_MARK, f"{host.boot_id} {made}")


class _PendingFile(PendingDisk):
    """A disk that is complete in a file without its name."""

    def __init__(
        self,
        file: atomic_file.UnfinishedFile,
        disk: model.Disk,
        formats: disk_info.DiskInfo,
        draft: disk_info.Draft | None,
    ) -> None:
        self._file = file
        self._disk = disk
        self._formats = formats
        self._draft = draft

    def commit(self) -> model.Disk:
        self._file.commit(self._formats.pinned(self._disk.target, self._disk.format, self._draft))
        return self._disk


def _open_disk(path: str, flags: int = os.O_RDONLY) -> Descriptor:
    names.require_path(path)
    disk = Descriptor(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(disk.fd).st_mode):
        return disk
    disk.close()
    raise errors.BackendError("the disk is no regular file", path=path)
