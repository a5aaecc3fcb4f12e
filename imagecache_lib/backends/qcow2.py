# SPDX-License-Identifier: Apache-2.0
"""Copy-on-write disks: an overlay that holds the guest's writes and refers to the base for the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from imagecache_lib import model
from imagecache_lib.backends import file, interface
from imagecache_lib.backends.interface import Feature, PendingDisk
from imagecache_lib.formats.qcow2 import overlay
from imagecache_lib.system import atomic_file
from imagecache_lib.system.translate import translated


class Qcow2Backend(file.FileBackend):
    """qcow2 overlays with an explicit backing file and an explicit backing format."""

    name = "qcow2"
    features = frozenset({Feature.OVERLAY, Feature.RESIZE, Feature.FLATTEN})

    @contextlib.contextmanager
    def prepare(self, base: model.BaseImage, target: str, size: int | None) -> Iterator[PendingDisk]:
        wanted = interface.whole_sectors(base.virtual_size if size is None else size)
        with atomic_file.unfinished(target, self._host) as file:
            with translated(target):
                overlay.write_overlay(file.fd, wanted, base.path, base.format)
                if self._config.preallocate_images == "space":
                    atomic_file.allocate(file.fd, wanted)
            yield self._sealed(file, model.Disk(target, "qcow2", wanted, base.name))

    def flatten(self, disk: model.Disk) -> model.Disk:
        current, backing_file = self._read(disk.target)
        if backing_file is not None:
            self._qemu_img.flatten(disk.target, current.format)
        return model.Disk(disk.target, current.format, current.virtual_size)
