# SPDX-License-Identifier: Apache-2.0
"""The image cache manager: the two flows, from the top.

*Spawn* (:meth:`ImageCacheManager.create_disk`): a backend that clones clones → otherwise the base image is
leased, which fetches it first if it is not there → the backend prepares the disk → the base still has its
name → the disk gets its own (:func:`~imagecache_lib.spawn.make.make_disk`).

*Upkeep* (:meth:`ImageCacheManager.verify_base_images`): what crashes left is put right → everything in the
cache is listed → everything that refers to it is read → a plan says what may go → it goes, unless a second
reading finds that something came to need it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator

from imagecache_lib import errors, events, model
from imagecache_lib.backends.interface import Feature, StorageBackend
from imagecache_lib.disks import DiskAdmin
from imagecache_lib.ingest import generation
from imagecache_lib.spawn import cloning
from imagecache_lib.spawn.make import make_disk, make_file
from imagecache_lib.spawn.reuse import check_file, is_reused, require_reuse
from imagecache_lib.store import disk_roots, pins
from imagecache_lib.store.evidence import Use
from imagecache_lib.store.spool import Spools
from imagecache_lib.system import arguments, atomic_file
from imagecache_lib.system.maker import Maker
from imagecache_lib.upkeep.report import VerifyReport

LOG = logging.getLogger(__name__)

#: Owner of the pins of :meth:`ImageCacheManager.cache_image`.
_PRECACHE = "pre-cache"


class ImageCacheManager(DiskAdmin):
    """The image cache of one host. Safe to share between threads; processes make one each.

    The constructor changes nothing on disk. The first call makes what the cache lacks, and repairs what a
    crash left.
    An operator's calls are in :class:`~imagecache_lib.admin.CacheAdmin`, those on existing disks in
    :class:`~imagecache_lib.disks.DiskAdmin`, which also has the parameters; here are the two flows.
    """

    # -- spawn ---------------------------------------------------------------------------------------

    def create_disk(
        self,
        image_id: str,
        target: str,
        *,
        size: int | None = None,
        if_exists: str = "error",
        backend: StorageBackend | str | None = None,
        request: model.Request | None = None,
    ) -> model.Disk:
        """Make an instance disk from an image, and return it.

        :param target: absolute path, or for rbd an image name.
        :param size: virtual size in bytes, or None for the image's own size.
        :param if_exists: ``"error"``, or ``"reuse"``: make sure of the existing disk's base, grow it, and
            change nothing else (evacuate, rebuild, retry).
        :param backend: of this disk, or None for the manager's: one instance may have several.
        :raises DiskExistsError: the target exists.
        :raises DiskTooSmallError: the image's virtual size is larger; nothing was written.
        :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, BackendError: nothing is left behind.
        """
        if size is not None:
            arguments.require_size(size)
        storage = self._backend_of(backend, request)
        call = self._call(image_id, request, stored_format=storage.base_format, size=size)
        base = self._ingest.request(call, Use.DISK)
        with base.named():
            if is_reused(storage, target, if_exists):
                return self._reuse(storage, target, size, image_id=image_id, request=request)
            if Feature.CLONE in storage.features:
                disk = cloning.clone(call, storage, target, size, self._cache)
                if disk is not None:
                    return disk
            return make_disk(self._leases, storage, base, target, size)

    def create_swap(
        self,
        target: str,
        *,
        size_mb: int,
        if_exists: str = "error",
        backend: StorageBackend | str | None = None,
    ) -> model.Disk:
        """Make a swap disk of ``size_mb`` MiB, formatted, and return it.

        :param target: absolute path, or for rbd an image name.
        :param if_exists: ``"error"``, or ``"reuse"``: make sure of the existing disk's base.
        :param backend: of this disk, or None for the manager's.
        :raises DiskExistsError: the target exists.
        :raises NoSpaceError, BackendError, ConfigError: nothing is left behind.
        """
        storage = self._backend_of(backend)
        wanted = generation.swap(size_mb, share=Feature.OVERLAY in storage.features)
        self._start()
        if is_reused(storage, target, if_exists):
            return self._reuse(storage, target, None)
        return self._generate(storage, wanted, target)

    def create_ephemeral(
        self,
        target: str,
        *,
        size_gb: int,
        os_type: str | None = None,
        fs: str | None = None,
        label: str | None = None,
        if_exists: str = "error",
        backend: StorageBackend | str | None = None,
    ) -> model.Disk:
        """Make an ephemeral disk of ``size_gb`` GiB, with an empty filesystem, and return it.

        :param target: absolute path, or for rbd an image name.
        :param os_type: the guest's type, which chooses the filesystem where ``fs`` does not: the operator's
            command for it, else ``default_ephemeral_format``, else ext4 for ``linux``, ntfs for ``windows``
            and vfat for others.
        :param fs: ext2, ext3, ext4, vfat, xfs or ntfs.
        :param label: the filesystem's label, or None for ``ephemeral0``. Give each disk of a guest its own.
        :param if_exists: as for :meth:`create_disk`: an existing disk is grown, its filesystem is not.
        :param backend: of this disk, or None for the manager's.
        :raises DiskExistsError: the target exists.
        :raises NoSpaceError, BackendError, ConfigError: nothing is left behind.
        """
        storage = self._backend_of(backend)
        wanted = generation.ephemeral(
            size_gb,
            os_type=os_type,
            fs=fs,
            label=label,
            config=self.config,
            share=Feature.OVERLAY in storage.features,
        )
        self._start()
        if is_reused(storage, target, if_exists):
            return self._reuse(storage, target, wanted.size, os_type=os_type, fs=fs, label=label)
        return self._generate(storage, wanted, target)

    def _generate(self, storage: StorageBackend, wanted: generation.Generation, target: str) -> model.Disk:
        request = self._generator.request(wanted)
        return make_disk(self._leases, storage, request, target, shared=wanted.shared)

    def fetch_file(
        self,
        image_id: str,
        path: str,
        *,
        if_exists: str = "error",
        request: model.Request | None = None,
    ) -> None:
        """Put an image's bytes, as they came, into a new file: a kernel, a ramdisk.

        :param path: absolute, in an existing directory.
        :param if_exists: ``"error"``, or ``"reuse"``: leave the existing file as it is.
        :raises DiskExistsError: the file exists.
        :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, BackendError: nothing is left behind.
        """
        base = self._ingest.request(self._call(image_id, request), Use.FILE)
        with base.named():
            atomic_file.check_target(path)
            disk_roots.check_not_in_cache(path, self.config)
            if os.path.lexists(path):
                require_reuse(path, if_exists)
                return check_file(path, self._known(image_id))
            notes = disk_roots.notes_for(path, self.config)
            make_file(self._leases, base, path, self.host, notes=notes)

    @contextlib.contextmanager
    def fetch_or_reuse(
        self, image_id: str, *, request: model.Request | None = None
    ) -> Iterator[model.BaseImage]:
        """Lease a base image, for drivers that make their disks themselves.

        Yields the base image. While the lease is held, no evictor removes the base, as far as locks work. At
        the end the lease checks that the base is still in the cache.

        :raises LeaseLostError: at the end, if the base left the cache meanwhile: throw away what was made.
        :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, BackendError: at the start.
        """
        base = self._ingest.request(self._call(image_id, request), Use.DISK)
        # A private copy would be gone afterwards, and the driver may make an overlay.
        with self._leases.acquire(base, bypass=False, lasting=True) as lease:
            yield lease.base
            if not lease.is_current(anywhere=True):
                raise errors.LeaseLostError(
                    "its base image left the cache while it was leased",
                    path=lease.base.path,
                    next_step="throw away what was made from it and start over",
                )

    @contextlib.contextmanager
    def lease_cached(self, image_id: str) -> Iterator[model.BaseImage]:
        """Lease a base image if it is in the cache and serves: nothing is fetched for it.

        Yields the base image.

        :raises ImageNotFound: the base is not in the cache, or does not serve.
        """
        base = self._ingest.request(self._call(image_id, None), Use.DISK)
        with self._leases.acquire_cached(base) as lease:
            yield lease.base

    # -- ahead of time -------------------------------------------------------------------------------

    def cache_image(
        self, image_id: str, *, pin_until: float | None = None, request: model.Request | None = None
    ) -> model.CacheResult:
        """Have an image in the cache before any disk needs it, and return what was found or done.

        Parameters and errors are those of :meth:`precache_image`.
        """
        return self.precache_image(image_id, pin_until=pin_until, request=request).result

    def precache_image(
        self, image_id: str, *, pin_until: float | None = None, request: model.Request | None = None
    ) -> model.CacheReport:
        """Have an image in the cache before any disk needs it, and return what that took.

        :param pin_until: epoch seconds until which the base stays even if nothing uses it.
        :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, BackendError: it is not cached.
        """
        call = self._call(image_id, request)
        if Feature.CLONE in self.backend.features:
            return model.CacheReport(model.CacheResult.NOT_NEEDED)
        pin, earlier, maker = pins.Pin(_PRECACHE, pin_until), None, Maker()
        if pin_until is not None:
            # The pin comes first: between a look and a pin the base could go.
            earlier = pins.add(self._cache, call.name, image_id, pin, waiter=call.waiter)
        try:
            with self._leases.acquire(self._ingest.request(call, Use.DISK), bypass=False) as lease:
                if lease.production is None:
                    return model.CacheReport(model.CacheResult.EXISTING)
                made = lease.production
                return model.CacheReport(model.CacheResult.CACHED, made.received, made.allocated)
        except BaseException:
            if pin_until is not None and maker.is_here:
                pins.take_back(self._cache, call.name, image_id, pin, earlier, waiter=call.waiter)
            raise

    def is_cached(self, image_id: str) -> bool:
        """Whether a disk could be made from the image without fetching it.

        True too for a base that was not checked yet, which is checked before its first use.
        """
        call = self._call(image_id, None, stored_format=self.backend.base_format)
        base = self._ingest.request(call, Use.DISK)
        with base.named():
            return self._leases.serves(base)

    def describe_image(self, image_id: str, *, request: model.Request | None = None) -> model.Image:
        """Return what the source says of an image.

        :raises ImageNotFound, ImageRejected, SourceError: as for fetching it.
        """
        return self._call(image_id, request).ask()[1]

    def spools(self) -> Spools:
        """Return what keeps images as they arrive, for other hosts to read meanwhile."""
        self._start()
        return Spools(self._cache, self._upkeep)

    # -- upkeep --------------------------------------------------------------------------------------

    def verify_base_images(
        self, instances: Iterable[model.Instance] | None, *, dry_run: bool = False
    ) -> VerifyReport:
        """Remove base images that no instance uses and that are old enough. Call it periodically.

        Returns the report of the pass.

        :param instances: all instances on this host; on shared storage those of all hosts that share it; or
            None if the driver could not tell, in which case every base stays.
        :param dry_run: change nothing, and report what would be done.
        :raises ConfigError, BackendError: the cache itself cannot be read.
        """
        self._start()
        report = self._upkeep.verify(instances, dry_run=dry_run)
        if not dry_run:
            self._sweep_disks()
            self._cache.observers(report.as_event())
        return report

    def _sweep_disks(self) -> None:
        try:
            removed = self.backend.sweep()
        except errors.ImageCacheError as error:
            LOG.warning("Unfinished disks are not removed: %s", error)
            return
        for name in removed:
            self._cache.observers(events.Recovered(name, what="an unfinished disk is removed"))
