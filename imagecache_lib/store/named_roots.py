# SPDX-License-Identifier: Apache-2.0
"""Which disk roots the processes of a host name, written down before they make a disk there.

A pass reads what its own process names. One of another process, with other disk roots, would not see the
disks that this process makes until a pass here has seen them: their bases had nothing but their age. And a
disk root that is not mounted any more is an empty directory, which says nothing of the disks in it: so it is
written down, too, which directory it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from imagecache_lib.store import layout
from imagecache_lib.store.identity import identity_now
from imagecache_lib.store.last_scan_form import pack_identity, unpack_identity
from imagecache_lib.store.seen import Identity
from imagecache_lib.system import durable, mounts, names
from imagecache_lib.system.host import System

LOG = logging.getLogger(__name__)

#: A process that goes on making disks says so again after this many seconds.
_AGAIN = 3600.0

#: A pass that began this many seconds after a note was written saw the disks that were made by it: no process
#: goes by it any longer, and what is in the making then is seen under its temporary name.
_MARGIN = 2 * _AGAIN

#: The same for a note of a volume, whose time is that of the last disk: a power cut may take it back so far.
_VOLUMES_MARGIN = 120.0

#: A note that is younger than this many seconds is read in any case.
_YOUNG = 7 * 86400.0

#: How many seconds of a file's time of change a copy of it may have lost: tar's usual form counts whole ones.
_LOST_BY_COPIES = 2.0

#: How many names a note may have, should something that cannot be replaced have the first.
_NAMES = 3

#: Says that a note is of no disk root.
_VOLUME = "volume"

#: By the clock that is never set, and by that of the day.
_Times = tuple[float, float]

_FILE = re.compile(r"[0-9a-f]{16}\.roots")
_SEEN = re.compile(r"[0-9a-f]{16}\.seen")


@dataclasses.dataclass(frozen=True)
class Noted:
    """One disk root that a process of the host names.

    :param note: path of the note that says so.
    :param root: its absolute path.
    :param identity: which directory it was as a disk was made there, or None if the process did not look.
    :param is_seen: a pass has seen the disks that were made by this note.
    :param is_volume: it is no disk root: a disk root leads to it, and it is where a filesystem was mounted.
    """

    note: str
    root: str
    identity: Identity | None
    is_seen: bool
    is_volume: bool = False


@dataclasses.dataclass(frozen=True)
class Named:
    """What the processes of a host name, or named since its last pass.

    :param noted: disk roots to read.
    :param damaged: why it cannot be told, as a clause that names the file, by path of a note.
    """

    noted: tuple[Noted, ...] = ()
    damaged: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def roots(self) -> frozenset[str]:
        """The paths of the disk roots."""
        return frozenset(each.root for each in self.noted if not each.is_volume)

    @property
    def unseen(self) -> frozenset[str]:
        """The paths of those in which there may be disks that no pass has seen."""
        return frozenset(each.root for each in self.noted if not each.is_seen and not each.is_volume)


class NamedRoots:
    """What this process names. Safe to share between threads.

    :param roots: absolute paths of its disk roots.
    :param usual: whether they are those of a process for which none are configured.
    """

    def __init__(self, roots: Sequence[str], host: System, *, usual: bool) -> None:
        self._roots = roots
        self._usual = usual
        self._host = host
        self._identities: dict[str, Identity] = {}
        self._noted: dict[str, tuple[Identity | None, str, tuple[int, int, int], _Times]] = {}

    def look(self, roots: Iterable[str]) -> dict[str, Identity]:
        """Return which directories disk roots are now. Those that are not there are left out.

        Whoever looks at one whose server is gone waits for ever.
        """
        found: dict[str, Identity] = {}
        for root in roots:
            try:
                found[root] = identity_now(root, self._identities.get(root))
            except OSError as error:
                LOG.debug("The disk root %s cannot be looked at: %s", root, error)
        return found

    def look_at_volume(self, directory: str, roots: Iterable[str]) -> dict[str, Identity]:
        """Return which directory is at the top of the filesystem that a directory is on, by its path.

        Returns nothing if one of the disk roots that lead there is on the same.

        :param directory: an existing one.
        """
        top = mounts.between(directory, list(roots))
        if top is None:
            return {}
        try:
            return {top: identity_now(top, None)}
        except OSError as error:
            LOG.debug("What is mounted at %s cannot be looked at: %s", top, error)
            return {}

    def note(
        self,
        where: layout.Layout,
        own_id: str,
        looked: Mapping[str, Identity],
        volumes: Mapping[str, Identity],
    ) -> None:
        """See to it that they are written down, and were so not long ago.

        Another process may take a note away, or the whole cache: each is looked at each time.

        :param looked: as :meth:`look` returned it, for those in which a disk is made.
        :param volumes: as :meth:`look_at_volume` returned it.
        :raises OSError: they are not, and cannot be written, but for usual roots for which there is no room.
        """
        self._identities.update(looked)
        for root in self._roots:
            self._note(where, own_id, root, self._identities.get(root))
        for path, identity in volumes.items():
            data = _encoded(path, identity, is_volume=True)
            # It may be gone before the next pass, or soon after it: each disk counts.
            os.utime(self._written(_paths(where, own_id, data), data))

    def _note(self, where: layout.Layout, own_id: str, root: str, identity: Identity | None) -> None:
        now = self._host.monotonic(), self._host.clock()
        noted = self._noted.get(root)
        if noted is not None and noted[0] == identity:
            _, path, status, since = noted
            if _is_recent(since, now) and _status(path) == status:
                return
        try:
            data = _encoded(root, identity)
            path = self._written(_paths(where, own_id, data), data)
        except OSError as error:
            # On a full filesystem what is cached is served all the same. The usual root is that of every
            # process that has no other ones configured, so that nearly all of them read it anyway.
            if not self._usual or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            LOG.warning("Which disk roots this process names cannot be written down: %s", error)
            return
        found = _status(path)
        if found is None:
            self._noted.pop(root, None)
        else:
            self._noted[root] = (identity, path, found, now)

    def _written(self, possible: Sequence[str], data: bytes) -> str:
        """Return the path of a note that says what this process names, now."""
        failed: OSError | None = None
        for path in possible:
            is_said = _says(path, data)
            try:
                # A clock that was set back may let the note look older than a pass that was before it.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_mark(path))
                if not is_said or abs(self._host.clock() - os.stat(path).st_mtime) >= _AGAIN:
                    durable.write_file(path, data)
            except OSError as error:
                failed = error
                if error.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
                    continue  # a directory: it is not ours to remove
                if not is_said:
                    raise
                LOG.warning("The note %s cannot be written anew: %s", path, error)
            return path
        assert failed is not None
        raise failed


def _is_recent(since: _Times, now: _Times) -> bool:
    """Whether a note need not be written anew, by either clock: the clock of the day may have been set."""
    return all(abs(one - other) < _AGAIN for one, other in zip(since, now, strict=True))


def paths(where: layout.Layout, host_id: str, root: str, identity: Identity | None) -> list[str]:
    """Return the paths that the note of a disk root may have."""
    return _paths(where, host_id, _encoded(root, identity))


def _paths(where: layout.Layout, host_id: str, data: bytes) -> list[str]:
    ids = [hashlib.sha256(data + b"\n" * turn).hexdigest()[:16] for turn in range(_NAMES)]
    return [where.named_roots(host_id, each) for each in ids]


def of_host(where: layout.Layout, host_id: str, *, now: float) -> Named:
    """Return the disk roots that the processes of a host name, or named since its last pass.

    :param now: epoch seconds of the filesystem's clock.
    """
    noted: list[Noted] = []
    damaged: dict[str, str] = {}
    last_pass = _changed(where.last_scan(host_id))
    for path in _notes(where, host_id):
        written, found, problem = now, None, "is damaged"
        try:
            written = os.stat(path, follow_symlinks=False).st_mtime
            found = _read(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        root, identity, is_volume = found or ("", None, False)
        needs_mark = found is None or identity is not None
        seen = _seen(_mark(path), where.last_scan(host_id), now) if needs_mark else last_pass
        if written <= min(seen - _MARGIN, now - _YOUNG):
            continue
        if found is None:
            damaged[path] = f"{path}, which says what disk roots a process of this host names, {problem}"
        else:
            margin = _VOLUMES_MARGIN if is_volume else _MARGIN
            noted.append(Noted(path, root, identity, written <= seen - margin, is_volume))
    return Named(tuple(noted), damaged)


def note_seen(where: layout.Layout, host_id: str, notes: Collection[str], *, now: float) -> None:
    """Write down that a pass has read disk roots, as the directories that their notes say, and remembers the
    disks in them. Removes notes and marks that are of no use any more.

    :param notes: paths of the notes, of which no pass has seen all disks.
    :param now: epoch seconds of the filesystem's clock, as the pass began.
    :raises OSError: it cannot be written.
    """
    for note in notes:
        durable.write_file(_mark(note), f"{now!r}\n".encode(), sync=False)
    counting = of_host(where, host_id, now=now)
    kept = {*(each.note for each in counting.noted), *counting.damaged}
    for note in list(_notes(where, host_id)):
        if note not in kept:
            _remove_old(note, now)
    for mark in _marks(where, host_id):
        note = mark.removesuffix(".seen") + ".roots"
        if not os.path.lexists(note) and _changed(mark) <= now - _YOUNG:
            os.unlink(mark)


def _remove_old(note: str, now: float) -> None:
    """Remove a note, unless its process writes it anew at this moment."""
    aside = os.path.join(os.path.dirname(note), f".{os.path.basename(note)}.{durable.new_id()}.new")
    try:
        os.rename(note, aside)
        if _changed(aside) > now - _YOUNG and not os.path.lexists(note):
            os.rename(aside, note)
        else:
            os.unlink(aside)
    except FileNotFoundError:
        pass  # another pass did it


def drop_unfounded(where: layout.Layout, host_id: str) -> None:
    """Remove marks of passes that ``hosts/<id>.scan`` knows nothing of, before that is written anew.

    A copy that was restored, or nothing, is in that file's place then. What those passes saw keeps no base
    any more, so that the notes have to.

    :raises OSError: they cannot be removed.
    """
    for mark in _marks(where, host_id):
        if not _is_remembered(mark, where.last_scan(host_id)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(mark)


def retire(notes: Iterable[str]) -> None:
    """Remove notes of directories in whose place others were accepted, or that have another identity now.

    :raises OSError: they cannot be removed.
    """
    for note in notes:
        try:
            os.unlink(note)
        except FileNotFoundError:
            continue


def forget(where: layout.Layout, host_id: str, path: str) -> None:
    """Take a disk root, and those below it, out of what processes of a host named.

    A process that goes on making disks there says so again.
    """
    for note in _notes(where, host_id):
        try:
            found = _read(note)
            if found is not None and names.is_at_or_below(found[0], path):
                os.unlink(note)
        except OSError as error:
            LOG.warning("The note %s still names what is at %s: %s", note, path, error)


def _encoded(root: str, identity: Identity | None, *, is_volume: bool = False) -> bytes:
    more = [_VOLUME] if is_volume else []
    return json.dumps([root, pack_identity(identity), *more]).encode() + b"\n"


def _says(path: str, data: bytes) -> bool:
    try:
        return durable.read_file(path) == data
    except OSError:
        return False


def _mark(note: str) -> str:
    return note.removesuffix(".roots") + ".seen"


def _marks(where: layout.Layout, host_id: str) -> list[str]:
    """Return the paths of what passes of a host wrote down of notes that they had seen."""
    return [
        os.path.join(where.hosts, entry)
        for entry in os.listdir(where.hosts)
        if entry.startswith(f"{host_id}.") and _SEEN.fullmatch(entry[len(host_id) + 1 :])
    ]


def _seen(mark: str, scan: str, now: float) -> float:
    """Return when the last pass began that read a note's disk root as the directory that it says, or 0.

    One that began later than now went by a clock that was ahead: disks were made since. One that is not
    remembered any more keeps none of the disks that it saw.

    :param scan: path of what the last pass saw.
    """
    seen = _stated(mark)
    return seen if seen <= now and _is_remembered(mark, scan) else 0.0


def _is_remembered(mark: str, scan: str) -> bool:
    """Whether what the last pass saw is no older than a mark: each pass writes the mark last."""
    return _stated(mark) <= _changed(scan) + _LOST_BY_COPIES


def _stated(mark: str) -> float:
    """Return when the pass began that wrote a mark, or 0 if that cannot be told."""
    try:
        return float(durable.read_file(mark) or 0)
    except (OSError, ValueError):
        return 0.0


def _changed(path: str) -> float:
    try:
        return os.stat(path, follow_symlinks=False).st_mtime
    except OSError:
        return 0.0


def _status(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _notes(where: layout.Layout, host_id: str) -> Iterator[str]:
    try:
        entries = os.listdir(where.hosts)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.startswith(f"{host_id}.") and _FILE.fullmatch(entry[len(host_id) + 1 :]):
            yield where.named_roots(host_id, entry[len(host_id) + 1 : -len(".roots")])


def _read(path: str) -> tuple[str, Identity | None, bool] | None:
    """Return the path in a note, which directory it was and whether it is no disk root but where a filesystem
    was mounted; or None if the note is damaged.

    :raises FileNotFoundError: it is gone.
    :raises OSError: it cannot be read.
    """
    data = durable.read_file(path)
    if data is None:
        os.stat(path, follow_symlinks=False)
        return None
    try:
        root, packed, *more = json.loads(data)
        if root.startswith("/") and "\0" not in root and os.fsencode(root) and more in ([], [_VOLUME]):
            return root, unpack_identity(packed), bool(more)
    except (ValueError, OverflowError, RecursionError, AttributeError, TypeError):
        pass
    return None
