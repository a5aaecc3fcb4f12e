# SPDX-License-Identifier: Apache-2.0
"""The image cache manager: the two flows, from the top.

*Spawn*: a disk is asked for → a backend that clones clones → otherwise the base image is held, which
fetches it first if it is not there → the backend makes the disk → the base still has its name → the disk
gets its own.

*Upkeep*: what crashes left is put right → everything in the cache is listed → everything that refers to it
is read → a plan says what may go → it goes, unless a second reading finds that somebody came to need it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

from imagecache_lib import errors, events, model
from imagecache_lib.backends import load_backend
from imagecache_lib.backends.interface import Feature, StorageBackend
from imagecache_lib.config import CacheConfig
from imagecache_lib.diagnostics import audit, catalog, preflight
from imagecache_lib.formats import qemu_img
from imagecache_lib.ingest import certificates, generate
from imagecache_lib.ingest.call import Call
from imagecache_lib.ingest.fetch import Ingest
from imagecache_lib.observers.log import LogObserver
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.spawn import backing, cloning, lease
from imagecache_lib.store import disk_roots, layout, pins
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.evidence import Use
from imagecache_lib.system import atomic_file
from imagecache_lib.system.host import System
from imagecache_lib.system.translate import translated
from imagecache_lib.upkeep import inventory, verify
from imagecache_lib.upkeep.make_room import SpaceReport
from imagecache_lib.upkeep.outcomes import Kept
from imagecache_lib.upkeep.scrub import ScrubReport

LOG = logging.getLogger(__name__)

#: Who owns the pins of :meth:`ImageCacheManager.cache_image`.
_PRECACHE = "pre-cache"

#: How often a base may leave the cache while disks are made from it before something must be wrong.
_MOST_TURNS = 20


class ImageCacheManager:
    """The image cache of one host. Safe to share between threads; processes make one each.

    Nothing is touched before the first call, which makes what is missing and repairs what a crash left.

    :param config: how to cache.
    :param source: where images come from, unless a request says otherwise.
    :param backend: a storage backend, or the name of one. None: the configuration's.
    :param host: clock, sleep, host name and the like; the default is this machine's.
    :param certificate_store: knows the certificates of signed images. None: those in ``certificates_path``.
    :param observers: called with what happens. None: a
        :class:`~imagecache_lib.observers.log.LogObserver` alone.
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
        observers: Sequence[events.Observer] | None = None,
    ) -> None:
        self.config = config
        self.host = host or System()
        self.source = source
        if not isinstance(backend, StorageBackend):
            backend = load_backend(backend or config.backend, config, self.host)
        self.backend = backend
        self._observers = events.Observers([LogObserver()] if observers is None else observers)
        self._cache = CacheStore(config, self.host)
        self._upkeep = verify.Upkeep(self._cache, self._observers)
        self._ingest = Ingest(
            self._cache,
            qemu_img.QemuImg(config, self.host),
            self._observers,
            make_room=self._upkeep.make_room,
            certificate_store=certificate_store or _certificates_of(config),
        )
        self._leases = lease.Leases(
            self._cache, self._ingest, self._observers, evict_unfit=self._upkeep.evict_unfit
        )
        self._generated = lease.Leases(
            self._cache,
            generate.Generator(self._cache, self.host, make_room=self._upkeep.make_room),
            self._observers,
            evict_unfit=self._upkeep.evict_unfit,
        )
        self._starting = threading.Lock()
        self._started = False

    # -- spawn ---------------------------------------------------------------------------------------

    def create_disk(
        self,
        image_id: str,
        target: str,
        *,
        size: int | None = None,
        if_exists: str = "error",
        request: model.Request | None = None,
    ) -> model.Disk:
        """Make an instance disk from an image.

        :param target: absolute path, or for rbd an image name.
        :param size: virtual size in bytes. None: the image's.
        :param if_exists: ``"error"``, or ``"reuse"``: make sure of the existing disk's base, grow it, and
            change nothing else (evacuate, rebuild, retry).
        :raises DiskExistsError: the target exists.
        :raises DiskTooSmallError: the image's virtual size is larger; nothing was written.
        :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, BackendError: nothing is left behind.
        """
        call = self._begin(image_id, request, stored_format=self.backend.base_format, size=size)
        with call.named():
            return self._create(call, target, size, if_exists)

    def _create(self, call: Call, target: str, size: int | None, if_exists: str) -> model.Disk:
        self.backend.check_target(target)
        if self.backend.exists(target):
            return self._reuse(call, target, size, if_exists)
        if Feature.CLONE in self.backend.features:
            disk = cloning.clone(
                call,
                self.backend,
                target,
                size,
                config=self.config,
                host=self.host,
                observers=self._observers,
            )
            if disk is not None:
                return disk
        return self._make(
            lambda: self._leases.hold(call, Use.DISK), target, size, require_fit=call.require_fit
        )

    def _make(
        self,
        hold: Callable[[], AbstractContextManager[lease.Lease]],
        target: str,
        size: int | None,
        *,
        require_fit: Callable[[int], None] = lambda _virtual_size: None,
    ) -> model.Disk:
        """Make a disk from a base that is held, over again should the base leave the cache meanwhile."""
        for _turn in range(_MOST_TURNS):
            with contextlib.suppress(lease.BaseVanished), hold() as held:
                require_fit(held.base.virtual_size)
                make = self.backend.copy if held.private else self.backend.create
                return make(held.base, target, size, confirm=held.confirm)
        raise errors.BackendError(
            "its base image left the cache each time a disk was made from it",
            path=self._cache.layout.base_path,
            next_step="find out what removes files from the cache",
        )

    def _reuse(self, call: Call, target: str, size: int | None, if_exists: str) -> model.Disk:
        if if_exists != "reuse":
            raise errors.DiskExistsError(
                "the target exists already",
                image=call.image_id,
                path=target,
                next_step='remove it, or ask with if_exists="reuse"',
            )
        disk = self.backend.inspect(target)
        if disk.format == "qcow2":
            # Whatever its header names: a guest may have written one into a disk whose format nobody pinned.
            self.ensure_backing(target, image_id=call.image_id, request=call.request)
        if size is not None and size > disk.virtual_size:
            return self.backend.resize(disk, size)
        return disk

    def create_swap(self, target: str, *, size_mb: int) -> model.Disk:
        """Make a swap disk of so many MiB, formatted.

        :param target: absolute path, or for rbd an image name.
        :raises DiskExistsError: the target exists.
        :raises NoSpaceError, BackendError, ConfigError: nothing is left behind.
        """
        return self._generate(generate.swap(size_mb, share=self._shares), target)

    def create_ephemeral(
        self,
        target: str,
        *,
        size_gb: int,
        os_type: str | None = None,
        fs: str | None = None,
        label: str | None = None,
    ) -> model.Disk:
        """Make an ephemeral disk of so many GiB, with an empty filesystem.

        :param target: absolute path, or for rbd an image name.
        :param os_type: the guest's type, which chooses the filesystem where ``fs`` does not: the operator's
            command for it, else ``default_ephemeral_format``, else ext4 for ``linux``, ntfs for ``windows``
            and vfat for others.
        :param fs: ext2, ext3, ext4, vfat, xfs or ntfs.
        :param label: the filesystem's label. None: ``ephemeral0``. Give each disk of a guest its own.
        :raises DiskExistsError: the target exists.
        :raises NoSpaceError, BackendError, ConfigError: nothing is left behind.
        """
        wanted = generate.ephemeral(
            size_gb, os_type=os_type, fs=fs, label=label, config=self.config, share=self._shares
        )
        return self._generate(wanted, target)

    @property
    def _shares(self) -> bool:
        return Feature.OVERLAY in self.backend.features

    def _generate(self, wanted: generate.Generation, target: str) -> model.Disk:
        self._start()
        self.backend.check_target(target)
        if self.backend.exists(target):
            raise errors.DiskExistsError("the target exists already", path=target, next_step="remove it")
        # Its bytes are wanted as they are: there is nothing to inspect in what is made here.
        hold = self._generated.hold if wanted.shared else self._generated.private
        return self._make(lambda: hold(wanted, Use.FILE), target, None)

    def fetch_file(self, image_id: str, path: str, *, request: model.Request | None = None) -> None:
        """Put an image's bytes, as they came, into a new file: a kernel, a ramdisk.

        :param path: absolute, in an existing directory.
        :raises DiskExistsError: the file exists.
        :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, BackendError: nothing is left behind.
        """
        call = self._begin(image_id, request)
        with call.named():
            atomic_file.check_target(path)
            atomic_file.check_absent(path)
        while True:
            with contextlib.suppress(lease.BaseVanished), self._leases.hold(call, Use.FILE) as held:
                assert held.base.fd is not None  # a held base is open
                with atomic_file.placing(path, self.host, held.confirm) as unfinished:
                    atomic_file.copy_content(held.base.fd, unfinished.fd)
                return

    @contextlib.contextmanager
    def fetch_or_reuse(
        self, image_id: str, *, request: model.Request | None = None
    ) -> Iterator[model.BaseImage]:
        """Lease a base image, for drivers that make their disks themselves.

        While the lease is held nobody evicts the base, as far as locks work. That it is still there is
        checked at the end.

        :raises LeaseLostError: at the end, if the base left the cache meanwhile: throw away what was made.
        :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, BackendError: at the start.
        """
        call = self._begin(image_id, request)
        # A private copy would be gone afterwards, and the driver may make an overlay.
        with self._leases.hold(call, Use.DISK, bypass=False) as held:
            yield held.base
            try:
                held.confirm()
            except lease.BaseVanished:
                raise errors.LeaseLostError(
                    "its base image left the cache while it was leased",
                    image=image_id,
                    path=held.base.path,
                    next_step="throw away what was made from it and start over",
                ) from None

    @contextlib.contextmanager
    def lease_cached(self, image_id: str) -> Iterator[model.BaseImage]:
        """Lease a base image if it is in the cache and serves: nothing is fetched for it.

        :raises ImageNotFound: it is not there, or does not serve.
        """
        call = self._begin(image_id, None)
        with self._leases.hold_cached(call, Use.DISK) as held:
            yield held.base

    def ensure_backing(
        self, disk_path: str, *, image_id: str | None = None, request: model.Request | None = None
    ) -> model.BaseImage | None:
        """Make sure of the base of an overlay that came from another host, before it is started.

        Makes exactly the name and the format that the overlay's header embeds, if that is this image's
        base in this cache; a header that says anything else is refused, since a guest may have written it.

        :param image_id: the image that the disk was made from. None: :meth:`create_swap` or
            :meth:`create_ephemeral` made it, and its base is made anew, byte for byte.
        :returns: the base, or None if the disk stands alone.
        :raises BackendError: the header names something else; or the base that is here has another format, or
            another filesystem than the disk was made on; or nobody knows how an ephemeral base was made; or
            the disk is outside every disk root, where no pass would see that it needs its base.
        """
        if self.inspect_disk(disk_path).format != "qcow2":
            return None  # whatever header its guest wrote into it
        wanted = backing.wanted(disk_path, image_id, self._cache.layout)
        if wanted is None:
            return None
        disk_roots.check_seen(disk_path, self.config)
        with self._hold_backing(wanted, disk_path, image_id, request) as held:
            if image_id is None and held.base.fd is not None:
                backing.check_made_on(disk_path, held.base.fd)
            return dataclasses.replace(held.base, fd=None)

    def _hold_backing(
        self, wanted: backing.Backing, disk_path: str, image_id: str | None, request: model.Request | None
    ) -> AbstractContextManager[lease.Lease]:
        if image_id is not None:
            call = self._begin(image_id, request, stored_format=wanted.format)
            return self._leases.hold(call, Use.DISK, bypass=False)
        self._start()
        generation = generate.for_overlay(
            wanted.name, wanted.format, disk_size=wanted.disk_size, disk_path=disk_path
        )
        return self._generated.hold(generation, Use.FILE, bypass=False)

    def inspect_disk(self, target: str) -> model.Disk:
        """Return what an existing disk is: its format, its size, and the base it needs.

        :param target: absolute path, or for rbd an image name.
        :raises BackendError: there is none, or it cannot be read.
        """
        return self.backend.inspect(target)

    def resize_disk(self, disk: model.Disk, size: int) -> model.Disk:
        """Grow a disk to ``size`` bytes. It is never shrunk.

        :raises DiskTooSmallError, NoSpaceError, BackendError: the disk is as it was.
        """
        return self.backend.resize(disk, size)

    def flatten_disk(self, disk: model.Disk) -> model.Disk:
        """Cut a disk loose from its base image.

        :raises NoSpaceError, BackendError: the disk still needs its base.
        """
        return self.backend.flatten(disk)

    def remove_disk(self, disk: model.Disk) -> None:
        """Remove a disk. One that is gone is fine.

        :raises BackendError: the storage failed.
        """
        self.backend.remove(disk)

    # -- operators -----------------------------------------------------------------------------------

    def cache_image(
        self, image_id: str, *, pin_until: float | None = None, request: model.Request | None = None
    ) -> model.CacheResult:
        """Have an image in the cache before anybody needs it.

        :param pin_until: epoch seconds until which it stays even if nobody uses it.
        :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, BackendError: it is not cached.
        """
        call = self._begin(image_id, request)
        if Feature.CLONE in self.backend.features:
            return model.CacheResult.NOT_NEEDED
        pin, earlier = pins.Pin(_PRECACHE, pin_until), None
        if pin_until is not None:
            # The pin comes first: between a look and a pin the base could go.
            earlier = pins.add(self._cache, call.name, image_id, pin)
        try:
            with self._leases.hold(call, Use.DISK, bypass=False) as held:
                return model.CacheResult.CACHED if held.fetched else model.CacheResult.EXISTING
        except BaseException:
            if pin_until is not None:
                pins.take_back(self._cache, call.name, image_id, pin, earlier)
            raise

    def is_cached(self, image_id: str) -> bool:
        """Whether a disk could be made from the image without fetching it.

        True too for a base that nobody has checked yet, which is checked before its first use.
        """
        call = self._begin(image_id, None, stored_format=self.backend.base_format)
        with call.named():
            return self._leases.has(call, Use.DISK)

    def describe_image(self, image_id: str, *, request: model.Request | None = None) -> model.Image:
        """Return what the source says of an image.

        :raises ImageNotFound, ImageRejected, SourceError: as for fetching it.
        """
        return self._begin(image_id, request).describe()[1]

    def verify_base_images(
        self, instances: Iterable[model.Instance] | None, *, dry_run: bool = False
    ) -> verify.VerifyReport:
        """Remove base images that no instance uses and that are old enough. Call it periodically.

        :param instances: all instances on this host; on shared storage those of all hosts that share it.
            None: the driver could not tell; then everything stays.
        :param dry_run: change nothing, and report what would be done.
        :raises ConfigError, BackendError: the cache itself cannot be read.
        """
        self._start()
        report = self._upkeep.verify(instances, dry_run=dry_run)
        if not dry_run:
            self._sweep_disks()
            self._observers(report.as_event())
        return report

    def _sweep_disks(self) -> None:
        try:
            removed = self.backend.sweep()
        except errors.ImageCacheError as error:
            LOG.warning("Unfinished disks are not removed: %s", error)
            return
        for name in removed:
            self._observers(events.Recovered(name, what="an unfinished disk is removed"))

    def scrub(
        self,
        image_ids: Collection[str] | None = None,
        *,
        rate: int | None = None,
        cancel: model.CancelToken | None = None,
    ) -> ScrubReport:
        """Re-read cached images past the page cache, and compare them with checksums taken in flight.

        A damaged base that nobody uses is evicted, and fetched again when it is wanted. One that is in use
        is reported and never replaced; new requests are served around it. Reading is slow and polite; call
        it now and then, as often as the rate allows, or let the command do it.

        :param image_ids: ids of images, or names of bases. None: all, the longest unchecked first.
        :param rate: bytes per second. None: ``scrub_rate``. 0: no limit.
        :param cancel: once set, it ends with what was found so far; the next one goes on from there.
        :raises ConfigError, BackendError: the cache itself cannot be read.
        """
        names = None
        if image_ids is not None:
            names = {catalog.name_of(self._cache, image_id) for image_id in image_ids}
        self._start()
        limit = self.config.scrub_rate if rate is None else rate
        with translated(self.config.base_path):
            return self._upkeep.scrub(rate=limit or None, names=names, cancel=cancel)

    def pin(self, image_id: str, *, owner: str, expires: float | None = None) -> None:
        """Keep an image's base, whether it is in the cache yet or not.

        :param owner: who wants it; an owner has one pin on an image at most.
        :param expires: epoch seconds. None: until :meth:`unpin`.
        """
        name = layout.base_name(image_id)
        self._start()
        pins.add(self._cache, name, image_id, pins.Pin(owner, expires))

    def unpin(self, image_id: str, *, owner: str) -> bool:
        """Take an owner's pin away. True: there was one."""
        name = layout.base_name(image_id)
        self._start()
        return pins.remove(self._cache, name, image_id, owner)

    def evict_image(self, image_id: str) -> None:
        """Remove an image's base now, whatever its age, if nobody needs it. One that is absent is fine.

        :param image_id: an image's, or the name of a base, for those that have no image.
        :raises BackendError: somebody needs it, or that cannot be told; the cause says who or why.
        """
        name = catalog.name_of(self._cache, image_id)
        self._start()
        stays = self._upkeep.evict_one(name, "asked for")
        if isinstance(stays, Kept):
            raise errors.BackendError(
                f"its base image stays: {stays.reason}",
                image=image_id,
                path=self._cache.layout.base(name),
                next_step="ask again when nobody needs it",
            )

    def list_bases(self) -> tuple[catalog.CachedBase, ...]:
        """Return every base image in the cache, sorted by name, with its evidence and its pins."""
        with translated(self.config.base_path):
            return catalog.listed(self._cache)

    def show_base(self, image_id: str) -> catalog.CachedBase | None:
        """Return an image's base. None: it is not in the cache.

        :param image_id: an image's, or the name of a base.
        """
        name = catalog.name_of(self._cache, image_id)
        return next((base for base in self.list_bases() if base.name == name), None)

    def explain(self, image_id: str, instances: Iterable[model.Instance] | None) -> verify.Explanation | None:
        """Say what :meth:`verify_base_images` would do with a base now, and why. None: it is not there.

        :param image_id: an image's, or the name of a base.
        :param instances: as for :meth:`verify_base_images`.
        """
        self._start()
        with translated(self.config.base_path):
            return self._upkeep.explain(catalog.name_of(self._cache, image_id), instances)

    def list_hosts(self) -> tuple[catalog.RegisteredHost, ...]:
        """Return the hosts that share the cache. Nothing is unlinked before all of them agree."""
        self._start()
        with translated(self.config.base_path):
            return catalog.registered(self._cache, self._upkeep.hosts)

    def forget_host(self, host_id: str) -> None:
        """Stop waiting for a host that is gone for good. One that lives registers anew, and this one stays.

        :raises ConfigError: there is no such host.
        """
        self._start()
        with translated(self.config.base_path):
            self._upkeep.hosts.forget(host_id)

    def forget_disks(self, path: str) -> int:
        """Say that what the passes of this host saw at a path and below it is gone for good.

        A disk that was seen and is not to be seen any more keeps its base image until that it was removed is
        proved. This is the operator's word for it. What is there is seen again by the next pass.

        :param path: of a disk, a directory or a disk root.
        :returns: how many disks are forgotten.
        :raises NoSpaceError, BackendError: that cannot be written down.
        """
        self._start()
        with translated(self.config.base_path):
            return self._upkeep.forget_disks(path)

    def preflight(self) -> list[preflight.Finding]:
        """Look for what is wrong with this host's set-up, the worst first. Changes nothing."""
        return preflight.examine(self._cache, self.backend)

    def audit(self, instances: Iterable[model.Instance] | None = None) -> audit.AuditReport:
        """Look for what does not fit together in disks and base images. Changes nothing, and makes nothing.

        :param instances: as for :meth:`verify_base_images`. None: only the disks are known.
        :raises ConfigError, BackendError: the cache itself cannot be read.
        """
        with translated(self.config.base_path):
            return audit.examine(self._cache, None if instances is None else tuple(instances))

    def get_disk_usage(self) -> int:
        """Return the bytes the cache has allocated on the instances filesystem, stage and trash included.

        0 if the cache is on another filesystem than the instances.
        """
        with translated(self.config.base_path):
            return inventory.disk_usage(self._cache)

    def get_space(self) -> SpaceReport:
        """Return how full the cache's filesystem is, what is promised, and what would give way.

        Reads who refers to what, as a pass does, and changes nothing.

        :raises ConfigError, BackendError: the cache itself cannot be read.
        """
        self._start()
        with translated(self.config.base_path):
            return self._upkeep.space()

    # -- beginning -----------------------------------------------------------------------------------

    def _begin(
        self,
        image_id: str,
        request: model.Request | None,
        *,
        stored_format: str | None = None,
        size: int | None = None,
    ) -> Call:
        call = Call(
            image_id,
            request or model.Request(),
            source=self.source,
            config=self.config,
            host=self.host,
            stored_format=stored_format,
            size=size,
        )
        self._start()
        return call

    def _start(self) -> None:
        if self._started:
            return
        with self._starting:
            if not self._started:
                self._cache.start()
                with translated(self.config.base_path):
                    self._upkeep.begin()
                self._started = True


def _certificates_of(config: CacheConfig) -> certificates.CertificateStore | None:
    if config.certificates_path is None:
        return None
    return certificates.DirectoryCertificates(config.certificates_path)
