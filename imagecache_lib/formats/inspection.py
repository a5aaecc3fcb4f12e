# SPDX-License-Identifier: Apache-2.0
"""Decides whether content is an acceptable disk: as its bytes arrive, and again when all of them are there.

The rules are those of :data:`imagecache_lib.store.evidence.INSPECTION_RULES`: the content is exactly one
format, it is the one that was claimed, one file is all of it (:mod:`imagecache_lib.formats.contained`), and
what is stored as raw is not known to be something else than a disk (:mod:`imagecache_lib.formats.foreign`).
oslo.utils' inspectors tell formats apart. The content of a raw disk is not checked: only its guest reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
from collections.abc import Iterator

from oslo_utils.imageutils import format_inspector

from imagecache_lib import dates, errors
from imagecache_lib.config import CacheConfig
from imagecache_lib.formats import contained, foreign, vhd, vmdk
from imagecache_lib.formats.reader import NeedMore, OpenFile, Prefix, Reader

#: Formats that can become a disk, by the inspector's name, with qemu's name for them. A GPT or an ISO
#: image is the raw bytes of a disk. qemu knows vhd as vpc.
QEMU_FORMATS = {
    "raw": "raw",
    "gpt": "raw",
    "iso": "raw",
    "qcow2": "qcow2",
    "vmdk": "vmdk",
    "vhd": "vpc",
    "vhdx": "vhdx",
    "vdi": "vdi",
}

_RAW = frozenset(name for name, format in QEMU_FORMATS.items() if format == "raw")

#: What content a claimed disk format may turn out to be. Glance's ami, aki and ari are raw disks.
_ALLOWED = {
    "raw": {"raw", "gpt"},
    "ami": {"raw", "gpt"},
    "aki": {"raw", "gpt"},
    "ari": {"raw", "gpt"},
    "iso": {"iso", "gpt"},
    "vpc": {"vhd"},
}

#: What a claim may be for content of some format to be it.
_CLAIMS = frozenset(QEMU_FORMATS) - {"gpt"} | frozenset(_ALLOWED)

#: All formats show within this many bytes: the last is ISO 9660, whose first descriptor is at 32 KiB.
_SHOWN = 64 * 1024

#: What a header refers to may lie behind the data. It is not waited for longer than this; the whole file is
#: looked at in the end.
_UNDECIDED = 8 * 2**20

_RETRY_IS_USELESS = "have its owner upload a good image under a new id"


class Ending(enum.Enum):
    """Whether a fixed VHD's footer, which is no part of the disk, may follow the data."""

    NONE = enum.auto()
    POSSIBLE = enum.auto()
    DEMANDED = enum.auto()


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the content is.

    :param format: qemu's name for the format.
    :param virtual_size: as the header states it, in bytes, or None for a raw disk, and for a header that has
        not arrived yet.
    :param one_size: whether all programs that read the format read this size.
    :param ending: what may follow the data.
    """

    format: str
    virtual_size: int | None
    one_size: bool = True
    ending: Ending = Ending.NONE


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is acceptable on this host.

    :param vmdk_allowed_types: vmdk ``createType`` values to accept, in lower case.
    :param max_virtual_size: the largest disk to accept, in bytes.
    :param strict: whether the format must be the claimed one, and raw content must not look like something
        else than a disk. One file must be all of the disk in either case.
    """

    vmdk_allowed_types: frozenset[str]
    max_virtual_size: int
    strict: bool = True

    @classmethod
    def of(cls, config: CacheConfig, *, strict: bool | None = None) -> Rules:
        """Return the rules of a configuration.

        :param strict: overrides the configuration's own value, unless it is None.
        """
        return cls(
            frozenset(each.lower() for each in config.vmdk_allowed_types),
            config.max_virtual_size,
            not config.disable_deep_image_inspection if strict is None else strict,
        )

    def accept(self, claimed: str | None, start: bytes, *, vouched: bool = True) -> tuple[str, Ending]:
        """Return which format an image is accepted as, and what may follow its data.

        :param claimed: the disk format that the image's owner stated, or None if the owner stated none.
        :param start: the first bytes of the image, enough to show every format, or all of it.
        :param vouched: whether a digest says that this content is what is meant.
        :raises ImageRejected: the content is of no acceptable format, of another than was claimed, or of
            more than one.
        """
        found = detect(start)
        claimed = claimed if self.strict else None
        if found <= _RAW:
            what = foreign.recognise(start[: foreign.LOOKED_AT], vouched=vouched) if self.strict else None
            if what is not None:
                raise errors.ImageRejected(f"it is {what.what} and no disk", next_step=what.next_step)
            if claimed in ("vhd", "vpc"):
                return "vpc", Ending.DEMANDED
            return accept(claimed, found), Ending.POSSIBLE if claimed is None else Ending.NONE
        return accept(claimed, found), Ending.NONE

    def judge(self, image: Reader, format: str) -> Finding:
        """Return what an image's own header says of the disk.

        :param format: qemu's name of the format that the image was accepted as.
        :raises ImageRejected: the disk is not acceptable.
        :raises NeedMore: too little of the image has arrived to tell.
        """
        facts = contained.examine(image, format)
        if format == "vmdk" and (kind := vmdk.read(image).create_type) not in self.vmdk_allowed_types:
            raise errors.ImageRejected(
                f"its vmdk type {errors.shown(kind)} is not among the allowed ones",
                next_step="have its owner export it as streamOptimized, or extend vmdk_allowed_types",
            )
        if facts.virtual_size is not None and not 0 < facts.virtual_size <= self.max_virtual_size:
            has, most = dates.sizes(facts.virtual_size, self.max_virtual_size)
            raise errors.ImageRejected(
                f"its virtual size of {has} is absurd, the most is {most}",
                next_step=_RETRY_IS_USELESS,
            )
        return Finding(format, facts.virtual_size, facts.one_size)


