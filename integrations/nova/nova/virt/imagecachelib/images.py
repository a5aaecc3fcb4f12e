# SPDX-License-Identifier: Apache-2.0
"""Nova's image types with disks that the library makes. Everything else that they do stays Nova's.

All of Nova's disks come through ``Image.cache``: new ones and those that are there, from an image or made by
mkfs, in a spawn, a rescue, a resize, a migration, an unshelve and a hard reboot.
"""

from __future__ import annotations

import os
from typing import Any

from nova.virt.disk import api as disk_api
from nova.virt.image import model as image_model
from nova.virt.imagecachelib import caches
from nova.virt.libvirt import imagebackend
from oslo_concurrency import processutils
from oslo_log import log as logging
from oslo_utils import uuidutils

import imagecache_lib as ic
from imagecache_lib.backends.chain import HEADER_BYTES
from imagecache_lib.backends.interface import StorageBackend
from imagecache_lib.backends.raw import RawBackend
from imagecache_lib.formats.qcow2 import header
from imagecache_lib.nova import disk_info
from imagecache_lib.store import layout
from imagecache_lib.system import attributes

LOG = logging.getLogger(__name__)

#: Disks that are an image's bytes as they came. A rescue's have a suffix.
_FILES = ("kernel", "ramdisk")

#: What an overlay may stand on.
_BASES = (layout.Kind.ORIGINAL, layout.Kind.RESIZED, layout.Kind.SWAP, layout.Kind.EPHEMERAL)


def grow_filesystem(path: str) -> None:
    """Grow an ext filesystem that fills a raw disk, as Nova's ``disk.extend`` does. Others are left alone."""
    image = image_model.LocalFileImage(path, image_model.FORMAT_RAW)
    try:
        if disk_api.is_image_extendable(image):
            disk_api.resize2fs(path, run_as_root=False, check_exit_code=[0])
    except (processutils.ProcessExecutionError, OSError) as error:
        # The disk is as good as without it: the guest can grow its filesystem itself.
        LOG.debug("The filesystem in %s is not grown: %s", path, error)


class Cached:
    """Mixed into an image type of Nova's.

    :ivar caches: the driver's, by way of :class:`Backend`.
    :ivar fallback_host: a host whose cache may have what Glance has no more; set by the driver for one call.
    :ivar only_base: the image's base is all that is wanted, since the driver rebases the disk onto it.
    :ivar original: the image onto which the driver rebases the disk, so that an existing disk may be of this
        one already: an unshelve was interrupted.
    """

    caches: caches.Caches
    fallback_host: str | None = None
    only_base = False
    original: str | None = None
    backend_name: str

    @property
    def target(self) -> str:
        """What the library's backend calls the disk."""
        return self.path

    def storage(self) -> StorageBackend | str:
        """Return the library's backend for the disk."""
        return self.backend_name

    def manager(self) -> ic.ImageCacheManager:
        """Return the manager of the cache that the disk's base is in."""
        return self.caches.manager()

    def cache(self, fetch_func, filename, size=None, safe=False, *args, **kwargs) -> None:
        """Make the disk, or make sure of its base and grow it, as Nova's method of that name.

        :param fetch_func: Nova's function for the base. What it was asked for tells what the disk is.
        :param size: bytes that the disk has at least. None or 0: as many as its base.
        """
        wanted = {**getattr(fetch_func, "keywords", {}), **kwargs}
        with caches.translated(wanted.get("image_id") or filename):
            if wanted.get("image_id") is not None:
                self._from_image(wanted, size or None)
            elif "swap_mb" in wanted:
                self.manager().create_swap(
                    self.target, size_mb=int(wanted["swap_mb"]), if_exists="reuse", backend=self.storage()
                )
            elif "ephemeral_size" in wanted:
                self._ephemeral(wanted, size)
            else:
                super().cache(fetch_func, filename, size, safe, *args, **kwargs)
        self._made()

    def _from_image(self, wanted: dict[str, Any], size: int | None) -> None:
        manager, image_id = self.manager(), wanted["image_id"]
        request = self.caches.request(
            wanted.get("context"), wanted.get("trusted_certs"), self.fallback_host, manager.config
        )
        name = getattr(self, "disk_name", None) or ""
        if name.split(".")[0] in _FILES:
            manager.fetch_file(image_id, self.target, if_exists="reuse", request=request)
        elif self.only_base:
            manager.cache_image(image_id, request=request)
        else:
            if self.original is not None and self._is_of(self.original):
                image_id = self.original
            manager.create_disk(
                image_id, self.target, size=size, if_exists="reuse", backend=self.storage(), request=request
            )

    def _is_of(self, image_id: str) -> bool:
        """Whether there is a disk, and it was made from this image or stands alone."""
        if not self.exists():
            return False
        disk = self.manager().inspect_disk(self.target, backend=self.storage())
        return disk.base in (None, layout.base_name(image_id))

    def _ephemeral(self, wanted: dict[str, Any], size: int | None) -> None:
        manager, backend = self.manager(), self.storage()
        os_type, fs, label = (wanted.get(key) for key in ("os_type", "specified_fs", "fs_label"))
        if not self.exists():
            disk = manager.create_ephemeral(
                self.target,
                size_gb=int(wanted["ephemeral_size"]),
                os_type=os_type,
                fs=fs,
                label=label,
                backend=backend,
            )
        else:
            disk = manager.inspect_disk(self.target, backend=backend)
            if manager.note_use(disk, backend=backend):
                # What the disk itself shows says better what it was made on than what was asked for: Nova
                # gives all disks of one size the same base, whatever filesystem and label they were to have.
                manager.ensure_backing(self.target, backend=backend)
            else:
                # An instance without a type has a filesystem all the same: that of Nova's type "default".
                manager.ensure_backing(
                    self.target, os_type=os_type or "default", fs=fs, label=label, backend=backend
                )
        if size and size > disk.virtual_size:
            manager.resize_disk(disk, size, backend=backend)

    def _made(self) -> None:
        """Bring the object up to date with its disk."""


