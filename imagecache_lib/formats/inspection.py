# SPDX-License-Identifier: Apache-2.0
"""Is this content an acceptable disk? oslo.utils' format inspectors, fed as the bytes flow.

The rules are those of :data:`imagecache_lib.store.evidence.INSPECTION_RULES`: the content is exactly one
format, it is the one that was claimed, and it is safe to hand to qemu. The first kilobytes settle it for
every format but vmdk, whose footer is checked too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from oslo_utils.imageutils import format_inspector

from imagecache_lib import errors

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

#: What content a claimed disk format may turn out to be. Glance's ami, aki and ari are raw disks.
_ALLOWED = {
    "raw": {"raw", "gpt"},
    "ami": {"raw", "gpt"},
    "aki": {"raw", "gpt"},
    "ari": {"raw", "gpt"},
    "iso": {"iso", "gpt"},
    "vpc": {"vhd"},
}

#: Every inspector but vmdk's decides within this many bytes, for images that a tool wrote.
_UNDECIDED = 8 * 2**20

_RETRY_IS_USELESS = "have its owner upload a good image under a new id"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the content is.

    :param format: qemu's name for it.
    :param virtual_size: as the header states it, in bytes. None where the header has none (raw).
    :param complete: False for a format whose end must be seen before it is known to be safe.
    """

    format: str
    virtual_size: int | None
    complete: bool


def accept(claimed: str | None, found: set[str]) -> str:
    """Return which of the formats found the image is.

    :param claimed: the disk format that the image's owner stated. None: not stated.
    :param found: names of all inspectors that matched.
    :raises ImageRejected: nothing acceptable, something else than claimed, or more than one.
    """
    allowed = _ALLOWED.get(claimed, {claimed}) if claimed is not None else set(QEMU_FORMATS)
    names = ", ".join(sorted(found))
    if not found <= allowed:
        said = f"claimed to be {claimed}" if claimed is not None else "of no claimed format"
        raise errors.ImageRejected(f"its content is {names}, {said}", next_step=_RETRY_IS_USELESS)
    if claimed == "iso":
        # A bootable ISO carries a partition table too; alone that would not make it an ISO.
        if "iso" not in found:
            raise errors.ImageRejected(
                f"its content is {names}, claimed to be iso", next_step=_RETRY_IS_USELESS
            )
        return "iso"
    if len(found) != 1:
        raise errors.ImageRejected(
            f"its content is several formats at once: {names}", next_step=_RETRY_IS_USELESS
        )
    (name,) = found
    if name not in QEMU_FORMATS:
        raise errors.ImageRejected(f"its format {name} is not supported", next_step=_RETRY_IS_USELESS)
    return name


