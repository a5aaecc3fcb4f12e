# SPDX-License-Identifier: Apache-2.0
"""Whether a host's disks and its base images fit together. Reads only, whoever made the directory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Sequence

from imagecache_lib import dates, errors, model
from imagecache_lib.diagnostics.preflight import Severity
from imagecache_lib.formats.qcow2 import header as qcow2_header
from imagecache_lib.formats.qcow2.header import HeaderError, NotQcow2
from imagecache_lib.store import layout, pins
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.upkeep import headers, inventory, references
from imagecache_lib.upkeep.scan import Scan

_HEAD = 2**20


@dataclasses.dataclass(frozen=True)
class AuditFinding:
    """One thing that was found.

    :param subject: path of a disk or a directory, or the name of an entry of the cache.
    :param text: what is so, as a clause.
    :param next_step: what to do about it. Empty: nothing.
    """

    severity: Severity
    subject: str
    text: str
    next_step: str = ""


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    :param findings: the worst first.
    :param bases: how many base images there are.
    :param overlays: how many disks refer to one, there or not.
    """

    findings: tuple[AuditFinding, ...]
    bases: int
    overlays: int


class _Audit(Scan):
    """The pass's reading of all disks, which here takes down every reference into the cache."""

    def __init__(self, cache: CacheStore, names: Collection[str]) -> None:
        super().__init__(cache, names, references.Memory())
        self.overlays: dict[str, tuple[str, str | None]] = {}
        self.findings: list[AuditFinding] = []
        self._base_path = os.path.realpath(cache.layout.base_path)

    def _refer(self, path: str, reference: bytes, pinned: str | None) -> None:
        super()._refer(path, reference, pinned)
        try:
            with open(path, "rb") as stream:
                header = qcow2_header.parse(stream.read(_HEAD))
        except (OSError, NotQcow2, HeaderError) as error:
            self._add(Severity.WARNING, path, f"its header cannot be read: {error}", "check the disk")
            return
        name = self._name_in_cache(path, reference)
        if name is None:
            return
        if pinned not in (None, "qcow2"):
            self._add(
                Severity.WARNING,
                path,
                f"disk.info says {pinned}, and its header says qcow2",
                "find out which is true; a guest may have written the header",
            )
        if pinned != "raw":
            format = header.backing_format
            self.overlays[path] = (name, None if format is None else format.decode("ascii", "replace"))

    def _name_in_cache(self, path: str, reference: bytes) -> str | None:
        for named in headers.named_files(path, reference):
            with contextlib.suppress(ValueError):
                directory, name = os.path.split(named)
                if os.path.realpath(directory) == self._base_path:
                    return name if layout.NAME_PATTERN.fullmatch(os.fsencode(name)) else None
        return None

    def _cannot_tell(self, path: str, error: OSError, next_step: str) -> None:
        self._add(Severity.ERROR, path, f"it cannot be read ({error.strerror})", next_step)

    def _everything_stays(self, why: str, next_step: str) -> None:
        self._add(Severity.ERROR, "", why, next_step)

    def _add(self, severity: Severity, subject: str, text: str, next_step: str) -> None:
        self.findings.append(AuditFinding(severity, subject, text, next_step))


def examine(cache: CacheStore, instances: Sequence[model.Instance] | None) -> AuditReport:
    """Compare the disks with the cache.

    :param instances: as the driver reports them. None: the disks are all that is known.
    :raises OSError: the cache itself cannot be read.
    """
    there = inventory.take(cache)
    names = {base.name for base in there.bases}
    scan = _Audit(cache, names)
    found = scan.run(instances or ())
    findings = list(scan.findings)
    images = dict(_images(instances or ()))
    for path, (name, format) in sorted(scan.overlays.items()):
        if name in names:
            findings.extend(_format(cache, path, name, format))
        else:
            image = f" of image {images[name]}" if name in images else ""
            findings.append(
                AuditFinding(
                    Severity.ERROR,
                    path,
                    f"its base image {name}{image} is missing",
                    "fetch it again before the disk is started, with ensure_backing",
                )
            )
    used = {name for each in found.readings.values() for name in each}
    used.update(name for name, _user in references.reported(names, instances or (), []))
    now = cache.host.clock()
    for base in there.bases:
        if base.name not in used and pins.reason(cache, base.name, now) is None:
            text = f"nothing refers to it: {base.allocated} bytes, last used {dates.date(base.last_use)}"
            findings.append(AuditFinding(Severity.INFO, base.name, text))
    findings.extend(_leftovers(cache, there, found.unfinished, now))
    rank = list(Severity)
    findings.sort(key=lambda each: (rank.index(each.severity), each.subject))
    return AuditReport(tuple(findings), len(names), len(scan.overlays))


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
    cache: CacheStore, there: inventory.Inventory, unfinished: Sequence[str], now: float
) -> Iterator[AuditFinding]:
    for each in there.foreign_stages:
        yield AuditFinding(Severity.INFO, each.name, f"unfinished, {_age(now - each.last_use)} old")
    for path in (*unfinished, *_stages(cache)):
        with contextlib.suppress(FileNotFoundError):
            age = _age(now - os.stat(path, follow_symlinks=False).st_mtime)
            yield AuditFinding(Severity.INFO, path, f"unfinished, {age} old")
    for name in there.unknown:
        yield AuditFinding(
            Severity.WARNING,
            name,
            "no base image, and nobody knows what it is",
            "find out who put it there, and move it away",
        )


def _stages(cache: CacheStore) -> list[str]:
    try:
        return sorted(cache.layout.stage(name) for name in os.listdir(cache.layout.stages))
    except FileNotFoundError:
        return []


def _age(seconds: float) -> str:
    return dates.span(max(0.0, seconds))
