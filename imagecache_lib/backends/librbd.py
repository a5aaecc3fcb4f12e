# SPDX-License-Identifier: Apache-2.0
"""A real Ceph cluster, through librados and librbd.

The bindings come with the distribution's Ceph packages and are not on PyPI, so they are imported when the
cluster is first used.
"""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import errno
import os
import re
import threading
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

from imagecache_lib import errors
from imagecache_lib.backends.ceph import Busy, Denied, Missing, RbdImage, RbdName, Unprotected
from imagecache_lib.system import threads
from imagecache_lib.system.maker import Maker
from imagecache_lib.system.waiter import Waiter

#: Bytes that are read at once: rbd's own default object size.
_CHUNK = 4 * 2**20

#: How a configuration says that there is no limit: a number of seconds, in later releases with its unit.
_NO_LIMIT = re.compile(r"0*(\.0*)?\s*[a-z]*")

#: Writes in flight while an image is filled: enough to keep several OSDs busy.
_IN_FLIGHT = 8

#: Seconds that the end of the process waits for operations in threads that it does not wait for otherwise,
#: and between two looks. Long ones are broken off; one object takes longer only where an OSD does not answer.
_EXIT_SECONDS = 5.0
_LOOK_EVERY = 0.01

#: Set as the process exits while operations are under way.
_exiting = threading.Event()


class _Connection:
    """A client of the cluster, which ends with the last reference to it, or with the process.

    librados ends none by itself: one that is dropped keeps a dozen threads, and its sockets, for as long as
    the process lives, and the process then exits below them.

    :ivar maker: the process whose own it is.
    :ivar end: ends it at once.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        # A forked child has none of librados' threads, and needs a connection of its own.
        self.maker = Maker()
        self._uses: dict[object, threading.Thread] = {}
        self.end = weakref.finalize(self, _shut_down, client, self.maker, self._uses)

    @contextlib.contextmanager
    def used(self) -> Iterator[Any]:
        """Yield librados' client. It stays for the body, whoever drops the connection meanwhile."""
        use = object()
        self._uses[use] = threading.current_thread()
        try:
            _require_process()
            yield self._client
        finally:
            del self._uses[use]


def _shut_down(client: Any, maker: Maker, uses: Mapping[object, threading.Thread]) -> None:
    # In a child that is forked it would wait for threads that are not there.
    if not maker.is_here:
        return
    if uses:
        # The process exits. A thread that it does not wait for is in the middle of an operation: should the
        # interpreter end below librbd, that aborts the process.
        _exiting.set()
        until = time.monotonic() + _EXIT_SECONDS
        while _are_under_way(uses) and time.monotonic() < until:
            time.sleep(_LOOK_EVERY)
    if not uses:
        client.shutdown()


def _are_under_way(uses: Mapping[object, threading.Thread]) -> bool:
    own = threading.current_thread()
    return any(thread is not own and thread.is_alive() for thread in list(uses.values()))


def _require_process() -> None:
    """Refuse to begin an operation, or to go on with one, while the process exits.

    :raises BackendError: it does.
    """
    if _exiting.is_set():
        raise errors.BackendError("the process ends", next_step="ask again in another one")


