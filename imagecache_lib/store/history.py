# SPDX-License-Identifier: Apache-2.0
"""What happened to base images, kept for weeks: the first question after a lost disk.

Each host appends to its own file, ``history/<host id>``, one JSON object a line, and its processes do so
without a lock: a line is one write(2) to a file that is open for appending. A file that has grown gets a name
that no other has, ``history/<host id>.<random>.old``. Its host removes the oldest of these when all of them
are more than a bound. Every host removes those to which nothing was added for ``history_age_seconds``.

A line begins and ends with a line feed, so that one that was torn (a full filesystem, a power cut) spoils no
other. What cannot be parsed is passed over. Releases before this know nothing of the directory, and leave it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from imagecache_lib import dates, events
from imagecache_lib.store import layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import durable
from imagecache_lib.system.descriptor import Descriptor

LOG = logging.getLogger(__name__)

#: Bytes after which a file gets another name, and bytes that all files of one host take at most.
_FILE_BYTES = 2 * 2**20
_HOST_BYTES = 16 * 2**20

#: Letters of a reason that are kept, so that a line stays one write.
_LONGEST = 1000

_OLD = ".old"

#: No clock shows so many seconds.
_NO_TIME = 10**11

#: A time that lies ahead by more seconds than this was noted by a wrong clock.
_AHEAD = 300

#: The events that are kept, and what each is called.
_KINDS: dict[type[events.Event], str] = {
    events.Published: "published",
    events.Copied: "copied",
    events.Fetched: "fetched",
    events.Adopted: "adopted",
    events.Bypassed: "bypassed",
    events.MovedToTrash: "moved to the trash",
    events.Restored: "restored",
    events.Evicted: "evicted",
    events.Recovered: "recovered",
    events.Damaged: "damaged",
    events.Forgotten: "forgotten",
    events.Unreferenced: "not referred to any more",
}


@dataclasses.dataclass(frozen=True)
class Happening:
    """One thing that happened to a base image.

    :param at: when, in epoch seconds of the host's clock.
    :param name: the base's name in the cache.
    :param what: ``published``, ``evicted``, ``restored``, ``bypassed`` and the like.
    :param why: as a clause: by whose reference, or over which limit; empty if there is nothing to say.
    :param host: name of the host that did it.
    :param process: its process id there.
    :param program: name of the program that this was.
    :param image_id: the image's id, where it was known.
    """

    at: float
    name: str
    what: str
    why: str
    host: str
    process: int
    program: str
    image_id: str | None = None


class HistoryObserver:
    """Writes down what happens to base images. Safe to share between threads and processes.

    What cannot be written is not kept: it stops nothing, and is warned of once until it can be again.
    """

    def __init__(self, cache: CacheStore) -> None:
        self._cache = cache
        self._program = os.path.basename(sys.argv[0]) if sys.argv else ""
        self._is_failing = False

    def __call__(self, event: events.Event) -> None:
        kind = _KINDS.get(type(event))
        if kind is None or layout.classify(event.name) is layout.Kind.UNKNOWN:
            return
        host = self._cache.host
        happening = Happening(
            at=round(host.clock(), 3),
            name=event.name,
            what=kind,
            why=_why(event)[:_LONGEST],
            host=host.name,
            process=os.getpid(),
            program=self._program[:_LONGEST],
            image_id=event.image_id,
        )
        try:
            _append(self._cache, json.dumps(dataclasses.asdict(happening)).encode())
        except OSError as error:
            LOG.log(
                logging.DEBUG if self._is_failing else logging.WARNING,
                "What happens to base images, as now to %s, cannot be written down below %s, so that no"
                " history will tell it: %s",
                event.name,
                self._cache.layout.histories,
                error.strerror or error,
            )
            self._is_failing = True
        else:
            self._is_failing = False


def _why(event: events.Event) -> str:
    match event:
        case events.Fetched(received=received):
            return dates.size(received)
        case events.Copied(origin=origin):
            return f"from {origin}, which has its content"
        case events.Recovered(what=what):
            return what
        case events.Damaged(detail=detail, stays=stays):
            return detail if stays is None else f"{detail}; it stays: {stays}"
    return str(getattr(event, "reason", ""))


def _append(cache: CacheStore, line: bytes) -> None:
    path = cache.layout.history(cache.host_id)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = Descriptor(path, flags, 0o600)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):  # another one has just made it
            os.mkdir(cache.layout.histories, layout.PRIVATE_DIR_MODE)
        file = Descriptor(path, flags, 0o600)
    with file as fd:
        os.write(fd, b"\n" + line + b"\n")
        size = os.fstat(fd).st_size
    if size >= _FILE_BYTES:
        # Of two processes that find it grown, the second may rename a file that was begun a moment ago.
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, f"{path}.{durable.new_id()}{_OLD}")
        _bound(cache)


def _bound(cache: CacheStore) -> None:
    """Remove this host's oldest files as far as all of them are too much."""
    files = sorted(_files(cache, cache.host_id), key=lambda each: each[1].st_mtime_ns, reverse=True)
    total = 0
    for path, status in files:
        total += status.st_size
        if total > _HOST_BYTES and path.endswith(_OLD):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def sweep(cache: CacheStore, *, now: float) -> None:
    """Remove what is older than ``history_age_seconds``, whichever host wrote it.

    A host that is silent for as long has no say in it any more. A host that writes on starts a new file
    when half of that time has passed, so that its old one can go.
    """
    age = cache.config.history_age_seconds
    with contextlib.suppress(OSError):
        for path, status in _files(cache, ""):
            with contextlib.suppress(OSError):  # what cannot be removed must not keep the others
                if now - status.st_mtime > age:
                    os.unlink(path)
                elif status.st_mtime > now + _AHEAD:
                    os.utime(path, (now, now), follow_symlinks=False)  # a wrong clock dated it
    with contextlib.suppress(OSError):
        path = cache.layout.history(cache.host_id)
        first = next(_parsed(path), None)
        # Its lines have the times of this host's clock, which may be another than the filesystem's.
        here = max(now, cache.host.clock())
        is_right = first is not None and here - age / 2 <= first.at <= here + _AHEAD
        if not is_right and os.stat(path).st_size:
            os.rename(path, f"{path}.{durable.new_id()}{_OLD}")


