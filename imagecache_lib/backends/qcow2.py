# SPDX-License-Identifier: Apache-2.0
"""Copy-on-write disks: an overlay that holds the guest's writes and refers to the base for the rest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from imagecache_lib import errors, model
from imagecache_lib.backends import file, interface
from imagecache_lib.backends.interface import Feature, PendingDisk
from imagecache_lib.formats.qcow2 import overlay, standalone
from imagecache_lib.formats.qemu_img import DiskFile
from imagecache_lib.store import disk_roots
from imagecache_lib.system import atomic_file
from imagecache_lib.system.translate import translated


class Qcow2Backend(file.FileBackend):
    """qcow2 overlays with an explicit backing file and an explicit backing format.

    Disks that stand alone are qcow2 as well: Nova's image type of that name takes every disk for qcow2, and a
    guest whose raw disk is taken for qcow2 chooses which file of the host it reads.
    """

    name = "qcow2"
    features = frozenset({Feature.OVERLAY, Feature.RESIZE, Feature.FLATTEN})

    @contextlib.contextmanager
    def prepare(self, base: model.BaseImage, target: str, size: int | None) -> Iterator[PendingDisk]:
        wanted = interface.whole_sectors(base.virtual_size if size is None else size)
        with (
            atomic_file.unfinished(target, self._host) as file,
            # Both are written before either is synced: most of what a spawn waits for are such syncs.
            self._formats.drafted(target, "qcow2") as draft,
        ):
            with translated(target):
                overlay.write_overlay(file.fd, wanted, base.path, base.format)
                self._preallocate(file.fd, wanted, target)
            yield self._sealed(file, model.Disk(target, "qcow2", wanted, base.name), draft=draft)

    @contextlib.contextmanager
    def prepare_standalone(
        self, base: model.BaseImage, target: str, size: int | None
    ) -> Iterator[PendingDisk]:
        wanted = interface.whole_sectors(base.virtual_size if size is None else size)
        assert base.fd is not None  # a held base is open
        notes = disk_roots.notes_for(target, self._config)
        with atomic_file.unfinished(target, self._host, notes=notes) as file:
            with translated(target):
                if base.format == "raw":
                    standalone.write_standalone(base.fd, file.fd, wanted, waiter=self._waiter)
                else:
                    self._convert(base, base.fd, file, wanted)
                self._preallocate(file.fd, wanted, target)
            # Without its tables a qcow2 is no disk at all, so that its content is always synced.
            yield self._sealed(file, model.Disk(target, "qcow2", wanted))

    def _convert(
        self, base: model.BaseImage, base_fd: int, file: atomic_file.UnfinishedFile, size: int
    ) -> None:
        if base.format == "qcow2":
            atomic_file.copy_content(base_fd, file.fd, self._waiter)
        else:
            self._convert_to_qcow2(base, file)
        if size > base.virtual_size:
            self._qemu_img.resize(DiskFile(file.path, "qcow2"), size)

    def _convert_to_qcow2(self, base: model.BaseImage, file: atomic_file.UnfinishedFile) -> None:
        # Into a disk of zeros that is there: then nothing but what is stated is opened or made.
        zeros = os.memfd_create("imagecache-zeros", os.MFD_CLOEXEC)
        try:
            os.ftruncate(zeros, base.virtual_size)
            standalone.write_standalone(zeros, file.fd, base.virtual_size)
        finally:
            os.close(zeros)
        self._qemu_img.convert(DiskFile(base.path, base.format), DiskFile(file.path, "qcow2"))

    def flatten(self, disk: model.Disk) -> model.Disk:
        self._check_no_base(disk.target)
        current, header = self._read(disk.target)
        if header is not None and header.backing_file is not None:
            if header.snapshot_count:
                # What is copied is what the disk has now. Its snapshots have their own view of the base.
                raise errors.BackendError(
                    f"the disk has internal snapshots, of which {header.snapshot_count} would lose what they"
                    " have of the base image",
                    path=disk.target,
                    next_step="delete them, or copy each into an image of its own, with qemu-img",
                )
            self._qemu_img.flatten(self._chain(disk.target, current.format, header), current.virtual_size)
        return model.Disk(disk.target, current.format, current.virtual_size)
