# SPDX-License-Identifier: Apache-2.0
"""Tells whether a host's disks and its base images fit together. Reads only, whoever made the directory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence

from imagecache_lib import dates, errors, model
from imagecache_lib.diagnostics.preflight import Severity
from imagecache_lib.formats.qcow2 import header as qcow2_header
from imagecache_lib.formats.qcow2.header import HeaderError, NotQcow2
from imagecache_lib.store import layout, pins
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.upkeep import headers, inventory, references
from imagecache_lib.upkeep.facts import (
    Fact,
    MissingInstance,
    MissingRoot,
    Overlay,
    Unfinished,
    Unreadable,
    Unsettled,
)
from imagecache_lib.upkeep.follow import NO_ANSWER, Follower
from imagecache_lib.upkeep.names import Names
from imagecache_lib.upkeep.scan import Scan

_HEAD = 2**20


@dataclasses.dataclass(frozen=True)
class AuditFinding:
    """One thing that was found.

    :param subject: path of a disk or a directory, or the name of an entry of the cache.
    :param text: what was found, as a clause.
    :param next_step: what to do about it; empty if there is nothing to do.
    """

    severity: Severity
    subject: str
    text: str
    next_step: str = ""


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    :param findings: the worst first.
    :param bases: how many base images the cache has.
    :param overlays: how many disks refer to a base image of the cache, missing ones included.
    """

    findings: tuple[AuditFinding, ...]
    bases: int
    overlays: int


@dataclasses.dataclass(frozen=True)
class _Disk:
    """An overlay of a base that is or should be in the cache.

    :param name: the base's name.
    :param format: the base's format as the overlay's header states it, or None if the header states none.
    """

    path: str
    name: str
    format: str | None


def examine(cache: CacheStore, instances: Sequence[model.Instance] | None) -> AuditReport:
    """Compare the disks with the cache, and return what was found. Changes nothing.

    :param instances: the instances that the driver reports, or None if only the disks are known.
    :raises OSError: the cache directory cannot be read.
    """
    there = inventory.take(cache)
    names = {base.name for base in there.bases}
    wanted = Names(names)
    follower = Follower()
    found = Scan(cache, condense=wanted.condense, follower=follower).run(instances or ())
    findings = list(_unreadable(found.facts))
    overlays: dict[str, _Disk] = {}
    used: set[str] = set()
    base_path = os.path.realpath(cache.layout.base_path)
    for fact in found.facts:
        if isinstance(fact, Overlay):
            used |= wanted.find(fact.references)
            disk = _examined(fact, base_path, findings, follower)
            if disk is not None:
                overlays[disk.path] = disk
    images = dict(_images(instances or ()))
    for path, disk in sorted(overlays.items()):
        name = disk.name
        if name in names:
            findings.extend(_format(cache, path, name, disk.format))
        else:
            image = f" of image {images[name]}" if name in images else ""
            findings.append(
                AuditFinding(
                    Severity.ERROR,
                    path,
                    f"its base image {name}{image} is missing",
                    f"before the disk is started, run: imagecache disk repair {shlex.quote(path)}",
                )
            )
    used.update(name for name, _user in references.reported(names, instances or (), []))
    now = cache.host.clock()
    for base in there.bases:
        findings.extend(_damage(cache, base.name))
        if base.name not in used and pins.look(cache, base.name, now) is None:
            text = (
                f"nothing refers to it: {dates.size(base.allocated)}, last used {dates.date(base.last_use)}"
            )
            findings.append(AuditFinding(Severity.INFO, base.name, text))
    unfinished = sorted({fact.path for fact in found.facts if isinstance(fact, Unfinished)})
    findings.extend(_leftovers(cache, there, unfinished, follower))
    rank = list(Severity)
    findings.sort(key=lambda each: (rank.index(each.severity), each.subject))
    return AuditReport(tuple(findings), len(names), len(overlays))


def _unreadable(facts: Iterable[Fact]) -> Iterator[AuditFinding]:
    """Yield what keeps the periodic pass from telling which bases are referred to."""
    for fact in facts:
        if isinstance(fact, Unreadable):
            next_step = "remove it, or move it up or away" if fact.too_deep else "make it readable"
            yield AuditFinding(Severity.ERROR, fact.path, f"it cannot be read ({fact.cause})", next_step)
        elif isinstance(fact, MissingRoot):
            next_step = "mount it, or take it out of disk_roots"
            yield AuditFinding(Severity.ERROR, fact.path, f"it cannot be read ({fact.cause})", next_step)
        elif isinstance(fact, MissingInstance):
            yield AuditFinding(
                Severity.ERROR,
                "",
                f"instance {fact.uuid} is on this host and has no directory",
                "mount its disk root, add it to disk_roots, or correct what the driver reports",
            )
        elif isinstance(fact, Unsettled):
            yield AuditFinding(
                Severity.ERROR, fact.path, "it changed all the while it was read", "audit again"
            )


