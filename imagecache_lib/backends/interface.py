# SPDX-License-Identifier: Apache-2.0
"""What disks are made of: the interface that a driver's storage implements.

A backend turns a base image into an instance disk and knows its own disks afterwards. It never decides
which base image, when, or whether one may go: that is the manager's.
"""

from __future__ import annotations

import abc
import enum
from contextlib import AbstractContextManager
from typing import ClassVar

from imagecache_lib import errors, model
from imagecache_lib.config import CacheConfig
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter


class Feature(enum.Enum):
    """What a backend may declare beyond the basics."""

    #: :meth:`StorageBackend.clone` makes disks inside the image service's own storage.
    CLONE = "clone"
    #: Disks refer to their base image for as long as they live.
    OVERLAY = "overlay"
    #: :meth:`StorageBackend.resize`.
    RESIZE = "resize"
    #: :meth:`StorageBackend.flatten` does something: disks can be cut loose from their base.
    FLATTEN = "flatten"


class CannotClone(errors.BackendError):
    """The image cannot be cloned inside the storage; the cause says why. It can be fetched instead.

    :param store: name of the image service's store that would make cloning possible if it had the image, or
        None if no store would.
    """

    def __init__(self, cause: str, *, store: str | None = None, **known: str | None) -> None:
        super().__init__(cause, **known)
        self.store = store


def whole_sectors(size: int) -> int:
    """Round up to sectors of 512 bytes: no guest sees less, and qemu refuses other sizes for most formats."""
    return -(-size // 512) * 512


class PendingDisk(abc.ABC):
    """A disk that is complete and durable, and that nothing can find under its target yet."""

    @abc.abstractmethod
    def commit(self) -> model.Disk:
        """Give the disk its name, in one step, and return what it is. Call it once at most.

        :raises DiskExistsError: another disk has the name.
        :raises NoSpaceError, BackendError: the storage failed. The disk does not have its name.
        """


class StorageBackend(abc.ABC):
    """How instance disks are stored. Safe to share between threads.

    Targets are what the backend names disks by: absolute paths here, image names for rbd. A disk gets its
    name in one step, when it is complete and durable, and never over an existing one: ::

        with backend.prepare(base, target, size) as pending:
            if the base is still in the cache:
                disk = pending.commit()
    """

    #: Name under which the configuration and the entry point know it.
    name: ClassVar[str]
    #: What it can do beyond the basics.
    features: ClassVar[frozenset[Feature]] = frozenset()
    #: qemu's name of the only format that its base images may have, or None if they may have any.
    base_format: ClassVar[str | None] = None

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: CacheConfig, host: System) -> StorageBackend:
        """Make one from the configuration, without touching the storage yet.

        :raises ConfigError: the configuration lacks something it needs.
        """

    def for_caller(self, waiter: Waiter) -> StorageBackend:
        """Return this backend as one caller uses it: its long work ends once the caller no longer waits.

        What is interrupted raises what :meth:`Waiter.check` raises. A disk in the making leaves nothing then,
        and one that exists is whole. The default returns the backend itself, which is right where nothing
        takes long, or nothing can be interrupted.

        :param waiter: the caller of the library, with its deadline and its token.
        """
        return self

    @abc.abstractmethod
    def check_target(self, target: str) -> None:
        """Refuse a target that cannot work, before anything is fetched for it.

        A backend whose disks refer to their base must refuse places that no reference source of the cache
        looks at: the base would be evicted under such a disk.

        :raises BackendError: not a name this backend can use, or its directory is missing or read-only.
        """

    @abc.abstractmethod
    def exists(self, target: str) -> bool:
        """Whether anything has that name."""

    @abc.abstractmethod
    def inspect(self, target: str) -> model.Disk:
        """Return what the existing disk is.

        :raises BackendError: there is no such disk, or it cannot be read.
        """

    @abc.abstractmethod
    def prepare_standalone(
        self, base: model.BaseImage, target: str, size: int | None
    ) -> AbstractContextManager[PendingDisk]:
        """Make a disk that stands alone, the base's content grown to ``size``, without its name yet.

        The context manager yields a :class:`PendingDisk`, which is complete and durable. The caller looks
        whether the base is still in the cache, and commits or does not. A body that ends without a commit,
        by whatever exception, leaves nothing.

        :param base: a base image that is held: its descriptor is open.
        :param size: virtual size wanted, in bytes, at least the base's; or None for the base's own size.
        :raises DiskExistsError: the target exists. It may be raised by the commit instead.
        :raises NoSpaceError: there is no room.
        :raises BackendError: the storage failed.
        """

    def prepare(
        self, base: model.BaseImage, target: str, size: int | None
    ) -> AbstractContextManager[PendingDisk]:
        """Make a disk in the backend's own way, which may go on referring to the base, without its name yet.

        As :meth:`prepare_standalone`, which is the default.
        """
        return self.prepare_standalone(base, target, size)

    def ensure_durable(self, target: str) -> bool:
        """Make an existing disk's content durable before the disk is used again.

        Returns False if a crash may have taken the content since the disk was made. The default is right
        where the content is durable before the disk gets its name.

        :raises BackendError: the storage failed.
        """
        return True

    def check_content(self, target: str, base: str | None) -> None:  # noqa: B027 - checking is optional
        """Refuse to use an existing disk again whose content is plainly not all there.

        The default checks nothing.

        :param base: the path of the raw base image of the disk's image, or None if the cache has none.
        :raises BackendError: it is cut off, or lost its content; or the storage failed.
        """

    def clone(self, image: model.Image, target: str, size: int | None) -> model.Disk:
        """Make a disk from the image service's own storage, without fetching, and return it.

        :raises CannotClone: not this image, or not this backend; the cause says why.
        :raises DiskTooSmallError: ``size`` is below the image's virtual size.
        :raises DiskExistsError: the target exists.
        :raises BackendError: the storage failed.
        """
        raise CannotClone(f"the {self.name} backend does not clone", image=image.id)

    @abc.abstractmethod
    def resize(self, disk: model.Disk, size: int) -> model.Disk:
        """Grow the disk to ``size`` bytes, and return what it is now. A disk of that size stays as it is.

        :raises DiskTooSmallError: it would shrink.
        :raises NoSpaceError: no room.
        :raises BackendError: the storage failed.
        :raises CancelledError, LockTimeoutError: the caller no longer waits (:meth:`for_caller`).
        """

    def flatten(self, disk: model.Disk) -> model.Disk:
        """Cut the disk loose from its base image, and return what it is now.

        The default is right for disks that stand alone.

        :raises BackendError: the storage failed; the disk still needs its base.
        :raises CancelledError, LockTimeoutError: the caller no longer waits (:meth:`for_caller`).
        """
        return disk

    @abc.abstractmethod
    def remove(self, disk: model.Disk) -> None:
        """Remove the disk. One that is gone is fine.

        :raises BackendError: the storage failed.
        """

    def sweep(self) -> list[str]:
        """Remove what crashes left of disks in the making, and return the names of what was removed.

        Called with each periodic pass. The default is right for disks that are files: the cache sweeps the
        instance directories itself.

        :raises BackendError: the storage failed.
        """
        return []

    def preflight(self) -> list[str]:
        """Return what is wrong with the storage's set-up, a sentence each with what to do."""
        return []