class Flat(Cached, imagebackend.Flat):
    backend_name = "raw"

    def storage(self) -> StorageBackend:
        manager = self.caches.manager()
        return RawBackend(manager.config, manager.host, grow_filesystem=grow_filesystem)

    def _made(self) -> None:
        self.correct_format()


def format_of(path: str, pinned: str) -> str:
    """Return the format in which QEMU is to open a disk on a host whose disks are qcow2.

    Raw disks are there if ``images_type`` was another one when they were made. What their guests wrote into
    them does not say which format they have. A migration may have made one qcow2 and left the entry of
    before: that is believed of a disk that begins as qcow2 and is known to be self-contained.

    :param pinned: what ``disk.info`` says.
    """
    try:
        with open(path, "rb") as disk:
            if marked := attributes.read(disk.fileno(), disk_info.FORMAT_MARK):
                return marked
            if pinned != "raw":
                return pinned
            found = header.parse(disk.read(HEADER_BYTES))
    except FileNotFoundError:
        return "qcow2"  # as it will be
    except OSError:
        return pinned
    except (header.NotQcow2, header.HeaderError):
        return "raw"
    names_a_file = found.backing_file or found.incompatible_features & header.Incompatible.DATA_FILE
    return "raw" if names_a_file else "qcow2"


def _has_no_header(path: str) -> bool:
    """Whether a disk is there, has content, and does not begin as qcow2.

    :raises OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as disk:
            return disk.read(len(header.MAGIC)) not in (header.MAGIC, b"")
    except FileNotFoundError:
        return False


class Qcow2(Cached, imagebackend.Qcow2):
    backend_name = "qcow2"

    def resolve_driver_format(self) -> str:
        """Have QEMU open the disk as what it is. Nova's image type takes every disk for qcow2."""
        self.driver_format = format_of(self.path, super().resolve_driver_format())
        return self.driver_format

    def _get_driver_format(self) -> str:
        """Return the format of a disk whose format is not pinned, which is then pinned."""
        return "raw" if _has_no_header(self.path) else super()._get_driver_format()

    def get_model(self, connection) -> image_model.Image:
        """Return the disk as Nova opens it itself, to put files into it."""
        if self.driver_format == "raw":
            return image_model.LocalFileImage(self.path, image_model.FORMAT_RAW)
        return super().get_model(connection)

    def cache(self, fetch_func, filename, *args, **kwargs) -> None:
        with caches.translated(filename):
            self._pin_format()
        super().cache(fetch_func, filename, *args, **kwargs)

    def _pin_format(self) -> None:
        """Have ``disk.info`` say what the disk is taken for, since the library goes by that."""
        manager = self.caches.manager()
        formats = disk_info.DiskInfo(manager.config, manager.host)
        if self.driver_format == "qcow2" and formats.format_of(self.path) == "raw":
            with formats.pinned(self.path, "qcow2"):
                pass

    def manager(self) -> ic.ImageCacheManager:
        """Return the manager of the directory that an existing overlay names, or else of the configured one.

        The directory's name may have been changed since the disk was made, or hold the address of the host
        that the disk came from. As with Nova, guests go on with the base that they have.
        """
        manager = self.caches.manager()
        directory, name = os.path.split(self._named())
        parent, subdirectory = os.path.split(directory)
        if parent != manager.config.instances_path or directory in (
            manager.config.base_path,
            manager.config.locks_path,
        ):
            return manager
        # A directory of an instance, such as <uuid>_resize, holds no cache.
        if uuidutils.is_uuid_like(subdirectory[:36]) or layout.classify(name) not in _BASES:
            return manager
        return self.caches.manager(subdirectory)

    def _named(self) -> str:
        """Return what the header of an existing overlay names, which the library judges; or an empty text."""
        try:
            if self.caches.manager().inspect_disk(self.path, backend=self.backend_name).format != "qcow2":
                return ""  # its guest wrote the header
            with open(self.path, "rb") as disk:
                return os.fsdecode(header.parse(disk.read(HEADER_BYTES)).backing_file or b"")
        except (ic.BackendError, OSError, header.NotQcow2, header.HeaderError):
            return ""


class Rbd(Cached, imagebackend.Rbd):
    backend_name = "rbd"

    @property
    def target(self) -> str:
        return self.rbd_name


class Backend(imagebackend.Backend):
    """Nova's choice of image types, with three of them exchanged.

    :param use_cow: ``use_cow_images``.
    :param caches: what the disks' bases are in.
    """

    def __init__(self, use_cow: bool, caches: caches.Caches) -> None:
        super().__init__(use_cow)
        ours = {imagebackend.Flat: Flat, imagebackend.Qcow2: Qcow2, imagebackend.Rbd: Rbd}
        self.BACKEND = {name: ours.get(kind, kind) for name, kind in self.BACKEND.items()}
        self._caches = caches

    def by_name(self, *args, **kwargs) -> imagebackend.Image:
        return self._with_caches(super().by_name(*args, **kwargs))

    def by_libvirt_path(self, *args, **kwargs) -> imagebackend.Image:
        return self._with_caches(super().by_libvirt_path(*args, **kwargs))

    def _with_caches(self, image: imagebackend.Image) -> imagebackend.Image:
        if isinstance(image, Cached):
            image.caches = self._caches
        return image