class LibrbdCluster:
    """A real cluster, through librados and librbd. Nothing is loaded or asked before the first call.

    :param conf: path of the cluster's configuration, or an empty text for librados's search path.
    :param user: Ceph user, without ``client.``, or None for ``admin``, librados's default.
    :param connect_timeout: seconds to wait for the monitors, or 0 for no limit.
    :param op_timeout: seconds to wait for each operation of the OSDs, where ``rados_osd_op_timeout`` in the
        configuration is 0; or 0 for no limit. librados itself waits for as long as an OSD is away. An
        operation that was given up may still take place later.
    """

    def __init__(
        self, conf: str = "", user: str | None = None, *, connect_timeout: int = 5, op_timeout: int = 120
    ) -> None:
        self._conf = conf
        self._user = user
        self._connect_timeout = connect_timeout
        self._op_timeout = op_timeout
        self._connecting = threads.lock()
        self._connected: _Connection | None = None

    def fsid(self) -> str:
        with self._cluster().used() as cluster, self._translated("the cluster"):
            return str(cluster.get_fsid())

    def names(self, pool: str) -> list[str]:
        with self._pool(pool, f"pool {pool}") as ioctx:
            found: list[str] = _rbd().RBD().list(ioctx)
            return found

    def stat(self, name: RbdName) -> RbdImage:
        with self._open(name, read_only=True) as image:
            try:
                parent = RbdName(*image.parent_info())
            except _rbd().ImageNotFound:
                parent = None
            touched = max(_epoch(image.create_timestamp()), _epoch(image.modify_timestamp()))
            return RbdImage(int(image.size()), parent, touched)

    def chunks(self, name: RbdName, offset: int = 0) -> Generator[bytes]:
        with self._open(name, read_only=True) as image:
            size = int(image.size())
            while offset < size:
                _require_process()
                data: bytes = image.read(offset, min(_CHUNK, size - offset))
                yield data
                offset += len(data)

    def create(self, name: RbdName, size: int) -> None:
        with self._pool(name.pool, str(name)) as ioctx:
            _rbd().RBD().create(ioctx, name.image, size, old_format=False)

    def fill(self, name: RbdName, chunks: Iterable[tuple[int, bytes]]) -> None:
        with self._open(name, read_only=False) as image:
            pending: collections.deque[Any] = collections.deque()
            try:
                for offset, data in chunks:
                    _require_process()
                    if len(pending) >= _IN_FLIGHT:
                        _finish(pending.popleft())
                    pending.append(image.aio_write(data, offset, lambda _completion: None))
            finally:
                failures = [failure for each in pending if (failure := _failure(each)) is not None]
            if failures:
                raise failures[0]
            image.flush()

    def clone(self, snapshot: RbdName, name: RbdName) -> None:
        with self._pool(snapshot.pool, str(snapshot)) as parent, self._pool(name.pool, str(name)) as child:
            try:
                _rbd().RBD().clone(parent, snapshot.image, snapshot.snapshot, child, name.image)
            except _rbd().InvalidArgument:
                with _rbd().Image(parent, snapshot.image, read_only=True) as image:
                    if image.is_protected_snap(snapshot.snapshot):
                        raise
                raise Unprotected("the snapshot is not protected", path=str(snapshot)) from None

    def resize(self, name: RbdName, size: int) -> None:
        with self._open(name, read_only=False) as image:
            image.resize(size)

    def flatten(self, name: RbdName, waiter: Waiter | None = None) -> None:
        progress = _Progress(waiter)
        with self._open(name, read_only=False) as image:
            try:
                image.parent_info()
            except _rbd().ImageNotFound:
                return
            try:
                image.flatten(on_progress=progress.look)
            except _rbd().Error:
                if progress.reason is not None:
                    raise progress.reason from None
                raise

    def rename(self, name: RbdName, new: str) -> None:
        # librbd's own rename looks whether the new name is free and then writes it: of several renames to one
        # name at once all may report success, and all callers but one take another's image for their own.
        # Restoring from the trash creates the name exclusively, as creating and cloning do.
        with self._open(name, read_only=True) as image:
            image_id = image.id()
        wanted = RbdName(name.pool, new)
        with self._pool(name.pool, str(wanted)) as ioctx:
            trash = _rbd().RBD()
            with contextlib.suppress(_rbd().ImageNotFound):
                _rbd().Image(ioctx, new, read_only=True).close()
                raise _exists(str(wanted))
            trash.trash_move(ioctx, name.image, 0)
            try:
                trash.trash_restore(ioctx, image_id, new)
            except _rbd().Error:
                # Half restored it can only be restored, not removed.
                trash.trash_restore(ioctx, image_id, name.image)
                raise

    def mend_names(self, pool: str, names: re.Pattern[str], before: float) -> None:
        with self._pool(pool, f"pool {pool}") as ioctx:
            trash = _rbd().RBD()
            for entry in list(trash.trash_list(ioctx)):
                if names.fullmatch(entry["name"]) and _epoch(entry["deletion_time"]) < before:
                    trash.trash_restore(ioctx, entry["id"], entry["name"])

    def remove(self, name: RbdName) -> None:
        with self._pool(name.pool, str(name)) as ioctx:
            _rbd().RBD().remove(ioctx, name.image)

    # -- connections ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _open(self, name: RbdName, *, read_only: bool) -> Iterator[Any]:
        with (
            self._pool(name.pool, str(name)) as ioctx,
            _rbd().Image(ioctx, name.image, snapshot=name.snapshot, read_only=read_only) as image,
        ):
            yield image

    @contextlib.contextmanager
    def _pool(self, pool: str, what: str) -> Iterator[Any]:
        with self._cluster().used() as cluster, self._translated(what):
            ioctx = cluster.open_ioctx(pool)
            try:
                yield ioctx
            finally:
                ioctx.close()

    def _cluster(self) -> _Connection:
        with self._connecting:
            connected = self._connected
            if connected is None or not connected.maker.is_here:
                with self._translated("the cluster"):
                    self._connected = connected = self._connect()
            return connected

    def _connect(self) -> _Connection:
        try:
            client = _rados().Rados(rados_id=self._user, conffile=self._conf)
            connection = _Connection(client)
            # connect() has a parameter for that and ignores it: the bindings' rados.pyx.
            for option in ("client_mount_timeout", "rados_mon_op_timeout"):
                client.conf_set(option, str(self._connect_timeout))
            if _NO_LIMIT.fullmatch(client.conf_get("rados_osd_op_timeout") or ""):
                client.conf_set("rados_osd_op_timeout", str(self._op_timeout))
            try:
                client.connect()
            except BaseException:
                connection.end()  # it has threads, and the error may be kept
                raise
        except _rados().Error as error:
            # Never an error of an image: one that is missing or denied would be fetched instead.
            raise errors.BackendError(
                f"Ceph cannot be reached as {self._who}: {error}",
                path=self._conf or None,
                next_step="see whether its monitors answer (ceph -s), and the user's keyring is here",
            ) from error
        return connection

    @property
    def _who(self) -> str:
        return f"client.{self._user or 'admin'}"

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn what the bindings raise into the library's errors; all of it has an errno."""
        try:
            yield
        except errors.ImageCacheError:
            raise
        except Exception as error:
            number = getattr(error, "errno", None)
            if number is None and not isinstance(error, (_rados().Error, _rbd().Error)):
                raise
            if abs(number or 0) == errno.ESHUTDOWN:
                # The cluster fenced this client off, which holds for the connection: the next call makes one.
                self._connected = None
            raise _as_ours(error, abs(number or 0), what, self._who) from error


