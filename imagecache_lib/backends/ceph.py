# SPDX-License-Identifier: Apache-2.0
"""The little of a Ceph cluster that the rbd backend needs, as an interface.

:mod:`imagecache_lib.backends.librbd` has the real one, and :mod:`imagecache_lib.testing.ceph` one in memory
that behaves the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Generator, Iterable
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.system.waiter import Waiter


class Missing(errors.BackendError):
    """There is no such pool, image or snapshot."""


class Busy(errors.BackendError):
    """The image or snapshot is in use: open for writing, protected, or the parent of a clone."""


class Denied(errors.BackendError):
    """The Ceph user may not do that."""


class Unprotected(errors.BackendError):
    """The snapshot is not protected, and this cluster clones from protected ones only."""


@dataclasses.dataclass(frozen=True)
class RbdName:
    """An image in a pool, or one of its snapshots."""

    pool: str
    image: str
    snapshot: str | None = None

    def __str__(self) -> str:
        return f"{self.pool}/{self.image}" + (f"@{self.snapshot}" if self.snapshot is not None else "")


@dataclasses.dataclass(frozen=True)
class RbdImage:
    """What the cluster says of an image.

    :param size: bytes.
    :param parent: the snapshot that it was cloned from and still needs.
    :param touched: when it was made or last written, in epoch seconds of the cluster's clock, by the minute.
    """

    size: int
    parent: RbdName | None
    touched: float


class CephCluster(Protocol):
    """One cluster, as one user sees it. Safe to share between threads.

    Every method raises :class:`Missing` for what is not there, :class:`Denied` for what the user may not do,
    :class:`~imagecache_lib.errors.NoSpaceError` when a pool is full, and
    :class:`~imagecache_lib.errors.BackendError` when the cluster fails or does not answer. Errors carry the
    image's name.
    """

    def fsid(self) -> str:
        """Return the cluster's id."""

    def names(self, pool: str) -> list[str]:
        """Return the names of all images in a pool."""

    def stat(self, name: RbdName) -> RbdImage:
        """Open an image or snapshot for reading, and return what it is."""

    def chunks(self, name: RbdName, offset: int = 0) -> Generator[bytes]:
        """Yield the content of an image or snapshot from a byte offset.

        It is open until the generator ends or is closed.
        """

    def create(self, name: RbdName, size: int) -> None:
        """Make an empty image of ``size`` bytes.

        :raises DiskExistsError: the pool has an image of that name.
        """

    def fill(self, name: RbdName, chunks: Iterable[tuple[int, bytes]]) -> None:
        """Write data at byte offsets; all of it is durable on return."""

    def clone(self, snapshot: RbdName, name: RbdName) -> None:
        """Make an image whose content is a snapshot's, without copying.

        :raises Unprotected: the snapshot is not protected, and this cluster demands that.
        :raises DiskExistsError: the pool has an image of that name.
        """

    def resize(self, name: RbdName, size: int) -> None:
        """Change the size of an image to ``size`` bytes."""

    def flatten(self, name: RbdName, waiter: Waiter | None = None) -> None:
        """Copy into a clone what its parent has, and forget the parent. An image without one is fine.

        :param waiter: asked now and then whether the caller still waits. What it raises is raised; the image
            then still has its parent.
        """

    def rename(self, name: RbdName, new: str) -> None:
        """Give a closed image another name in its pool. Of several that want one name at once, one gets it.

        :raises DiskExistsError: another image has the new name; this image keeps its own.
        """

    def mend_names(self, pool: str, names: re.Pattern[str], before: float) -> None:
        """Give back their old names to images that a crash left without one in the middle of a rename.

        :param names: only those whose old name is like this.
        :param before: only those whose rename began before this, in epoch seconds.
        """

    def remove(self, name: RbdName) -> None:
        """Remove an image.

        :raises Busy: the image is open for writing, or has snapshots.
        """
