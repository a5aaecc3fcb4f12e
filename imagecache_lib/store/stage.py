# SPDX-License-Identifier: Apache-2.0
"""Files in flight: the data that becomes a base image, and the note that says what it will be.

A stage file is made, owned, filled and synced through one descriptor. That matters for the last step: the
kernel reports a lost write once, to descriptors that were open when it happened, so a file that was reopened
before its fsync may be told that all is well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import BinaryIO

from imagecache_lib.store import base_attributes, checksums, evidence, layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.pieces import Pieces
from imagecache_lib.system import durable, holders, locks, sparse
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.maker import Maker
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.system.translate import translated
from imagecache_lib.system.waiter import Waiter

LOG = logging.getLogger(__name__)


class StageGone(Exception):
    """Another process swept the stage file away while it was filled: begin again."""


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Who fills a stage file, and how far that is: for people who wait, and evidence of nothing.

    :param host: its name.
    :param pid: id of the process there.
    :param received: bytes of the source's data that arrived.
    :param total: bytes in all, or None while that is not known.
    """

    host: str
    pid: int
    received: int = 0
    total: int | None = None


@dataclasses.dataclass(frozen=True)
class StageInfo:
    """What lies beside a stage file.

    :param name: the base that it will be.
    :param reserved: bytes of the filesystem that its owner will need in all.
    :param record: the base's evidence, once the data is complete.
    :param origin: where the data comes from, as a digest; empty if that cannot be told. Releases before do
        not write it, and pass over it.
    :param fetcher: who fills the file, or None if that is over or cannot be told. Likewise.
    :param source: which data the file holds as its source sent it, from the first byte on, as a digest of
        what the source says of it; empty if the file holds anything else. Likewise.
    """

    name: str
    reserved: int = 0
    record: evidence.Record | None = None
    origin: str = ""
    fetcher: Fetcher | None = None
    source: str = ""

    def to_json(self) -> bytes:
        record = None if self.record is None else self.record.to_json().decode()
        fetcher = None if self.fetcher is None else dataclasses.asdict(self.fetcher)
        fields = {
            "name": self.name,
            "reserved": self.reserved,
            "record": record,
            "origin": self.origin,
            "fetcher": fetcher,
            "source": self.source,
        }
        return json.dumps(fields).encode() + b"\n"


def parse_info(data: bytes) -> StageInfo | None:
    """Return the note in ``data``, or None for anything torn or unknown."""
    try:
        fields = json.loads(data)
        name, reserved, record = fields["name"], fields["reserved"], fields["record"]
        origin, fetcher = fields.get("origin", ""), _fetcher(fields.get("fetcher"))
        source = fields.get("source", "")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    origin, source = (text if isinstance(text, str) else "" for text in (origin, source))
    if not isinstance(name, str) or type(reserved) is not int or reserved < 0:
        return None
    if record is None:
        return StageInfo(name, reserved, origin=origin, fetcher=fetcher, source=source)
    if not isinstance(record, str):
        return None
    return StageInfo(name, reserved, evidence.parse(record.encode()), origin, fetcher, source)


def _fetcher(fields: object) -> Fetcher | None:
    """Return who fills a stage file, or None for anything torn or unknown: nothing depends on it."""
    if not isinstance(fields, dict):
        return None
    host, pid, received, total = (fields.get(key) for key in ("host", "pid", "received", "total"))
    if not isinstance(host, str) or type(pid) is not int or type(received) is not int or received < 0:
        return None
    if total is not None and (type(total) is not int or total < 0):
        return None
    return Fetcher(host, pid, received, total)