def detect(start: bytes) -> frozenset[str]:
    """Return the names of all formats whose marks an image's beginning carries; ``raw`` if none.

    :param start: the first 64 KiB of the image, or all of it.
    """
    found = set()
    for name, kind in format_inspector.ALL_FORMATS.items():
        if name == "raw":
            continue
        inspector = kind()
        # An inspector that stumbles has not recognised the content; oslo.utils' own wrapper keeps that rule.
        with contextlib.suppress(Exception):
            inspector.eat_chunk(start)
        with contextlib.suppress(Exception):
            if inspector.format_match:
                found.add(name)
    # By their magic alone, whatever an inspector makes of what follows.
    if start.startswith(vmdk.MAGIC):
        found.add("vmdk")
    return frozenset(found or {"raw"})


def accept(claimed: str | None, found: frozenset[str]) -> str:
    """Return qemu's name of the one format that an image is.

    :param claimed: the disk format that the image's owner stated, or None if the owner stated none.
    :param found: names of all formats whose marks the image carries, as :func:`detect` returns them.
    :raises ImageRejected: the image is of no acceptable format, of another than was claimed, or of more
        than one.
    """
    names = ", ".join(sorted(found))
    if claimed is None and found <= _RAW:
        return "raw"  # whether it is called an ISO or a partitioned disk, the bytes are the disk
    if claimed is not None and not found <= _ALLOWED.get(claimed, {claimed}):
        advice = _RETRY_IS_USELESS
        if claimed not in _CLAIMS:
            kinds = ", ".join(sorted(_CLAIMS))
            raise errors.ImageRejected(
                f"its content is {names}, claimed to be {errors.shown(claimed)}, which is no format that is"
                " supported",
                next_step=f"have its owner state one of {kinds}",
            )
        if found <= _RAW and "iso" in found:
            advice = "have its owner state disk_format iso, or none"
        raise errors.ImageRejected(f"its content is {names}, claimed to be {claimed}", next_step=advice)
    if claimed == "iso":
        # A bootable ISO carries a partition table too; alone that would not make it an ISO.
        if "iso" not in found:
            raise errors.ImageRejected(
                f"its content is {names}, claimed to be iso", next_step=_RETRY_IS_USELESS
            )
        return "raw"
    if len(found) != 1:
        raise errors.ImageRejected(
            f"its content is several formats at once: {names}", next_step=_RETRY_IS_USELESS
        )
    (name,) = found
    if name not in QEMU_FORMATS:
        raise errors.ImageRejected(
            f"its format {name} is not supported", next_step="have its owner convert it to qcow2 or raw"
        )
    return QEMU_FORMATS[name]


