# SPDX-License-Identifier: Apache-2.0
"""Disks that are rbd images: clones of the image service's own snapshots, or imported base images.

A clone moves no data, so that nothing is fetched or cached for it. An image is cloned if it is raw and one
of its locations is a readable snapshot in the cluster of the disks, ``rbd://<fsid>/<pool>/<image>/<snap>``
with each part url-quoted, which is how Glance's rbd store writes it.
"""

from __future__ import annotations

import contextlib
import copy as copying
import os
import re
import urllib.parse
from collections.abc import Iterator
from typing import Self

from imagecache_lib import dates, errors, model
from imagecache_lib.backends import ceph, interface
from imagecache_lib.backends.interface import CannotClone, Feature, PendingDisk, StorageBackend
from imagecache_lib.backends.librbd import LibrbdCluster
from imagecache_lib.config import CacheConfig
from imagecache_lib.system import durable, sparse
from imagecache_lib.system.host import System
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

#: rbd's own default object size: one write is one object.
_CHUNK = 4 * 2**20

#: Names of images in the making, beside what they will be.
_UNFINISHED = re.compile(r".+\.[0-9a-f]{32}\.new")


def parse_location(url: str) -> tuple[str, ceph.RbdName] | None:
    """Return the cluster's id and the snapshot that an image's location names, or None if it names none."""
    prefix, _, rest = url.partition("://")
    parts = [urllib.parse.unquote(part) for part in rest.split("/")]
    if prefix != "rbd" or len(parts) != 4 or not all(parts):
        return None
    return parts[0], ceph.RbdName(*parts[1:])