def _examined(
    overlay: Overlay, base_path: str, findings: list[AuditFinding], follower: Follower
) -> _Disk | None:
    """Return what a disk says of its base. Returns None if its base is not in this cache.

    :param findings: what is wrong with the disk's header is added to these.
    """
    path = overlay.path
    try:
        # Its server may have ceased to answer since it was found.
        heads = follower.inside.call(lambda: _head(path))
        if not heads:
            raise OSError(NO_ANSWER)
        head, is_device = heads[0]
        if is_device and not head.startswith(qcow2_header.MAGIC):
            return None  # what it is made of refers to the base
        header = qcow2_header.parse(head)
    except (OSError, NotQcow2, HeaderError) as error:
        text = f"its header cannot be read: {error}"
        findings.append(AuditFinding(Severity.WARNING, path, text, "check the disk"))
        return None
    name = _name_in_cache(path, overlay.references[0], base_path)
    if name is None:
        return None
    pinned = follower.pinned(path)
    if pinned not in (None, "qcow2"):
        findings.append(
            AuditFinding(
                Severity.WARNING,
                path,
                f"disk.info says {pinned}, and its header says qcow2",
                "find out which is true; a guest may have written the header",
            )
        )
    if pinned == "raw":
        return None
    format = header.backing_format
    return _Disk(path, name, None if format is None else format.decode("ascii", "replace"))


def _head(path: str) -> tuple[bytes, bool]:
    """Return the first bytes of a disk, none if it cannot be read, and whether it is a block device."""
    try:
        with open(path, "rb") as stream:
            return stream.read(_HEAD), stat.S_ISBLK(os.fstat(stream.fileno()).st_mode)
    except OSError:
        return b"", False


def _name_in_cache(path: str, reference: bytes, base_path: str) -> str | None:
    for named in headers.named_files(path, reference):
        with contextlib.suppress(ValueError):
            directory, name = os.path.split(named)
            if os.path.realpath(directory) == base_path:
                return name if layout.NAME_PATTERN.fullmatch(os.fsencode(name)) else None
    return None


def _damage(cache: CacheStore, name: str) -> Iterator[AuditFinding]:
    with contextlib.suppress(errors.CacheEntryError):  # said where its format is looked at
        record = cache.evidence_of(name)
        if record is not None and record.damaged:
            yield AuditFinding(
                Severity.ERROR,
                name,
                "a scrub found it damaged on disk: disks that need it may read wrong bytes",
                "restore or rebuild the instances that use it, then evict it",
            )


def _images(instances: Iterable[model.Instance]) -> Iterator[tuple[str, str]]:
    for instance in instances:
        for image_id in instance.images:
            with contextlib.suppress(errors.ImageRejected):
                yield layout.base_name(image_id), image_id


def _format(cache: CacheStore, path: str, name: str, format: str | None) -> Iterator[AuditFinding]:
    """Yield what is wrong with the format that an overlay says its base has."""
    if format is None:
        yield AuditFinding(
            Severity.WARNING,
            path,
            "its header does not say which format its base image has",
            "write it into the header with qemu-img rebase -u -F while the disk is not in use",
        )
        return
    try:
        opened = cache.open_base(name)
        if opened is None:
            return
        with contextlib.closing(opened):
            record = cache.record_of(opened)
            is_qcow2 = os.pread(opened.fd, 4, 0) == qcow2_header.MAGIC
    except (OSError, errors.CacheEntryError) as error:
        yield AuditFinding(Severity.ERROR, name, str(error), "make it readable")
        return
    held = record.stored_format if record is not None else "qcow2" if is_qcow2 else "raw"
    if format != held and (record is not None or is_qcow2 or format == "qcow2"):
        yield AuditFinding(
            Severity.ERROR,
            path,
            f"its header says that its base image {name} is {format}, and it is {held}",
            "do not start it; find out which base image it was made on",
        )


def _leftovers(
    cache: CacheStore, there: inventory.Inventory, unfinished: Sequence[str], follower: Follower
) -> Iterator[AuditFinding]:
    now = cache.host.clock()
    for each in there.foreign_stages:
        yield AuditFinding(Severity.INFO, each.name, f"unfinished, {_age(now - each.last_use)} old")
    for path in (*unfinished, *_stages(cache)):
        for changed in follower.inside.call(lambda path=path: _changed(path)):  # type: ignore[misc]
            if changed is not None:
                yield AuditFinding(Severity.INFO, path, f"unfinished, {_age(now - changed)} old")
    for name in there.unknown:
        yield AuditFinding(
            Severity.WARNING,
            name,
            "no base image, and not known what it is",
            "find out who put it there, and move it away",
        )


def _changed(path: str) -> float | None:
    """Return when a file was last written, in epoch seconds, or None if it cannot be told."""
    try:
        return os.stat(path, follow_symlinks=False).st_mtime
    except OSError:
        return None


def _stages(cache: CacheStore) -> list[str]:
    try:
        return sorted(cache.layout.stage(name) for name in os.listdir(cache.layout.stages))
    except FileNotFoundError:
        return []


def _age(seconds: float) -> str:
    return dates.span(max(0.0, seconds))