class Inspection:
    """Inspects a stream of chunks.

    :param claimed: the image's disk format as Glance states it, or None if it states none.
    :param vouched: whether the content has a digest, which is compared elsewhere.
    """

    def __init__(self, claimed: str | None, rules: Rules, *, vouched: bool = True) -> None:
        self._vouched = vouched
        self._claimed = claimed
        self._rules = rules
        self._start = bytearray()
        self._accepted: tuple[str, Ending] | None = None
        #: What the content is, as soon as that is known.
        self.finding: Finding | None = None

    def feed(self, chunk: bytes) -> None:
        """Look at the next chunk.

        :raises ImageRejected: as soon as the content is known to be bad.
        """
        if self.finding is None:
            self._start += chunk
            if len(self._start) >= _SHOWN:
                self._decide(whole=False)

    def finish(self) -> Finding:
        """End the inspection after the last chunk, and return what the content is.

        :raises ImageRejected: the content is bad.
        """
        if self.finding is None:
            self._decide(whole=True)
        assert self.finding is not None
        return self.finding

    def close(self) -> None:
        """Free the memory that holds the beginning of the content."""
        self._start.clear()

    def _decide(self, *, whole: bool) -> None:
        if self._accepted is None:
            start = bytes(self._start[:_SHOWN])
            self._accepted = self._rules.accept(self._claimed, start, vouched=self._vouched)
        format, ending = self._accepted
        if ending is not Ending.NONE:
            self.finding = Finding(format, None, ending=ending)
        else:
            try:
                self.finding = self._rules.judge(Prefix(self._start, whole=whole), format)
            except NeedMore as error:
                if error.needed <= _UNDECIDED:
                    return
                # Behind what is waited for. The whole file is judged before anything is made of it.
                self.finding = Finding(format, None)
        self._start.clear()


class Uninspected:
    """Stands for an inspection where a file is taken as it is, such as a kernel."""

    finding: Finding | None = None

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk and do nothing with it."""

    def finish(self) -> None:
        """Return nothing, since nothing is known of the content."""

    def close(self) -> None:
        """Do nothing."""


def inspect_file(fd: int, claimed: str | None, rules: Rules, *, vouched: bool = True) -> Finding:
    """Inspect a file that is there, such as an adopted base, reading as little of it as needed.

    Returns what the content is.

    :param fd: a descriptor of the file, open for reading.
    :param claimed: the disk format that the image's owner stated, or None if the owner stated none.
    :param vouched: whether the content has a digest, which is compared elsewhere.
    :raises ImageRejected: the content is bad.
    """
    image = OpenFile(fd)
    format, ending = rules.accept(claimed, image.read(0, _SHOWN), vouched=vouched)
    size = os.fstat(fd).st_size
    end = image.read(max(size - vhd.FOOTER_BYTES, 0), vhd.FOOTER_BYTES)
    if rules.strict and format == "raw":
        foreign.refuse_end(end)
    if ending is Ending.DEMANDED:
        if vhd.is_fixed(end, size - vhd.FOOTER_BYTES):
            raise errors.ImageRejected("it is a fixed VHD, whose footer is no part of the disk")
        raise errors.ImageRejected(
            f"its content is raw, claimed to be {claimed}", next_step=_RETRY_IS_USELESS
        )
    return rules.judge(image, format)


def chunks_of(fd: int) -> Iterator[bytes]:
    """Yield a file's content from its start, in chunks of 1 MiB."""
    offset = 0
    while chunk := os.pread(fd, 2**20, offset):
        offset += len(chunk)
        yield chunk
