# SPDX-License-Identifier: Apache-2.0
"""What a host's last pass saw of its disks, and what its driver last reported. Kept in ``hosts/<id>.scan``.

The driver's report is remembered for those who evict between two passes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from imagecache_lib import model
from imagecache_lib.store import layout
from imagecache_lib.store.last_scan_form import (
    OURS,
    is_written,
    parse,
    parse_readings,
    readings_to_json,
    to_json,
)
from imagecache_lib.store.seen import Identity, LastScan, SeenDirectory, SeenDisk
from imagecache_lib.system import durable

_T = TypeVar("_T")

#: How often what other processes wrote at the same time is merged before it is left to them.
_MOST_TURNS = 100

#: How often both files are read again where one of them says that the other must be there, and it is not.
_MORE_TURNS = 2

#: The most bytes that a file of a last scan is read for: two million disks take less.
_LIMIT = 2**28


class Parsed:
    """The last scan that was parsed last: most passes find the file as the pass before left it."""

    def __init__(self) -> None:
        self._found: LastScan | None = None

    def parse(self, data: bytes) -> LastScan | None:
        """Return what :func:`parse` does."""
        found = self._found
        if found is None or found.data != data:
            found = self._found = parse(data)
        return found


def load_last_scan(
    where: layout.Layout,
    host_id: str,
    roots: Mapping[str, tuple[int, int]],
    *,
    parsed: Parsed | None = None,
) -> LastScan:
    """Return what the last pass of a host saw, this release's or an older one's.

    An older release rewrites ``hosts/<id>.readings`` and knows nothing of ``hosts/<id>.scan``: a disk that
    only it saw is remembered without the identity of its directory, and counts until it is seen again.

    :param roots: ``(st_dev, f_fsid)`` by disk root, as the host's file has them, for roots that only an older
        release saw.
    :param parsed: keeps what is parsed, for the next call.
    """
    parsed = parsed or Parsed()
    both = _Both(where, host_id, parsed)
    for _turn in range(_MORE_TURNS):
        if both.known is not None or OURS not in (both.readings or {}):
            break
        # Another process of this release has written the one that comes first too, by now.
        both = _Both(where, host_id, parsed)
    known, problem, readings, old_problem = both.known, both.problem, both.readings, both.old_problem
    if known is not None and both.is_whole:
        return dataclasses.replace(known, is_whole=True)
    if known is not None and readings is not None and OURS in readings:
        # Another process of this release wrote it, for which the other file speaks: with identities.
        return known
    if problem is not None and readings is None:
        return LastScan(unreadable=problem)
    if old_problem is not None and known is None:
        return LastScan(unreadable=old_problem)
    last = known or LastScan()
    old_roots = {path: Identity(device, 0, fsid) for path, (device, fsid) in roots.items()}
    old_disks = {
        path: SeenDisk(path, names, SeenDirectory(os.path.dirname(path), None))
        for path, names in (readings or {}).items()
        if path not in last.disks and path != OURS
    }
    return dataclasses.replace(
        last,
        disks={**old_disks, **last.disks} if old_disks else last.disks,
        roots={**old_roots, **last.roots},
        report_unknown=problem,
    )


class _Both:
    """One reading of both files of a host.

    :ivar known: what ``hosts/<id>.scan`` says, or None if it is not there or cannot be read.
    :ivar problem: why it cannot be told, as a clause.
    :ivar readings: what ``hosts/<id>.readings`` says, or None likewise.
    :ivar old_problem: why that cannot be told, as a clause.
    :ivar is_whole: both say the same.
    """

    def __init__(self, where: layout.Layout, host_id: str, parsed: Parsed) -> None:
        self.known, self.problem = _read(where.last_scan(host_id), parsed.parse)
        path = where.readings(host_id)
        data, self.old_problem = _data(path)
        mark = self.known.fields.get("readings") if self.known is not None else None
        self.is_whole = data is not None and mark == _digest(data)
        self.readings = parse_readings(data) if data is not None and not self.is_whole else None
        if data is not None and not self.is_whole and self.readings is None:
            self.old_problem = f"what the last pass saw cannot be read: {path} is damaged"


def save_last_scan(where: layout.Layout, host_id: str, before: LastScan, last: LastScan) -> None:
    """Write down what a pass saw, for this release and in the older one's form.

    Another process of this host may have written meanwhile what it saw, maybe with other disk roots: disks
    and roots that only it knows are kept.

    :param before: what :func:`load_last_scan` returned when the pass began.
    :raises OSError: it cannot be written.
    """
    path = where.last_scan(host_id)
    data, _problem = _data(path)
    if data is not None and data == before.data:
        if before.is_whole and is_written(last, before):
            os.utime(path)  # nothing has changed; when the pass was is told
            return
    elif data is not None:
        last = _merged(last, before, parse(data))
    for _turn in range(_MOST_TURNS):
        readings = readings_to_json(last)
        # The one that has the identities comes first: a crash in between leaves no disk that is in neither.
        replaced = durable.exchange_file(path, to_json(last, _digest(readings)), limit=_LIMIT)
        durable.write_file(where.readings(host_id), readings)
        if replaced == data or replaced is None:
            return
        # Another process wrote between our look and this: what it saw is put back beside what we saw.
        data = to_json(last, _digest(readings))
        last = _merged(last, before, parse(replaced))


def with_unsaved(known: LastScan, before: LastScan, last: LastScan) -> LastScan:
    """Return what is known of the last pass with what a pass of this process saw and could not write down.

    :param known: what :func:`load_last_scan` returns now.
    :param before: what it returned when that pass began.
    :param last: what that pass saw.
    """
    merged = _merged(last, before, known)
    return dataclasses.replace(
        known,
        disks=merged.disks,
        covered=merged.covered,
        roots=merged.roots,
        lost=merged.lost,
        report=merged.report,
        is_whole=False,
    )


def _merged(last: LastScan, before: LastScan, now: LastScan | None) -> LastScan:
    """Return what a pass saw with what another process wrote down meanwhile.

    :param before: what was known when the pass began: what is in it and not in ``last`` is gone, unless the
        other process saw another file there since.
    """
    if now is None:
        return last

    def is_news(seen: SeenDisk) -> bool:
        known = before.disks.get(seen.path)
        facts = (seen.names, seen.inode, seen.born)
        return known is None or (known.names, known.inode, known.born) != facts

    news = [seen for seen in now.disks.values() if is_news(seen)]
    foreign = {seen.path: seen for seen in news}
    covered = [seen for seen in now.covered if seen not in before.covered]
    covered += [
        seen for seen in news if seen.path in last.disks and not _is_told_by(seen, last.disks[seen.path])
    ]
    new_roots = {root: identity for root, identity in now.roots.items() if root not in before.roots}
    return dataclasses.replace(
        last,
        disks={**foreign, **last.disks},
        covered=(*last.covered, *covered),
        roots={**new_roots, **last.roots},
        report=_reported(last, before, now),
    )


def _reported(last: LastScan, before: LastScan, now: LastScan) -> Sequence[model.Instance] | None:
    """Return what the driver reported to a pass, with what it reported to another process meanwhile.

    Which of the two asked it later is unknown: that pass may have been stopped since.
    """
    if last.report is None or now.report is None or now.data == before.data:
        return last.report if last.report is not None else now.report
    known = [{each.uuid: each for each in report} for report in (before.report or (), last.report)]
    news = [each for each in now.report if all(report.get(each.uuid) != each for report in known)]
    return (*last.report, *news) if news else last.report


def _is_told_by(seen: SeenDisk, other: SeenDisk) -> bool:
    """Whether what two processes saw at one path was in the same directory, and needs no base besides."""
    return seen.directory.identity == other.directory.identity and set(seen.names) <= set(other.names)


def _digest(readings: bytes) -> str:
    return hashlib.sha256(readings).hexdigest()


def _data(path: str) -> tuple[bytes | None, str | None]:
    """Return a file's bytes, and why it cannot be read, as a clause.

    Returns None for both if there is no such file.
    """
    try:
        data = durable.read_file(path, limit=_LIMIT)
        if data is None and not stat.S_ISREG(os.lstat(path).st_mode):
            return None, f"what the last pass saw cannot be read: {path} is no file"
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"what the last pass saw cannot be read: {path}: {error.strerror}"
    return data, None


def _read(path: str, parsed: Callable[[bytes], _T | None]) -> tuple[_T | None, str | None]:
    """Return a file's content, and why it cannot be told, as a clause.

    Returns None for both if there is no such file.
    """
    data, problem = _data(path)
    if data is None:
        return None, problem
    found = parsed(data)
    return found, None if found is not None else f"what the last pass saw cannot be read: {path} is damaged"


def load_readings(where: layout.Layout, host_id: str) -> dict[str, tuple[str, ...]]:
    """Return the names by path of disk that a host's last pass saw. What cannot be read says nothing."""
    readings, _problem = _read(where.readings(host_id), parse_readings)
    return {path: names for path, names in (readings or {}).items() if path != OURS}
