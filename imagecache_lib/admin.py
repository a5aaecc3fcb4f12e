# SPDX-License-Identifier: Apache-2.0
"""What an operator asks of a cache, which needs no image source: looking, keeping, evicting, checking."""

from __future__ import annotations

import os
import typing
from collections.abc import Collection, Iterable

from imagecache_lib import errors, events, model
from imagecache_lib.config import CacheConfig
from imagecache_lib.diagnostics import catalog
from imagecache_lib.observers.log import LogObserver
from imagecache_lib.store import history, layout, pins
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.history import Happening, HistoryObserver
from imagecache_lib.system import arguments, threads
from imagecache_lib.system.host import System
from imagecache_lib.system.translate import translated
from imagecache_lib.upkeep import inventory

if typing.TYPE_CHECKING:
    from imagecache_lib.backends.interface import StorageBackend
    from imagecache_lib.diagnostics import audit, preflight, survey
    from imagecache_lib.upkeep.make_room import SpaceReport
    from imagecache_lib.upkeep.report import Explanation, VerifyReport
    from imagecache_lib.upkeep.scrub import ScrubReport
    from imagecache_lib.upkeep.verify import Upkeep


class CacheAdmin:
    """The image cache of one host as its operator sees it. Safe to share between threads.

    The constructor changes nothing on disk. The first call makes what the cache lacks, and repairs what a
    crash left. What a call needs is loaded when it is called: a command that lists images neither evicts nor
    makes disks.

    :param config: how to cache.
    :param backend: a storage backend, or the name of one, or None for the one that the configuration names.
    :param host: clock, sleep, host name and the like; the default is this machine's.
    :param observers: called with what happens. With None only a
        :class:`~imagecache_lib.observers.log.LogObserver` is.
    """

    def __init__(
        self,
        config: CacheConfig,
        backend: StorageBackend | str | None = None,
        *,
        host: System | None = None,
        observers: Iterable[events.Observer] | None = None,
    ) -> None:
        self.config = config
        self.host = host or System()
        self._wanted_backend = backend or config.backend
        told = [LogObserver()] if observers is None else observers
        self._cache = CacheStore(config, self.host)
        self._cache.observers = events.Observers([HistoryObserver(self._cache), *told])
        # An observer that is told what a crash left may call this very object.
        self._starting = threads.lock()
        self._starting_in = 0
        self._started = False
        self._backend: StorageBackend | None = None
        self._made_upkeep: Upkeep | None = None

    # A cached property has a lock, which a forked child may find held.

    @property
    def backend(self) -> StorageBackend:
        """The storage backend, which is loaded when it is first asked for.

        :raises ConfigError: it is unknown, or its configuration cannot work.
        """
        from imagecache_lib.backends import load_backend

        if not isinstance(self._wanted_backend, str):
            return self._wanted_backend
        if self._backend is None:
            self._backend = load_backend(self._wanted_backend, self.config, self.host)
        return self._backend

    @property
    def _upkeep(self) -> Upkeep:
        # All that it keeps is on disk: it does no harm if two threads make one each, and one is left.
        from imagecache_lib.upkeep.verify import Upkeep

        if self._made_upkeep is None:
            self._made_upkeep = Upkeep(self._cache)
        return self._made_upkeep

    # -- what is there -------------------------------------------------------------------------------

    def list_bases(self) -> tuple[catalog.CachedBase, ...]:
        """Return every base image in the cache, sorted by name, with its evidence and its pins.

        :raises ConfigError: the instances directory is not there.
        :raises BackendError: the cache cannot be read.
        """
        self._require_instances()
        with translated(self.config.base_path):
            return catalog.listed(self._cache)

    def survey(self, instances: Iterable[model.Instance] | None = None) -> survey.Survey:
        """Look at the whole cache: the state of each base image, and where the space went. Changes nothing.

        :param instances: as for :meth:`ImageCacheManager.verify_base_images`. None: as the driver last
            reported them.
        :raises ConfigError: the instances directory is not there.
        :raises BackendError: the cache cannot be read.
        """
        from imagecache_lib.diagnostics import survey

        self._require_instances()
        reported = None if instances is None else model.reported(instances)
        with translated(self.config.base_path):
            return survey.take(self._cache, *self._upkeep.reader_now(reported))

    def list_pins(self) -> tuple[catalog.PinnedImage, ...]:
        """Return every pin, whether its image is in the cache or not."""
        with translated(self.config.base_path):
            return catalog.all_pins(self._cache)

    def show_base(self, image_id: str) -> catalog.CachedBase | None:
        """Return an image's base, with its evidence and its pins, or None if it is not in the cache.

        :param image_id: an image's, or the name of a base.
        """
        name = catalog.name_of(self._cache, image_id)
        return next((base for base in self.list_bases() if base.name == name), None)

    def explain(self, image_id: str, instances: Iterable[model.Instance] | None) -> Explanation | None:
        """Return what :meth:`ImageCacheManager.verify_base_images` would do with a base now, and why.

        Returns None if the base is not in the cache.

        :param image_id: an image's, or the name of a base.
        :param instances: as for :meth:`ImageCacheManager.verify_base_images`.
        """
        self._start()
        reported = None if instances is None else model.reported(instances)
        with translated(self.config.base_path):
            return self._upkeep.explain(catalog.name_of(self._cache, image_id), reported)

    def history(self, image_id: str) -> tuple[Happening, ...]:
        """Return what happened to an image's base on all hosts that share the cache, the oldest first.

        It is kept for ``history_age_seconds``, whether the base is still there or not.

        :param image_id: an image's, or the name of a base.
        :raises ConfigError: the instances directory is not there.
        :raises BackendError: the cache cannot be read.
        """
        self._require_instances()
        with translated(self.config.base_path):
            return tuple(history.read(self._cache, catalog.named(image_id)))

    def list_hosts(self) -> tuple[catalog.RegisteredHost, ...]:
        """Return the hosts that share the cache. Nothing is unlinked before all of them agree."""
        self._start()
        with translated(self.config.base_path):
            return catalog.registered(self._cache, self._upkeep.hosts)

    def forget_host(self, host_id: str) -> None:
        """Stop waiting for a host that is gone for good.

        A host that still runs registers anew. This host itself stays a member.

        :raises ConfigError: there is no such host.
        """
        self._start()
        with translated(self.config.base_path):
            self._upkeep.hosts.forget(host_id)

    def forget_disks(self, path: str) -> int:
        """Forget the disks that the passes of this host saw at a path and below it: they are gone for good.

        A disk that a pass saw, and that no pass sees any more, keeps its base image until there is proof that
        it was removed. This call is the operator's word for that. The next pass sees again what is there.

        :param path: absolute, of a disk, a directory or a disk root.
        :returns: how many disks are forgotten.
        :raises ConfigError: the path is not absolute: an empty one would mean all disks.
        :raises NoSpaceError, BackendError: that cannot be written down.
        """
        if not isinstance(path, str) or not os.path.isabs(path):
            raise errors.ConfigError(
                f"{errors.shown(path)} is no absolute path of disks to forget",
                next_step="name the disk, the directory or the disk root as the problem names it",
            )
        self._start()
        with translated(self.config.base_path):
            return self._upkeep.forget_disks(path)

    # -- what stays and what goes --------------------------------------------------------------------

    def pin(self, image_id: str, *, owner: str, expires: float | None = None) -> None:
        """Pin an image: its base is not evicted, whether it is in the cache already or comes later.

        :param owner: of the pin; an owner has one pin on an image at most.
        :param expires: epoch seconds, or None to keep the pin until :meth:`unpin`.
        :raises ConfigError: the owner is no text, or the end no number.
        """
        name = layout.base_name(image_id)
        self._start()
        pins.add(self._cache, name, image_id, pins.Pin(owner, expires))

    def unpin(self, image_id: str, *, owner: str) -> bool:
        """Take an owner's pin away. Returns whether there was one."""
        name = layout.base_name(image_id)
        self._start()
        return pins.remove(self._cache, name, image_id, owner)

    def prune(
        self,
        instances: Iterable[model.Instance] | None = None,
        *,
        older_than: float = 0.0,
        until_free: int = 0,
        dry_run: bool = False,
    ) -> VerifyReport:
        """Remove base images that nothing needs before they reach their age, to make room now.

        What is leased, pinned, referred to, or was used within ``space_minimum_age_seconds`` stays.

        :param instances: as for :meth:`ImageCacheManager.verify_base_images`. None: as the driver last
            reported them; an instance that was never reported and has no disk yet loses nothing but time.
        :param older_than: seconds since its last use for which a base image stays.
        :param until_free: stop when so many bytes of the filesystem are free, the least recently used first.
            0: everything goes that may.
        :param dry_run: change nothing, and report what would be done.
        :raises ConfigError, BackendError: the cache itself cannot be read.
        """
        arguments.require_number("older_than", older_than)
        arguments.require_number("until_free", until_free, whole=True)
        self._start()
        reported = None if instances is None else model.reported(instances)
        return self._upkeep.prune(reported, older_than=older_than, until_free=until_free, dry_run=dry_run)

    def evict_image(self, image_id: str) -> None:
        """Remove an image's base now, whatever its age, if nothing needs it.

        Does nothing if the base is not in the cache.

        :param image_id: an image's, or the name of a base, for those that have no image.
        :raises BaseInUseError: something needs the base, or that cannot be told; the cause says what or why.
        """
        from imagecache_lib.upkeep.outcomes import Kept

        name = catalog.name_of(self._cache, image_id)
        self._start()
        stays = self._upkeep.evict_one(name, "asked for")
        if isinstance(stays, Kept):
            raise errors.BaseInUseError(
                f"its base image stays: {stays.reason}",
                image=image_id,
                path=self._cache.layout.base(name),
                next_step="ask again when nothing needs it",
            )

    def scrub(
        self,
        image_ids: Collection[str] | None = None,
        *,
        rate: int | None = None,
        cancel: model.CancelToken | None = None,
    ) -> ScrubReport:
        """Re-read cached images past the page cache, and compare them with checksums taken in flight.

        A damaged base that nothing uses is evicted, and fetched again when it is wanted. One that is in use
        is reported and never replaced; new requests are served around it. Reading is slow and polite; call
        this now and then, as often as the rate allows, or let the command do it.

        :param image_ids: ids of images, or names of bases; or None for all, the longest unchecked first.
        :param rate: bytes per second, or None for ``scrub_rate``, or 0 for no limit.
        :param cancel: once set, the scrub ends with what it found so far; the next one goes on from there.
        :raises ConfigError, BackendError: the cache itself cannot be read.
        """
        names = None
        arguments.require_token(cancel)
        if rate is not None:
            arguments.require_number("rate", rate)
        if image_ids is not None:
            arguments.require_several("image_ids", image_ids)
            names = {catalog.name_of(self._cache, image_id) for image_id in image_ids}
        self._start()
        limit = self.config.scrub_rate if rate is None else rate
        with translated(self.config.base_path):
            return self._upkeep.scrub(rate=limit or None, names=names, cancel=cancel)

    # -- how it does ---------------------------------------------------------------------------------

    def preflight(self) -> list[preflight.Finding]:
        """Return what is wrong with this host's set-up, the worst first. Changes nothing."""
        from imagecache_lib.diagnostics import preflight

        return preflight.examine(self._cache, self.backend)

    def audit(self, instances: Iterable[model.Instance] | None = None) -> audit.AuditReport:
        """Report what does not fit together in disks and base images. Changes nothing, and makes nothing.

        :param instances: as for :meth:`ImageCacheManager.verify_base_images`, or None if only the disks are
            known.
        :raises ConfigError, BackendError: the cache itself cannot be read.
        """
        from imagecache_lib.diagnostics import audit

        reported = None if instances is None else model.reported(instances)
        with translated(self.config.base_path):
            return audit.examine(self._cache, reported)

    def get_disk_usage(self) -> int:
        """Return the bytes the cache has allocated on the instances filesystem, stage and trash included.

        Returns 0 if the cache is on another filesystem than the instances.

        :raises BackendError: the cache cannot be read.
        """
        with translated(self.config.base_path):
            return inventory.disk_usage(self._cache)

    def get_space(self) -> SpaceReport:
        """Return how full the cache's filesystem is, what is promised, and what would give way, in bytes.

        Reads which disks and instances refer to which bases, as a pass does, and changes nothing.

        :raises ConfigError, BackendError: the cache itself cannot be read.
        """
        self._start()
        with translated(self.config.base_path):
            return self._upkeep.space()

    def _require_instances(self) -> None:
        if not os.path.isdir(self.config.instances_path):
            raise errors.ConfigError(
                "the instances directory does not exist",
                path=self.config.instances_path,
                next_step="correct instances_path, or create or mount the directory, owned by the "
                "service's user",
            )

    def _start(self) -> None:
        """Make what is missing and repair what a crash left: the first time, and if the cache was removed."""
        if self._started and self._cache.is_prepared():
            return
        with self._starting:
            self._started = self._started and self._cache.is_prepared()
            if self._started or self._starting_in == os.getpid():
                return
            self._starting_in = os.getpid()  # a child that is forked meanwhile starts for itself
            try:
                with translated(self.config.base_path):
                    self._cache.start()
                    self._upkeep.begin()
                self._started = True
            finally:
                self._starting_in = 0