def read(cache: CacheStore, name: str) -> list[Happening]:
    """Return what happened to a base on all hosts, the oldest first.

    :raises OSError: the directory cannot be listed. A file that cannot be read is passed over.
    """
    found: list[Happening] = []
    for path, _status in _files(cache, ""):
        try:
            found.extend(each for each in _parsed(path) if each.name == name)
        except OSError as error:
            LOG.warning("A part of the history, %s, cannot be read: %s", path, error.strerror)
    return sorted(found, key=lambda each: each.at)


def _files(cache: CacheStore, host_id: str) -> list[tuple[str, os.stat_result]]:
    """Return the files of a host, or of all hosts for an empty id."""
    found = []
    try:
        entries = os.listdir(cache.layout.histories)
    except FileNotFoundError:
        return []
    for entry in entries:
        if entry.startswith(host_id):
            path = os.path.join(cache.layout.histories, entry)
            with contextlib.suppress(FileNotFoundError):
                found.append((path, os.stat(path, follow_symlinks=False)))
    return found


def _parsed(path: str) -> Iterator[Happening]:
    data = durable.read_file(path, limit=2 * _FILE_BYTES)
    for line in (data or b"").split(b"\n"):
        happening = parse(line)
        if happening is not None:
            yield happening


def parse(line: bytes) -> Happening | None:
    """Return what a line says, or None for one that is torn, empty or unknown."""
    try:
        fields: dict[str, Any] = json.loads(line)
        known = {field.name: fields[field.name] for field in dataclasses.fields(Happening)}
        happening = Happening(**known)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (happening.name, happening.what, happening.why, happening.host, happening.program)
    typed = all(type(text) is str for text in texts) and type(happening.process) is int
    if not typed or type(happening.at) not in (int, float) or not isinstance(happening.image_id, str | None):
        return None
    return happening if abs(happening.at) < _NO_TIME else None  # nor what is no number
