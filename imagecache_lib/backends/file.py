# SPDX-License-Identifier: Apache-2.0
"""What the backends have in common whose disks are files: names, placement, copying, growing."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from typing import Self

from imagecache_lib import errors, model
from imagecache_lib.backends import interface
from imagecache_lib.backends.interface import Feature, StorageBackend
from imagecache_lib.config import CacheConfig
from imagecache_lib.formats import qemu_img
from imagecache_lib.formats.qcow2 import header as qcow2_header
from imagecache_lib.formats.qcow2.header import HeaderError, Incompatible, NotQcow2
from imagecache_lib.nova import disk_info
from imagecache_lib.store import disk_roots, layout
from imagecache_lib.system import atomic_file
from imagecache_lib.system.host import System
from imagecache_lib.system.translate import translated

#: As much of a disk as a qcow2 header that any tool writes.
_HEADER_BYTES = 65536


class FileBackend(StorageBackend):
    """Disks that are files on the host. Targets are absolute paths in existing directories."""

    def __init__(self, config: CacheConfig, host: System) -> None:
        self._config = config
        self._host = host
        self._formats = disk_info.DiskInfo(config, host)
        self._qemu_img = qemu_img.QemuImg(config, host)

    @classmethod
    def from_config(cls, config: CacheConfig, host: System) -> Self:
        return cls(config, host)

    # -- targets -------------------------------------------------------------------------------------

    def check_target(self, target: str) -> None:
        atomic_file.check_target(target)
        if Feature.OVERLAY in self.features:
            disk_roots.check_seen(target, self._config)

    def exists(self, target: str) -> bool:
        return os.path.lexists(target)

    # -- making --------------------------------------------------------------------------------------

    def copy(
        self, base: model.BaseImage, target: str, size: int | None, *, confirm: Callable[[], None]
    ) -> model.Disk:
        wanted = base.virtual_size if size is None else size
        if base.format != "raw":
            wanted = interface.whole_sectors(wanted)
        assert base.fd is not None  # a held base is open
        pinned = self._formats.pinned(target, base.format)
        with atomic_file.placing(target, self._host, confirm, pinned=pinned) as unfinished:
            atomic_file.copy_content(base.fd, unfinished.fd)
            if base.format == "raw":
                self._grow_raw(unfinished.fd, wanted)
            elif wanted > base.virtual_size:
                self._qemu_img.resize(unfinished.path, base.format, wanted)
        return model.Disk(target, base.format, wanted)

    def _grow_raw(self, fd: int, size: int) -> None:
        before = os.fstat(fd).st_size
        if self._config.preallocate_images == "space":
            try:
                atomic_file.allocate(fd, size)
            except OSError:
                os.ftruncate(fd, before)  # gives back what was allocated behind the end
                raise
        if size > before:
            os.ftruncate(fd, size)

    # -- disks that exist ----------------------------------------------------------------------------

    def inspect(self, target: str) -> model.Disk:
        return self._read(target)[0]

    def _read(self, target: str) -> tuple[model.Disk, bytes | None]:
        """Return what a disk is, and the backing file that its header names."""
        with translated(target):
            fd = _open_disk(target)
            try:
                size = os.fstat(fd).st_size
                data = os.pread(fd, _HEADER_BYTES, 0)
            finally:
                os.close(fd)
        format = self._format(target, data)
        if format == "raw":
            return model.Disk(target, "raw", size), None
        if format != "qcow2":
            found = self._qemu_img.info(target, format)
            return model.Disk(target, format, int(found["virtual-size"])), None
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
        named = header.backing_file
        return model.Disk(target, "qcow2", header.virtual_size, _cached_name(named)), named

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
        # Nobody pinned it: a qcow2 is one by its header; this is how the disks of old are found too.
        return pinned or ("qcow2" if looks_like_qcow2 else "raw")

    def resize(self, disk: model.Disk, size: int) -> model.Disk:
        current = self.inspect(disk.target)
        if current.format != "raw":
            size = interface.whole_sectors(size)
        if size < current.virtual_size:
            raise errors.DiskTooSmallError(
                f"the disk has {current.virtual_size} bytes and is never shrunk to {size}",
                path=disk.target,
                next_step="ask for at least its size",
            )
        if size > current.virtual_size:
            if current.format == "raw":
                with translated(disk.target):
                    fd = _open_disk(disk.target, os.O_RDWR)
                    try:
                        self._grow_raw(fd, size)
                    finally:
                        os.close(fd)
            else:
                self._qemu_img.resize(disk.target, current.format, size)
        return model.Disk(disk.target, current.format, max(size, current.virtual_size), current.base)

    def remove(self, disk: model.Disk) -> None:
        with translated(disk.target):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(disk.target)
            if os.path.isdir(os.path.dirname(disk.target)):
                self._formats.forget(disk.target)

    def preflight(self) -> list[str]:
        return []


def _open_disk(path: str, flags: int = os.O_RDONLY) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise errors.BackendError("the disk is no regular file", path=path)
    return fd


def _cached_name(backing_file: bytes | None) -> str | None:
    found = layout.NAME_PATTERN.search(os.path.basename(backing_file)) if backing_file else None
    return found.group().decode() if found else None