class _Progress:
    """What librbd is told after each object of a long operation.

    :ivar reason: why the operation was ended, or None if it was not.
    """

    def __init__(self, waiter: Waiter | None) -> None:
        self._waiter = waiter
        self.reason: errors.ImageCacheError | None = None

    def look(self, _done: int, _total: int) -> int:
        """Return 0, or a negative number to end the operation. librbd prints what is raised, and goes on."""
        try:
            _require_process()
            if self._waiter is not None and self.reason is None:
                self._waiter.check()
        except errors.ImageCacheError as reason:
            self.reason = self.reason or reason
        return 0 if self.reason is None else -errno.ECANCELED


def _rados() -> Any:
    return _binding("rados", "python3-rados")


def _rbd() -> Any:
    return _binding("rbd", "python3-rbd")


def _binding(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise errors.ConfigError(
            f"Ceph's Python bindings cannot be loaded: {error}",
            next_step=f"install {package}, and let a virtualenv see the system's packages",
        ) from error


def _failure(completion: Any) -> Exception | None:
    """Wait for a write and return what went wrong."""
    completion.wait_for_complete_and_cb()
    result = int(completion.get_return_value())
    return None if result >= 0 else OSError(-result, os.strerror(-result))


def _finish(completion: Any) -> None:
    failure = _failure(completion)
    if failure is not None:
        raise failure


def _epoch(moment: dt.datetime) -> float:
    # The bindings give UTC: naive in older releases.
    return moment.replace(tzinfo=dt.UTC).timestamp()


def _exists(what: str) -> errors.DiskExistsError:
    return errors.DiskExistsError(
        "the target exists already",
        path=what,
        next_step="remove it, or ask for it to be reused (imagecache: --reuse)",
    )


def _as_ours(error: Exception, number: int, what: str, who: str) -> errors.ImageCacheError:
    if number == errno.ENOENT:
        return Missing("there is no such pool or image", path=what, next_step="check the name and the pool")
    if number == errno.EEXIST:
        return _exists(what)
    if number in (errno.EBUSY, errno.ENOTEMPTY):
        return Busy(
            "it is open somewhere, or has snapshots or clones",
            path=what,
            next_step="stop what uses it, or remove its snapshots, then ask again",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Denied(
            f"the Ceph user {who} has no permission",
            path=what,
            next_step="check the user's caps (ceph auth get)",
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return errors.NoSpaceError("the pool is full", path=what, next_step="make room, then ask again")
    if number == errno.ETIMEDOUT:
        return errors.BackendError(
            "Ceph did not answer in time",
            path=what,
            next_step="see whether its OSDs are up and its pools have room (ceph -s), then ask again",
        )
    return errors.BackendError(
        f"Ceph failed: {error}", path=what, next_step="check the cluster, then ask again"
    )
