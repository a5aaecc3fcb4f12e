# SPDX-License-Identifier: Apache-2.0
"""Disks that exist: inspecting, growing, flattening and removing them, and the base images that they need."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Sequence

from imagecache_lib import errors, events, model
from imagecache_lib.admin import CacheAdmin
from imagecache_lib.backends import load_backend
from imagecache_lib.backends.chain import ChainReader
from imagecache_lib.backends.interface import StorageBackend
from imagecache_lib.config import CacheConfig
from imagecache_lib.ingest import certificates, generate, resized
from imagecache_lib.ingest.call import Call
from imagecache_lib.ingest.fetch import DiskOps, Ingest
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.spawn import backing
from imagecache_lib.spawn.lease import Leases
from imagecache_lib.spawn.reuse import grown
from imagecache_lib.store import disk_roots, evidence, layout
from imagecache_lib.store.evidence import Use
from imagecache_lib.system import arguments, threads
from imagecache_lib.system.host import System
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import EitherToken, Waiter

#: How often a disk that is used again is tried to be grown on a base that another process evicts meanwhile.
_MOST_TRIES = 3


class DiskAdmin(CacheAdmin):
    """The image cache of one host with a source of images, and the disks that were made from it.

    :param config: how to cache.
    :param source: where images come from, unless a request says otherwise.
    :param backend: a storage backend, or the name of one, or None for the one that the configuration names.
    :param host: clock, sleep, host name and the like; the default is this machine's.
    :param certificate_store: knows the certificates of signed images, or None for the certificates in
        ``certificates_path``.
    :param disk_ops: a semaphore that limits fetching and converting, shared with the driver's own work. With
        None the limit of this manager, for all backends together, is ``max_concurrent_disk_ops``.
    :param observers: called with what happens. With None only a
        :class:`~imagecache_lib.observers.log.LogObserver` is.
    :raises ConfigError: the backend is unknown or its configuration cannot work.
    """

    def __init__(
        self,
        config: CacheConfig,
        source: ImageSource,
        backend: StorageBackend | str | None = None,
        *,
        host: System | None = None,
        certificate_store: certificates.CertificateStore | None = None,
        disk_ops: DiskOps | None = None,
        observers: Sequence[events.Observer] | None = None,
    ) -> None:
        super().__init__(config, backend, host=host, observers=observers)
        self.backend  # noqa: B018  # a driver is to hear now, and not at its first spawn, that it cannot be loaded
        self.source = source
        self._stopping = threading.Event()
        self._ingest = Ingest(
            self._cache, self._upkeep, certificate_store=certificate_store, disk_ops=disk_ops
        )
        self._generator = generate.Generator(self._cache, self._upkeep, cancel=self._stopping)
        self._leases = Leases(self._cache, self._upkeep)
        self._backends: dict[str, StorageBackend] = {}
        self._loading = threads.lock()
        self._chains = ChainReader(self._cache)

    def shutdown(self) -> None:
        """Cancel what is in flight, and whatever is asked later: the process is about to end.

        Each call that fetches or waits raises :class:`CancelledError` within a second or so of the source's
        next byte, and leaves nothing behind. Disks that exist, and leases that are held, are not touched.
        """
        self._stopping.set()

    def inspect_disk(self, target: str, *, backend: StorageBackend | str | None = None) -> model.Disk:
        """Return what an existing disk is: its format, its size, and the base it needs.

        :param target: absolute path, or for rbd an image name.
        :param backend: of this disk, or None for the manager's.
        :raises BackendError: there is no such disk, or it cannot be read.
        """
        return self._backend_of(backend).inspect(target)

    def resize_disk(
        self,
        disk: model.Disk,
        size: int,
        *,
        backend: StorageBackend | str | None = None,
        request: model.Request | None = None,
    ) -> model.Disk:
        """Grow a disk to ``size`` bytes, and return what it is now. It is never shrunk.

        :param backend: of this disk, or None for the manager's.
        :param request: its ``deadline`` and ``cancel`` end the call.
        :raises DiskTooSmallError, NoSpaceError, BackendError: the disk is as it was.
        :raises CancelledError, LockTimeoutError: the disk is whole, and has its old size or the new one.
        """
        arguments.require_disk(disk)
        arguments.require_size(size)
        return self._backend_of(backend, request).resize(disk, size)

    def flatten_disk(
        self,
        disk: model.Disk,
        *,
        backend: StorageBackend | str | None = None,
        request: model.Request | None = None,
    ) -> model.Disk:
        """Cut a disk loose from its base image, and return what it is now.

        :param backend: of this disk, or None for the manager's.
        :param request: its ``deadline`` and ``cancel`` end the call.
        :raises NoSpaceError, BackendError: the disk still needs its base. One with internal snapshots is
            refused, since they would lose what they have of it.
        :raises CancelledError, LockTimeoutError: the disk still needs its base, and can be flattened later.
        """
        arguments.require_disk(disk)
        return self._backend_of(backend, request).flatten(disk)

    def remove_disk(self, disk: model.Disk, *, backend: StorageBackend | str | None = None) -> None:
        """Remove a disk. Does nothing if the disk is gone already.

        :param backend: of this disk, or None for the manager's.
        :raises BackendError: the storage failed.
        :raises CancelledError: the manager was shut down while another process wrote to ``disk.info``. The
            disk is gone, and its entry is not.
        """
        arguments.require_disk(disk)
        self._backend_of(backend).remove(disk)

    def note_use(self, disk: model.Disk, *, backend: StorageBackend | str | None = None) -> bool:
        """Note that a disk which was always here is used now, so that the age of its base counts from now.

        Cheap, and judges nothing: for a guest that starts anew where it was. For a disk that came from
        another host there is :meth:`ensure_backing`.

        :param backend: of this disk, or None for the manager's.
        :returns: whether its base is here, or True for a disk that needs no base.
        :raises BackendError: the disk cannot be read.
        """
        arguments.require_disk(disk)
        base = self._backend_of(backend).inspect(disk.target).base
        if base is None:
            return True
        self._start()
        opened = self._cache.open_base(base)
        if opened is None:
            return False
        with contextlib.closing(opened), translated(self._cache.layout.hosts):
            self._cache.ensure_member()
            self._cache.note_roots(disk.target)
            self._cache.touch(opened)
        return True

    def ensure_backing(
        self,
        disk_path: str,
        *,
        image_id: str | None = None,
        os_type: str | None = None,
        fs: str | None = None,
        label: str | None = None,
        backend: StorageBackend | str | None = None,
        request: model.Request | None = None,
    ) -> model.BaseImage | None:
        """Make sure of the base of an overlay that came from another host, before it is started.

        Makes exactly the name and the format that the overlay's header embeds, if that is this image's
        base in this cache; a header that says anything else is refused, since a guest may have written it.
        The header may name the base in any of the ways that QEMU writes, and other overlays in the disk's
        directory may lie between, as external snapshots leave them.

        :param image_id: the image that the disk was made from, or None if
            :meth:`ImageCacheManager.create_swap` or :meth:`ImageCacheManager.create_ephemeral` made it; then
            its base is made anew, byte for byte.
        :param os_type: of an ephemeral disk, as :meth:`ImageCacheManager.create_ephemeral` was asked for it,
            since the name of its base does not tell which filesystem it has; or None if the caller does not
            know it, in which case the disk itself may show it.
        :param fs: likewise.
        :param label: likewise.
        :param backend: of this disk, or None for the manager's.
        :returns: the base, or None if the disk stands alone. It may be a legacy resized one of the image
            (``<sha1>_<GiB>``), which is served while it is there, and never made.
        :raises BackendError: the header names something else; or the base that is here has another format, or
            another filesystem than the disk was made on; or it is not here, and nothing tells which
            filesystem it had, or no other host can make it; or the disk is outside every disk root, where no
            pass would see that it needs its base.
        """
        for what, value in (("os_type", os_type), ("fs", fs), ("label", label)):
            arguments.require_text(what, value)
        if self.inspect_disk(disk_path, backend=backend).format != "qcow2":
            return None  # whatever header its guest wrote into it
        needed = backing.wanted(disk_path, image_id, self._chains, self._cache.layout)
        if needed is None:
            return None
        disk_roots.check_seen(disk_path, self.config)
        if image_id is not None:
            call = self._call(image_id, request, stored_format=needed.format, made=True)
            if layout.classify(needed.name) is layout.Kind.RESIZED:
                base = resized.request(self._cache, needed.name, call, disk_path)
            else:
                base = self._ingest.request(call, Use.DISK)
        else:
            self._start()
            base = self._generator.request(
                backing.generation(needed, disk_path, os_type=os_type, fs=fs, label=label, config=self.config)
            )
        with self._leases.acquire(base, bypass=False) as lease:
            assert lease.base.fd is not None  # a leased base is open
            with translated(self._cache.layout.hosts):
                self._cache.note_roots(disk_path)
            if image_id is None:
                backing.check_made_on(disk_path, lease.base.fd, self._chains)
            return dataclasses.replace(lease.base, fd=None)

    def _reuse(
        self,
        storage: StorageBackend,
        target: str,
        size: int | None,
        *,
        image_id: str | None = None,
        os_type: str | None = None,
        fs: str | None = None,
        label: str | None = None,
        request: model.Request | None = None,
    ) -> model.Disk:
        """Make sure of an existing disk's base, grow the disk to ``size``, and return what it is now.

        An eviction that began before the disk was there may take the base's name away for a moment in
        between, until it sees the disk: then both are done again.
        """
        for left in reversed(range(_MOST_TRIES)):
            self.ensure_backing(
                target,
                image_id=image_id,
                os_type=os_type,
                fs=fs,
                label=label,
                backend=storage,
                request=request,
            )
            try:
                known = self._known(image_id)
                base = None if known is None else self._cache.layout.base(known.name)
                return grown(storage, target, size, known=known, base=base)
            except errors.BackendError:
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")

    def _known(self, image_id: str | None) -> evidence.Record | None:
        """Return the record of an image's base, or None if the cache has none that can be read."""
        with contextlib.suppress(errors.ImageCacheError):
            return self._cache.evidence_of(layout.base_name(image_id)) if image_id is not None else None
        return None

    def _backend_of(
        self, backend: StorageBackend | str | None, request: model.Request | None = None
    ) -> StorageBackend:
        """Return the backend of one call, which is the manager's for None. Its work ends with the call.

        :raises ConfigError: the backend is unknown or its configuration cannot work.
        """
        arguments.require_request(request)
        request = request or model.Request()
        waiter = Waiter(self.host, None, request.deadline, EitherToken(self._stopping, request.cancel))
        return self._load(backend).for_caller(waiter)

    def _load(self, backend: StorageBackend | str | None) -> StorageBackend:
        if isinstance(backend, StorageBackend):
            return backend
        if backend is None or backend == self.backend.name:
            return self.backend
        if not isinstance(backend, str):
            raise errors.ConfigError(
                f"the backend is {errors.shown(backend)}, and must be a StorageBackend or the name of one",
                next_step="correct the caller",
            )
        with self._loading:
            if backend not in self._backends:
                self._backends[backend] = load_backend(backend, self.config, self.host)
            return self._backends[backend]

    def _stoppable(self, request: model.Request | None) -> model.Request:
        """Return a request that is cancelled too once this manager is shut down."""
        arguments.require_request(request)
        if request is None:
            return model.Request(cancel=EitherToken(self._stopping, None))
        return dataclasses.replace(request, cancel=EitherToken(self._stopping, request.cancel))

    def _call(
        self,
        image_id: str,
        request: model.Request | None,
        *,
        stored_format: str | None = None,
        size: int | None = None,
        made: bool = False,
    ) -> Call:
        call = Call(
            image_id,
            self._stoppable(request),
            source=self.source,
            config=self.config,
            host=self.host,
            stored_format=stored_format,
            size=size,
            made=made,
        )
        self._start()
        return call
