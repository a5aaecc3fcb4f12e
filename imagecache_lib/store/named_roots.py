# SPDX-License-Identifier: Apache-2.0
"""Which disk roots the processes of a host name, written down before they make a disk there.

A pass reads what its own process names. One of another process, with other disk roots, would not see the
disks that this process makes until a pass here has seen them: their bases had nothing but their age.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence

from imagecache_lib.store import layout
from imagecache_lib.system import durable, names
from imagecache_lib.system.host import System

LOG = logging.getLogger(__name__)

#: A process that goes on making disks says so again after this many seconds.
_AGAIN = 3600.0

#: A note that is older than the last pass by this many seconds was read by it: no disk is that long in the
#: making, and the disks that were there are remembered by themselves.
_MARGIN = 86400.0

#: A note that is younger than this many seconds is read in any case.
_YOUNG = 7 * 86400.0

#: How many names a note may have, should something that cannot be replaced have the first.
_NAMES = 3

_FILE = re.compile(r"[0-9a-f]{16}\.roots")


@dataclasses.dataclass(frozen=True)
class Named:
    """What the processes of a host name, or named since its last pass.

    :param roots: disk roots to read, besides those of this process.
    :param unseen: those of them in which there may be disks that no pass has seen.
    :param unknown: why it cannot be told, as a clause that names the file, or None if it can.
    """

    roots: tuple[str, ...] = ()
    unseen: frozenset[str] = frozenset()
    unknown: str | None = None


class NamedRoots:
    """What this process names.

    :param roots: absolute paths of its disk roots.
    :param usual: whether they are those of a process for which none are configured.
    """

    def __init__(self, roots: Sequence[str], host: System, *, usual: bool) -> None:
        self._usual = usual
        self._data = _encoded(roots)
        self._names = _names(self._data)
        self._host = host
        self._noted: tuple[str, tuple[int, int, int], float] | None = None

    def note(self, where: layout.Layout, own_id: str) -> None:
        """See to it that they are written down, and were so not long ago.

        Another process may take the note away, or the whole cache: it is looked at each time.

        :raises OSError: they are not, and cannot be written, but for usual ones for which there is no room.
        """
        now = self._host.monotonic()
        if self._noted is not None:
            path, identity, since = self._noted
            if now - since < _AGAIN and _identity(path) == identity:
                return
        try:
            path = self._written(where, own_id)
        except OSError as error:
            # On a full filesystem what is cached is served all the same. The usual root is that of every
            # process that has no other ones configured, so that nearly all of them read it anyway.
            if not self._usual or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            LOG.warning("Which disk roots this process names cannot be written down: %s", error)
            return
        found = _identity(path)
        self._noted = None if found is None else (path, found, now)

    def _written(self, where: layout.Layout, own_id: str) -> str:
        """Return the path of a note that says what this process names, now."""
        failed: OSError | None = None
        for name in self._names:
            path = where.named_roots(own_id, name)
            is_said = self._says(path)
            try:
                if not is_said or abs(self._host.clock() - os.stat(path).st_mtime) >= _AGAIN:
                    durable.write_file(path, self._data)
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

    def _says(self, path: str) -> bool:
        try:
            return durable.read_file(path) == self._data
        except OSError:
            return False


def of_host(where: layout.Layout, host_id: str, *, own: Sequence[str], now: float) -> Named:
    """Return the disk roots that the other processes of a host name, or named since its last pass.

    :param own: the disk roots of this process, whose own note says nothing new.
    :param now: epoch seconds of the filesystem's clock.
    """
    try:
        last_pass = os.stat(where.last_scan(host_id)).st_mtime
    except OSError:
        last_pass = 0.0
    own_notes = {where.named_roots(host_id, name) for name in _names(_encoded(own))}
    roots: dict[str, None] = {}
    unseen: set[str] = set()
    unknown = None
    for path in _notes(where, host_id):
        if path in own_notes:
            continue
        noted = now
        try:
            noted = os.stat(path, follow_symlinks=False).st_mtime
            if noted <= min(last_pass - _MARGIN, now - _YOUNG):
                continue
            found, problem = _read(path), "is damaged"
        except FileNotFoundError:
            continue
        except OSError as error:
            found, problem = None, f"cannot be read ({error.strerror})"
        if found is None:
            unknown = f"{path}, which says what disk roots a process of this host names, {problem}"
            continue
        roots.update(dict.fromkeys(found))
        if noted > last_pass - 2 * _AGAIN:
            unseen.update(found)
    return Named(tuple(roots), frozenset(unseen), unknown)


def forget(where: layout.Layout, host_id: str, path: str) -> None:
    """Take a disk root, and those below it, out of what processes of a host named.

    A process that goes on making disks there says so again.
    """
    for note in _notes(where, host_id):
        try:
            roots = _read(note) or []
            kept = [root for root in roots if not names.is_at_or_below(root, path)]
            if kept == roots:
                continue
            if kept:
                data = _encoded(kept)
                durable.write_file(where.named_roots(host_id, _names(data)[0]), data)
            os.unlink(note)
        except OSError as error:
            LOG.warning("The note %s still names %s: %s", note, path, error)


def _encoded(roots: Sequence[str]) -> bytes:
    return json.dumps(list(roots)).encode() + b"\n"


def _names(data: bytes) -> list[str]:
    return [hashlib.sha256(data + b"\n" * turn).hexdigest()[:16] for turn in range(_NAMES)]


def _identity(path: str) -> tuple[int, int, int] | None:
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


def _read(path: str) -> list[str] | None:
    """Return the disk roots of a note, or None if it is damaged.

    :raises FileNotFoundError: it is gone.
    :raises OSError: it cannot be read.
    """
    data = durable.read_file(path)
    if data is None:
        os.stat(path, follow_symlinks=False)
        return None
    try:
        roots = json.loads(data)
        if isinstance(roots, list) and all(root.startswith("/") and "\0" not in root for root in roots):
            os.fsencode("".join(roots))
            return roots
    except (ValueError, RecursionError, AttributeError, TypeError):
        pass
    return None
