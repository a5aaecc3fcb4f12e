# SPDX-License-Identifier: Apache-2.0
"""A Ceph cluster in memory: pools, images, snapshots and clones, with the errors of the real one."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator

from imagecache_lib import errors
from imagecache_lib.backends import ceph
from imagecache_lib.backends.ceph import RbdName
from imagecache_lib.system.waiter import Waiter


@dataclasses.dataclass
class _Snapshot:
    content: bytes
    protected: bool


@dataclasses.dataclass
class _Image:
    content: bytearray
    parent: RbdName | None
    touched: float
    snapshots: dict[str, _Snapshot] = dataclasses.field(default_factory=dict)
    open_for_writing: int = 0


class FakeCluster:
    """A :class:`~imagecache_lib.backends.ceph.CephCluster` for tests. Safe to share between threads.

    :param fsid: the cluster's id.
    :param pools: names of its pools.
    :param clock: returns epoch seconds, for the times at which images were touched.
    """

    def __init__(
        self,
        fsid: str = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee",
        *,
        pools: Iterable[str] = ("images", "vms"),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._fsid = fsid
        self._clock = clock
        self._lock = threading.RLock()
        self._pools: dict[str, dict[str, _Image]] = {pool: {} for pool in pools}
        #: Pools that the user may not read.
        self.forbidden: set[str] = set()
        #: Bytes that :meth:`chunks` yields at once.
        self.chunk = 2**16
        #: Set it to let every write fail for want of room.
        self.is_full = False
        #: Set it to let every call fail as if the monitors did not answer.
        self.is_down = False

    # -- what the backend uses -----------------------------------------------------------------------

    def fsid(self) -> str:
        self._answer("the cluster")
        return self._fsid

    def names(self, pool: str) -> list[str]:
        with self._lock:
            return sorted(self._pool(pool, f"pool {pool}"))

    def stat(self, name: RbdName) -> ceph.RbdImage:
        with self._lock:
            image = self._image(name)
            size = len(self._content(name))
            return ceph.RbdImage(size, image.parent, image.touched)

    def chunks(self, name: RbdName, offset: int = 0) -> Generator[bytes]:
        size = self.stat(name).size
        while offset < size:
            self._answer(str(name))
            data = self.read(name, offset, self.chunk)
            yield data
            offset += len(data)

    def create(self, name: RbdName, size: int) -> None:
        with self._lock:
            self._add(name, _Image(bytearray(size), None, self._clock()))

    def fill(self, name: RbdName, chunks: Iterable[tuple[int, bytes]]) -> None:
        with self.opened(name):
            for offset, data in chunks:
                self.write(name, offset, data)

    def clone(self, snapshot: RbdName, name: RbdName) -> None:
        with self._lock:
            self._pool(name.pool, str(name))
            content = self._content(snapshot)
            if snapshot.snapshot is None or not self._image(snapshot).snapshots[snapshot.snapshot].protected:
                raise ceph.Unprotected("the snapshot is not protected", path=str(snapshot))
            self._add(name, _Image(bytearray(content), snapshot, self._clock()))

    def resize(self, name: RbdName, size: int) -> None:
        with self._lock:
            content = self._image(name).content
            del content[size:]
            content.extend(bytes(size - len(content)))

    def flatten(self, name: RbdName, waiter: Waiter | None = None) -> None:
        with self._lock:
            image = self._image(name)
            if image.parent is not None and self.is_full:
                raise _full(name)
            if image.parent is not None and waiter is not None:
                waiter.check()
            image.parent = None

    def rename(self, name: RbdName, new: str) -> None:
        with self._lock:
            image = self._image(name)
            self._add(RbdName(name.pool, new), image)
            del self._pools[name.pool][name.image]

    def mend_names(self, pool: str, names: re.Pattern[str], before: float) -> None:
        # Here a rename is one step, so that nothing can be left in the middle of it.
        self.names(pool)

    def remove(self, name: RbdName) -> None:
        with self._lock:
            image = self._image(name)
            if image.open_for_writing or image.snapshots:
                raise _busy(name)
            del self._pools[name.pool][name.image]

    # -- what tests use ------------------------------------------------------------------------------

    def read(self, name: RbdName, offset: int, length: int) -> bytes:
        """Return bytes of an image or snapshot, as a guest would read them."""
        with self._lock:
            return bytes(self._content(name)[offset : offset + length])

    def write(self, name: RbdName, offset: int, data: bytes) -> None:
        """Write as a guest would."""
        with self._lock:
            image = self._image(name)
            if self.is_full:
                raise _full(name)
            if offset + len(data) > len(image.content):
                raise errors.BackendError("Ceph failed: a write past the end", path=str(name))
            image.content[offset : offset + len(data)] = data
            image.touched = self._clock()

    @contextlib.contextmanager
    def opened(self, name: RbdName) -> Iterator[None]:
        """Have an image open for writing during the body, as a running guest has it."""
        with self._lock:
            image = self._image(name)
            image.open_for_writing += 1
        try:
            yield
        finally:
            with self._lock:
                image.open_for_writing -= 1

    def create_snapshot(self, name: RbdName, *, protect: bool = True) -> None:
        """Take the snapshot that the name says."""
        assert name.snapshot is not None
        with self._lock:
            image = self._image(RbdName(name.pool, name.image))
            image.snapshots[name.snapshot] = _Snapshot(bytes(image.content), protect)

    def remove_snapshot(self, name: RbdName) -> None:
        """Unprotect a snapshot and remove it.

        :raises Busy: it has clones.
        """
        assert name.snapshot is not None
        with self._lock:
            self._content(name)
            if any(image.parent == name for images in self._pools.values() for image in images.values()):
                raise _busy(name)
            del self._image(name).snapshots[name.snapshot]

    # -- inside --------------------------------------------------------------------------------------

    def _answer(self, what: str) -> None:
        if self.is_down:
            raise errors.BackendError(
                "Ceph failed: error connecting to the cluster",
                path=what,
                next_step="check the cluster, then ask again",
            )

    def _pool(self, pool: str, what: str) -> dict[str, _Image]:
        self._answer(what)
        if pool not in self._pools:
            raise _missing(what)
        if pool in self.forbidden:
            raise ceph.Denied("the Ceph user has no permission", path=what, next_step="check the user's caps")
        return self._pools[pool]

    def _image(self, name: RbdName) -> _Image:
        try:
            return self._pool(name.pool, str(name))[name.image]
        except KeyError:
            raise _missing(str(name)) from None

    def _content(self, name: RbdName) -> bytes | bytearray:
        image = self._image(name)
        if name.snapshot is None:
            return image.content
        try:
            return image.snapshots[name.snapshot].content
        except KeyError:
            raise _missing(str(name)) from None

    def _add(self, name: RbdName, image: _Image) -> None:
        pool = self._pool(name.pool, str(name))
        if name.image in pool:
            raise errors.DiskExistsError(
                "the target exists already",
                path=str(name),
                next_step="remove it, or ask for it to be reused (imagecache: --reuse)",
            )
        pool[name.image] = image


def _missing(what: str) -> ceph.Missing:
    return ceph.Missing("there is no such pool or image", path=what, next_step="check the name and the pool")


def _busy(name: RbdName) -> ceph.Busy:
    return ceph.Busy(
        "it is open somewhere, or has snapshots or clones",
        path=str(name),
        next_step="stop what uses it, or remove its snapshots, then ask again",
    )


def _full(name: RbdName) -> errors.NoSpaceError:
    return errors.NoSpaceError("the pool is full", path=str(name), next_step="make room, then ask again")
