# SPDX-License-Identifier: Apache-2.0
"""Which disk roots the processes of a host name, written down before they make a disk there.

A pass reads what its own process names. One of another process, with other disk roots, would not see the
disks that this process makes until a pass here has seen them: their bases had nothing but their age.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator

from imagecache_lib.store import layout
from imagecache_lib.system import durable
from imagecache_lib.system.host import System

LOG = logging.getLogger(__name__)

#: A process that goes on making disks says so again after this many seconds.
_AGAIN = 3600.0

#: A note that is older than the last pass by this many seconds was read by it: no disk is that long in the
#: making, and the disks that were there are remembered by themselves.
_MARGIN = 86400.0

#: A note that is younger than this many seconds is read in any case.
_YOUNG = 7 * 86400.0

_FILE = re.compile(r"[0-9a-f]{16}\.roots")


class NamedRoots:
    """What this process names.

    :param roots: absolute paths of its disk roots.
    """

    def __init__(self, roots: tuple[str, ...], host: System) -> None:
        self._data = json.dumps(roots).encode() + b"\n"
        self._host = host
        self._noted: float | None = None

    def forget(self) -> None:
        """Take the next cache, which is prepared where this one was, for one that has no note yet."""
        self._noted = None

    def note(self, where: layout.Layout, own_id: str) -> None:
        """See to it that they are written down, and were so not long ago.

        :raises OSError: they cannot be written.
        """
        now = self._host.monotonic()
        if self._noted is not None and now - self._noted < _AGAIN:
            return
        path = where.named_roots(own_id, hashlib.sha256(self._data).hexdigest()[:16])
        try:
            if durable.read_file(path) == self._data:
                os.utime(path)
                self._noted = now
                return
        except OSError as error:
            LOG.debug("The note %s is written anew: %s", path, error)
        durable.write_file(path, self._data)
        self._noted = now


def of_host(where: layout.Layout, host_id: str, now: float) -> list[str]:
    """Return the disk roots that processes of a host name, or named since its last pass.

    What cannot be read names none: whoever goes on making disks there writes it anew.

    :param now: epoch seconds of the filesystem's clock.
    """
    try:
        last_pass = os.stat(where.last_scan(host_id)).st_mtime
    except OSError:
        last_pass = 0.0
    found: dict[str, None] = {}
    for path in _notes(where, host_id):
        try:
            if os.stat(path).st_mtime > min(last_pass - _MARGIN, now - _YOUNG):
                found.update(dict.fromkeys(_read(path)))
        except OSError as error:
            LOG.warning("Which disk roots a process of this host names cannot be read: %s", error)
    return list(found)


def forget(where: layout.Layout, host_id: str, path: str) -> None:
    """Take a disk root, and those below it, out of what processes of a host named.

    :raises OSError: it cannot be written.
    """
    beneath = path.rstrip("/") + "/"
    for note in _notes(where, host_id):
        roots = _read(note)
        kept = [root for root in roots if root != path and not root.startswith(beneath)]
        if not kept:
            os.unlink(note)
        elif kept != roots:
            durable.write_file(note, json.dumps(kept).encode() + b"\n")


def _notes(where: layout.Layout, host_id: str) -> Iterator[str]:
    try:
        entries = os.listdir(where.hosts)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.startswith(f"{host_id}.") and _FILE.fullmatch(entry[len(host_id) + 1 :]):
            yield os.path.join(where.hosts, entry)


def _read(path: str) -> list[str]:
    """Return the disk roots of a note: none, if it is damaged or gone."""
    data = durable.read_file(path)
    if data is None:
        return []
    try:
        roots = json.loads(data)
    except (ValueError, RecursionError):
        roots = None
    if not isinstance(roots, list):
        LOG.warning("The note %s is damaged: which disk roots it named is unknown", path)
        return []
    return [root for root in roots if isinstance(root, str) and root.startswith("/") and "\0" not in root]