class Inspection:
    """Inspects a stream of chunks that somebody else pulls.

    :param claimed: Glance's disk format, or None.
    :param vmdk_allowed_types: vmdk ``createType`` values to accept.
    :param max_virtual_size: in bytes.
    :param strict: False: only find out what it is; neither the claim nor the safety of the content counts.
    """

    def __init__(
        self,
        claimed: str | None,
        *,
        vmdk_allowed_types: tuple[str, ...],
        max_virtual_size: int,
        strict: bool = True,
    ) -> None:
        self._claimed = claimed if strict else None
        self._strict = strict
        self._vmdk_types = {each.lower() for each in vmdk_allowed_types}
        self._max_virtual_size = max_virtual_size
        self._chunk = b""
        # InspectWrapper pulls from its source; ours holds the one chunk that was pushed.
        self._wrapper = format_inspector.InspectWrapper(cast(IO[bytes], _Pushed(lambda: self._chunk)))
        # The wrapper settles on vmdk only at the end, when it has seen the footer. Its beginning tells enough
        # to know what to do with the bytes meanwhile.
        self._vmdk = format_inspector.VMDKInspector()
        self._seen = 0
        self._finding: Finding | None = None

    def feed(self, chunk: bytes) -> Finding | None:
        """Look at the next chunk. Returns the finding once there is one.

        :raises ImageRejected: as soon as the content is known to be bad.
        """
        if self._finding is not None and self._finding.complete:
            return self._finding
        self._chunk = chunk
        self._wrapper.read(len(chunk))
        if self._finding is None:
            self._seen += len(chunk)
            self._finding = self._decide() or self._expect_vmdk(chunk)
            if self._finding is None and self._seen > _UNDECIDED:
                raise errors.ImageRejected(
                    f"its format cannot be told from its first {_UNDECIDED} bytes",
                    next_step=_RETRY_IS_USELESS,
                )
        return self._finding

    def _expect_vmdk(self, chunk: bytes) -> Finding | None:
        try:
            self._vmdk.eat_chunk(chunk)
        except Exception:  # whatever it is, it is no vmdk; the wrapper keeps the same rule
            return None
        if not self._vmdk.format_match or not self._vmdk.desc_text:
            return None
        accept(self._claimed, {"vmdk"})
        with _stumbling("vmdk"):
            self._check_vmdk(self._vmdk)
            self._check_virtual_size(self._vmdk.virtual_size)
            return Finding("vmdk", self._vmdk.virtual_size, complete=False)

    def finish(self) -> Finding:
        """Decide at the end of the data.

        :raises ImageRejected: the content is bad.
        """
        self._wrapper.close()
        if self._finding is None or not self._finding.complete:
            self._finding = self._decide()
        assert self._finding is not None
        return self._finding

    def _decide(self) -> Finding | None:
        matches = self._wrapper.formats
        if matches is None:
            return None
        by_name = {str(each): each for each in matches}
        name = accept(self._claimed, set(by_name))
        inspector = by_name[name]
        with _stumbling(name):
            if name == "vmdk":
                self._check_vmdk(inspector)
            if self._strict:
                _check_safety(inspector, name)
            virtual_size = None if QEMU_FORMATS[name] == "raw" else int(inspector.virtual_size)
        if virtual_size is not None:
            self._check_virtual_size(virtual_size)
        return Finding(QEMU_FORMATS[name], virtual_size, complete=True)

    def _check_virtual_size(self, virtual_size: int) -> None:
        if not 0 < virtual_size <= self._max_virtual_size:
            raise errors.ImageRejected(
                f"its virtual size of {virtual_size} bytes is absurd, the most is {self._max_virtual_size}",
                next_step=_RETRY_IS_USELESS,
            )

    def _check_vmdk(self, inspector: Any) -> None:
        if inspector.vmdktype not in self._vmdk_types:
            raise errors.ImageRejected(
                f"its vmdk type {inspector.vmdktype!r} is not among the allowed ones",
                next_step="upload it as streamOptimized, or extend vmdk_allowed_types",
            )
        try:
            inspector.check_descriptor()
        except format_inspector.SafetyViolation as error:
            raise errors.ImageRejected(f"unsafe vmdk: {error}", next_step=_RETRY_IS_USELESS) from error


@contextlib.contextmanager
def _stumbling(name: str) -> Iterator[None]:
    """Reject what makes an inspector fail: a header that matches, and lacks or contradicts what follows."""
    try:
        yield
    except errors.ImageCacheError:
        raise
    except Exception as error:
        raise errors.ImageRejected(
            f"broken {name}: its inspection ends with {type(error).__name__}: {error}",
            next_step=_RETRY_IS_USELESS,
        ) from error


def _check_safety(inspector: Any, name: str) -> None:
    try:
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as error:
        failures = "; ".join(f"{check}: {why}" for check, why in sorted(error.failures.items()))
        raise errors.ImageRejected(f"unsafe {name}: {failures}", next_step=_RETRY_IS_USELESS) from error
    except format_inspector.ImageFormatError as error:
        raise errors.ImageRejected(f"broken {name}: {error}", next_step=_RETRY_IS_USELESS) from error


class _Pushed:
    """A source for InspectWrapper that gives the chunk at hand."""

    def __init__(self, chunk: Callable[[], bytes]) -> None:
        self._current = chunk

    def read(self, _size: int) -> bytes:
        return self._current()


def inspect_file(
    fd: int,
    claimed: str | None,
    *,
    vmdk_allowed_types: tuple[str, ...],
    max_virtual_size: int,
    strict: bool = True,
) -> Finding:
    """Inspect a file that is there, such as an adopted base, reading as little as settles it.

    :raises ImageRejected: the content is bad.
    """
    inspection = Inspection(
        claimed, vmdk_allowed_types=vmdk_allowed_types, max_virtual_size=max_virtual_size, strict=strict
    )
    for chunk in chunks_of(fd):
        finding = inspection.feed(chunk)
        if finding is not None and finding.complete:
            return finding
    return inspection.finish()


def chunks_of(fd: int) -> Iterator[bytes]:
    """Yield a file's content from its start, in chunks of 1 MiB."""
    offset = 0
    while chunk := os.pread(fd, 2**20, offset):
        offset += len(chunk)
        yield chunk