class RbdBackend(StorageBackend):
    """Images in the pool ``images_rbd_pool``. Targets are image names.

    A disk is made under a temporary name and renamed, never over another image.

    :param cluster: the cluster that the disks are in.
    """

    name = "rbd"
    features = frozenset({Feature.CLONE, Feature.RESIZE, Feature.FLATTEN})
    base_format = "raw"

    def __init__(self, config: CacheConfig, host: System, cluster: ceph.CephCluster) -> None:
        self._config = config
        self._host = host
        self._cluster = cluster
        self._waiter: Waiter | None = None

    @classmethod
    def from_config(cls, config: CacheConfig, host: System) -> Self:
        cluster = LibrbdCluster(
            config.images_rbd_ceph_conf,
            config.rbd_user,
            connect_timeout=config.rbd_connect_timeout,
            op_timeout=config.rbd_op_timeout,
        )
        return cls(config, host, cluster)

    def for_caller(self, waiter: Waiter) -> Self:
        bound = copying.copy(self)
        bound._waiter = waiter
        return bound

    # -- targets -------------------------------------------------------------------------------------

    def check_target(self, target: str) -> None:
        # librbd would make an image of such a name, which no rbd specification could reach.
        if not target or any(character in target for character in "/@\0"):
            raise errors.BackendError(
                "a target must be the name of an rbd image, without slash or at sign",
                path=target,
                next_step="correct the request",
            )

    def exists(self, target: str) -> bool:
        try:
            self._cluster.stat(self._named(target))
        except ceph.Missing:
            return False
        return True

    def _named(self, target: str) -> ceph.RbdName:
        return ceph.RbdName(self._config.images_rbd_pool, target)

    # -- making --------------------------------------------------------------------------------------

    def clone(self, image: model.Image, target: str, size: int | None) -> model.Disk:
        snapshot = self._snapshot_of(image)
        try:
            parent = self._cluster.stat(snapshot)
        except (ceph.Missing, ceph.Denied) as error:
            raise self._cannot(image, f"its snapshot {snapshot} cannot be opened: {error.cause}") from error
        if size is not None and size < parent.size:
            least, asked = dates.sizes(parent.size, size)
            raise errors.DiskTooSmallError(
                f"its virtual size is {least} and the disk shall have {asked}",
                image=image.id,
                next_step="choose a larger disk (flavor)",
                size=size,
                virtual_size=parent.size,
            )
        wanted = interface.whole_sectors(parent.size if size is None else size)
        with self._pending(model.Disk(target, "raw", wanted)) as pending:
            try:
                self._cluster.clone(snapshot, pending.image)
            except (ceph.Missing, ceph.Denied, ceph.Unprotected) as error:
                # Where no disk can be made, the snapshot is not to blame, and fetching is of no use.
                with contextlib.suppress(errors.DiskExistsError):
                    self._cluster.create(pending.image, wanted)
                raise self._cannot(
                    image, f"its snapshot {snapshot} cannot be cloned: {error.cause}"
                ) from error
            if wanted > parent.size:
                self._cluster.resize(pending.image, wanted)
            self._host.trace(TracePoint.DISK_MADE)
            return pending.commit()

    def _snapshot_of(self, image: model.Image) -> ceph.RbdName:
        if image.disk_format != "raw":
            raise self._cannot(image, f"it is {image.disk_format or 'of an unknown format'}, not raw")
        if not image.locations:
            raise self._cannot(
                image,
                "its source does not say where it is stored; Glance does with show_image_direct_url",
                copy=True,
            )
        ours = self._cluster.fsid()
        for location in image.locations:
            found = parse_location(location)
            if found is not None and found[0] == ours:
                return found[1]
        raise self._cannot(
            image, f"none of its locations is a snapshot in the disks' cluster {ours}", copy=True
        )

    def _cannot(self, image: model.Image, cause: str, *, copy: bool = False) -> CannotClone:
        store = self._config.images_rbd_glance_store_name
        wanted = store if copy and store and store not in image.stores else None
        return CannotClone(cause, image=image.id, store=wanted)

    @contextlib.contextmanager
    def prepare_standalone(
        self, base: model.BaseImage, target: str, size: int | None
    ) -> Iterator[PendingDisk]:
        wanted = interface.whole_sectors(base.virtual_size if size is None else size)
        assert base.fd is not None  # a held base is open
        with self._pending(model.Disk(target, "raw", wanted)) as pending:
            # What librbd acknowledged is durable: closing the image after it was filled flushes it.
            self._cluster.create(pending.image, wanted)
            self._cluster.fill(pending.image, _chunks(base.fd, base.path, self._waiter))
            self._host.trace(TracePoint.DISK_MADE)
            yield pending

    @contextlib.contextmanager
    def _pending(self, disk: model.Disk) -> Iterator[_PendingImage]:
        """Yield the temporary name for a disk in the making. Without a commit, nothing is left of it."""
        image = self._named(f"{disk.target}.{durable.new_id()}.new")
        pending = _PendingImage(self._cluster, self._host, image, disk)
        try:
            yield pending
        finally:
            if not pending.committed:
                # What cannot be removed now is swept later; an error that led here matters more.
                with contextlib.suppress(errors.ImageCacheError):
                    self._cluster.remove(image)

    def sweep(self) -> list[str]:
        removed = []
        oldest = self._host.clock() - self._config.stage_idle_seconds
        self._cluster.mend_names(self._config.images_rbd_pool, _UNFINISHED, oldest)
        for image in self._cluster.names(self._config.images_rbd_pool):
            # An image that is being filled is open, so that the cluster refuses to remove it.
            with contextlib.suppress(ceph.Missing, ceph.Busy):
                name = self._named(image)
                if _UNFINISHED.fullmatch(image) and self._cluster.stat(name).touched < oldest:
                    self._cluster.remove(name)
                    removed.append(image)
        return removed

    # -- disks that exist ----------------------------------------------------------------------------

    def inspect(self, target: str) -> model.Disk:
        return model.Disk(target, "raw", self._cluster.stat(self._named(target)).size)

    def resize(self, disk: model.Disk, size: int) -> model.Disk:
        current, size = self.inspect(disk.target), interface.whole_sectors(size)
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
            self._cluster.resize(self._named(disk.target), size)
        return model.Disk(disk.target, "raw", size)

    def flatten(self, disk: model.Disk) -> model.Disk:
        self._cluster.flatten(self._named(disk.target), self._waiter)
        return self.inspect(disk.target)

    def remove(self, disk: model.Disk) -> None:
        with contextlib.suppress(ceph.Missing):
            self._cluster.remove(self._named(disk.target))

    def preflight(self) -> list[str]:
        try:
            self._cluster.names(self._config.images_rbd_pool)
        except errors.ImageCacheError as error:
            return [f"The rbd backend cannot use its pool {self._config.images_rbd_pool}: {error}."]
        return []


class _PendingImage(PendingDisk):
    """An image that is complete under a temporary name.

    :ivar image: that name.
    :ivar committed: whether it has its own.
    """

    def __init__(
        self, cluster: ceph.CephCluster, host: System, image: ceph.RbdName, disk: model.Disk
    ) -> None:
        self.image = image
        self.committed = False
        self._cluster = cluster
        self._host = host
        self._disk = disk

    def commit(self) -> model.Disk:
        self._host.trace(TracePoint.DISK_CONFIRMED)
        self._cluster.rename(self.image, self._disk.target)
        self.committed = True
        self._host.trace(TracePoint.DISK_PLACED)
        return self._disk


def _chunks(fd: int, path: str, waiter: Waiter | None) -> Iterator[tuple[int, bytes]]:
    """Yield what is data in a file, by its offset; holes and zeros are left out.

    :param waiter: asked with each piece whether the caller still waits.
    """
    for extent, end in sparse.data_extents(fd):
        start = extent
        while start < end:
            if waiter is not None:
                waiter.check()
            with translated(path):
                data = os.pread(fd, min(_CHUNK - start % _CHUNK, end - start), start)
            if not data:
                raise errors.BackendError("the base image ended early", path=path, next_step="check the disk")
            for first, last in sparse.data_runs(data, start):
                yield start + first, data[first:last]
            start += len(data)