class Stage:
    """One stage file of ours, open for reading and writing.

    :param origin: as :class:`StageInfo` has it.
    :param total: bytes of the source's data that will arrive, if that is known.
    :param taken: the id and the owner's lock of a file that was left by a dead owner, to go on with; or None
        for a new file.
    :raises StageGone: the cache was removed meanwhile.
    :raises NoSpaceError: from anything that writes, when the filesystem is full.
    """

    def __init__(
        self,
        cache: CacheStore,
        name: str,
        *,
        origin: str = "",
        total: int | None = None,
        taken: tuple[str, holders.OwnerLock] | None = None,
    ) -> None:
        self._cache = cache
        self._maker = Maker()
        self.name = name
        self._origin = origin
        self._source = ""
        self.id = durable.new_id() if taken is None else taken[0]
        self.path = cache.layout.stage(self.id)
        self.reserved = 0
        self._fetcher: Fetcher | None = Fetcher(cache.host.name, os.getpid(), total=total)
        # Who decodes may reserve more while who receives tells how far it is.
        self._noting = threading.Lock()
        self._owner = self._make() if taken is None else taken[1]
        #: Of the content so far.
        self.checksums = checksums.Checksums()
        #: Hashes of the source's data, once its digest turned out to be right; or None.
        self.pieces: Pieces | None = None
        #: Is told of all that is written to the file.
        self.writeback = sparse.Writeback(self.fd)
        #: Takes data in any order and from any thread.
        self.content = sparse.SparseFile(self.fd, self.checksums, self.writeback)

    def _make(self) -> holders.OwnerLock:
        with translated(self.path):
            durable.require_changeable(self.path)
            try:
                held = locks.HeldDescriptor(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except FileNotFoundError as error:
                raise StageGone from error
            return holders.OwnerLock(held, self._cache.host)

    @property
    def fd(self) -> int:
        return self._owner.fd

    @property
    def allocated(self) -> int:
        """Bytes that the file takes on disk now."""
        with translated(self.path):
            return os.fstat(self.fd).st_blocks * 512

    def write_info(self, record: evidence.Record | None = None) -> None:
        """Write down what this stage will be; durably, and after checksums and hashes, if the record is
        there."""
        with self._noting, translated(self.path):
            if record is not None:
                # Their names are made durable with that of the note, in the same directory: before that, no
                # crash leaves a base that needs them.
                sums = self.checksums.to_bytes(record.base_id)
                durable.write_file(self._cache.layout.stage_sums(self.id), sums, sync_name=False)
                if self.pieces is not None:
                    hashes = self.pieces.to_bytes(record.base_id)
                    durable.write_file(self._cache.layout.stage_pieces(self.id), hashes, sync_name=False)
            self._write_note(record)

    def _write_note(self, record: evidence.Record | None = None) -> None:
        note = StageInfo(self.name, self.reserved, record, self._origin, self._fetcher, self._source)
        path = self._cache.layout.stage_record(self.id)
        durable.write_file(path, note.to_json(), sync=record is not None)

    def hold(self, source: str) -> None:
        """Write down that the file holds a source's bytes as they come: see :class:`StageInfo`."""
        self._source = source
        self.write_info()

    def tell(self, received: int, total: int | None) -> None:
        """Let those who wait for the base see how far its data is, in bytes. That it cannot be told is no
        error."""
        with self._noting, contextlib.suppress(OSError):
            self._fetcher = Fetcher(self._cache.host.name, os.getpid(), received, total)
            self._write_note()

    def write(self, data: bytes, offset: int) -> None:
        """Write data that belongs at an offset; zeros become holes."""
        with translated(self.path):
            self.content.write(data, offset)

    def clear(self) -> None:
        """Make it empty, for another try."""
        with translated(self.path):
            os.ftruncate(self.fd, 0)
        self.checksums.clear()
        self.pieces = None
        if self._fetcher is not None:
            self._fetcher = dataclasses.replace(self._fetcher, received=0)
        if self._source:
            self.hold("")

    def read_back(self, waiter: Waiter) -> None:
        """Sum up what another program wrote. Weaker than what passed through here: the page cache vouches.

        :param waiter: asked with each piece whether the caller still waits.
        """
        with translated(self.path):
            self.checksums.read_back(self.fd, waiter)

    def seal(self) -> str:
        """Give the complete data its mode and its random id, and make it durable. Returns the id."""
        base_id = durable.new_id()
        self._fetcher = None
        with translated(self.path):
            os.fchmod(self.fd, layout.BASE_MODE)
            base_attributes.write_id(self.fd, base_id)
            self._cache.host.trace(TracePoint.STAGE_SYNC)
            os.fsync(self.fd)
        return base_id

    def lent(self) -> contextlib.AbstractContextManager[None]:
        """Give up the stage's lock on the file for the body, so that another program can lock it.

        mkfs.ntfs insists on locking all of it.
        """
        return self._owner.lent()

    def is_at_path(self) -> bool:
        """Whether the stage file still is at its path: no other process swept it away."""
        try:
            return os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def discard(self) -> None:
        """Remove what is left of it. Harmless after it was published: the base is another name.

        A forked child leaves it to its parent.
        """
        if not self._maker.is_here:
            return
        where = self._cache.layout
        for path in (*where.beside_stage(self.id), self.path):
            # What cannot be removed now is swept later; the error that led here matters more.
            with contextlib.suppress(OSError):
                os.unlink(path)
        self.leave()

    def leave(self) -> None:
        """Close it and leave data and note where they are."""
        with contextlib.suppress(OSError):
            self._owner.close()

    def touch(self) -> None:
        """Show that its owner gets on, though nothing is written now."""
        with contextlib.suppress(OSError):
            os.utime(self.fd)


@dataclasses.dataclass(frozen=True)
class SealedStage:
    """A complete, checked, durable stage file with the evidence of how it was made.

    :param stage: the caller's, to publish or to discard.
    :param record: what will be its record.
    :param received: bytes that came over the wire for it.
    :param allocated: bytes that it takes on disk, those that it shares with another base not counted.
    """

    stage: Stage
    record: evidence.Record
    received: int = 0
    allocated: int = 0


def side_file(cache: CacheStore) -> BinaryIO:
    """Return a file without a name on the cache's filesystem: it goes with its descriptor."""
    path = cache.layout.stage(f"side.{durable.new_id()}.new")
    with translated(path):
        # Its owner closes it.
        file = open(path, "x+b", opener=functools.partial(os.open, mode=0o600))  # noqa: SIM115
        os.unlink(path)
    return file


def iter_stages(cache: CacheStore) -> Iterator[tuple[str, StageInfo]]:
    """Yield the id and the note of every stage there is. A note that cannot be read counts as torn."""
    for stage_id, info in _infos(cache):
        if isinstance(info, StageInfo):
            yield stage_id, info


def unreadable(cache: CacheStore) -> list[str]:
    """Return the paths of notes that cannot be read, of stages that are there: they may be any base's.

    So may those that are torn as long as their owners live. What is left of dead ones was never published.
    """
    return [
        cache.layout.stage_record(stage_id)
        for stage_id, info in _infos(cache)
        if (info is _UNREADABLE and os.path.lexists(cache.layout.stage(stage_id)))
        or (info is None and _may_be_alive(cache, stage_id))
    ]


class _Unreadable:
    """What stands for a note that cannot be read."""


_UNREADABLE = _Unreadable()


def _infos(cache: CacheStore) -> Iterator[tuple[str, StageInfo | _Unreadable | None]]:
    """Yield the id of each stage and its note, or None for one that is torn."""
    try:
        entries = os.listdir(cache.layout.stages)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.endswith(".json"):
            stage_id, path = entry.removesuffix(".json"), os.path.join(cache.layout.stages, entry)
            try:
                data = durable.read_file(path)
            except OSError as error:
                LOG.debug("The note of an image in flight, %s, cannot be read: %s", path, error.strerror)
                yield stage_id, _UNREADABLE
                continue
            if data is None and not os.path.lexists(path):
                continue  # its owner removed it
            yield stage_id, parse_info(data) if data is not None else None


def origins(cache: CacheStore, name: str) -> set[str]:
    """Return where the data comes from that a base is being made of, as digests; "" for an unknown one."""
    return {note.origin for _stage_id, note in iter_stages(cache) if note.name == name}


def progress(cache: CacheStore, name: str) -> list[tuple[str, int, int]]:
    """Return the id, ``st_mtime_ns`` and ``st_blocks`` of each stage file of a base, sorted.

    The list changes as long as any process, on this host or another, gets on with fetching the base.
    """
    found = []
    for stage_id, note in iter_stages(cache):
        if note.name == name:
            with contextlib.suppress(FileNotFoundError):
                now = os.stat(cache.layout.stage(stage_id))
                found.append((stage_id, now.st_mtime_ns, now.st_blocks))
    return sorted(found)


def fetcher(cache: CacheStore, name: str) -> Fetcher | None:
    """Return who fetches or makes a base now, on whichever host, or None if none does or that cannot be told.

    Of several it is the one that is furthest: a fetch may have a second file, of what is still to be decoded.
    """
    found = [
        note.fetcher
        for stage_id, note in iter_stages(cache)
        if note.name == name and note.fetcher is not None and _may_be_alive(cache, stage_id)
    ]
    return max(found, key=lambda each: (each.total is not None, each.received), default=None)


def _may_be_alive(cache: CacheStore, stage_id: str) -> bool:
    """Whether a process owns a stage file, as far as locks tell."""
    try:
        file = Descriptor(cache.layout.stage(stage_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    with file as fd:
        return not cache.host.locking or holders.has_owner(fd) is not False
