# SPDX-License-Identifier: Apache-2.0
"""The qcow2 header: bytes in, values out. Facts from QEMU's docs/interop/qcow2.rst.

Everything a header says is hostile input: a guest can write one into its own disk. Parsing touches
nothing but the bytes it is given, and what is malformed raises :class:`HeaderError`.
"""

from __future__ import annotations

import dataclasses
import enum
import struct

from imagecache_lib import errors

MAGIC = b"QFI\xfb"
MIN_CLUSTER_BITS = 9
#: QEMU's limit (2 MiB); the format itself has none.
MAX_CLUSTER_BITS = 21
MAX_BACKING_NAME = 1023
#: QEMU's limit on the active L1 table.
MAX_L1_BYTES = 32 * 2**20
#: Where a file can end at most: offsets have a sign.
MAX_OFFSET = 2**63 - 1
#: Smallest cluster of an image with extended L2 entries: 32 subclusters of 512 bytes.
MIN_EXTENDED_CLUSTER_BITS = 14

EXTENSION_END = 0x00000000
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_ENCRYPTION = 0x0537BE77
EXTENSION_DATA_FILE = 0x44415441
_KNOWN_EXTENSIONS = frozenset(
    (
        EXTENSION_BACKING_FORMAT,
        EXTENSION_FEATURE_NAMES,
        EXTENSION_BITMAPS,
        EXTENSION_ENCRYPTION,
        EXTENSION_DATA_FILE,
    )
)

# Both start at byte 0; the second continues where version 2 ends.
V2_FIELDS = struct.Struct(">4sIQIIQIIQQIIQ")
V3_FIELDS = struct.Struct(">QQQII")
V2_LENGTH = V2_FIELDS.size
V3_LENGTH = V2_FIELDS.size + V3_FIELDS.size
_BACKING_FIELDS = struct.Struct(">4sIQII")
_EXTENSION = struct.Struct(">II")
_COMPRESSION_TYPE_AT = 104


class Incompatible(enum.IntFlag):
    """Feature bits that a reader must understand."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION_TYPE = 8
    EXTENDED_L2 = 16


KNOWN_INCOMPATIBLE = 31


class Compression(enum.IntEnum):
    """Values of ``compression_type``."""

    DEFLATE = 0
    ZSTD = 1


class NotQcow2(ValueError):
    """The data does not begin with qcow2's magic."""


class HeaderError(errors.ImageRejected):
    """The magic is there, and what follows is no header that QEMU would open."""


class Truncated(HeaderError):
    """More of the file is needed to tell. If that was all of it, the header is malformed.

    :ivar needed: how many bytes from the start of the file to pass next time; at most one cluster.
    """

    needed: int = 0


@dataclasses.dataclass(frozen=True)
class Header:
    """A parsed header. Offsets are bytes from the start of the file, sizes are bytes.

    ``virtual_size`` is as QEMU sees it, in whole sectors of 512 bytes. ``compression_type`` and the feature
    masks are kept as numbers, because a newer writer may use values that are unknown here.
    """

    version: int
    cluster_bits: int
    virtual_size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int
    snapshot_count: int
    snapshots_offset: int
    header_length: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    compression_type: int = Compression.DEFLATE
    backing_file_offset: int = 0
    #: The backing file's name, or None if the image has no backing file.
    backing_file: bytes | None = None
    #: Known header extensions by type, the last of each; unknown ones are ignored as the format demands.
    extensions: dict[int, bytes] = dataclasses.field(default_factory=dict)

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def backing_format(self) -> bytes | None:
        """The format that the backing file is to be opened with, or None if the header states none."""
        return self.extensions.get(EXTENSION_BACKING_FORMAT)

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have 128 bits, with 32 subclusters per cluster."""
        return bool(self.incompatible_features & Incompatible.EXTENDED_L2)

    @property
    def l2_entries(self) -> int:
        """How many clusters one L2 table maps."""
        return self.cluster_size // (16 if self.extended_l2 else 8)


def parse(data: bytes) -> Header:
    """Parse the header at the start of a file.

    :param data: the first bytes of the file, as many as there are at hand.
    :raises NotQcow2: the file does not begin with qcow2's magic.
    :raises Truncated: the header goes on behind ``data``.
    :raises HeaderError: QEMU would not open the image.
    """
    _check_start(data)
    _require(data, V2_LENGTH)
    (
        _magic,
        version,
        backing_offset,
        backing_size,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_offset,
        refcount_offset,
        refcount_clusters,
        snapshot_count,
        snapshots_offset,
    ) = V2_FIELDS.unpack_from(data)
    length, masks, refcount_order, compression = (
        _version_3(data) if version == 3 else (V2_LENGTH, (0, 0, 0), 4, 0)
    )
    cluster_size = 1 << cluster_bits
    if length > cluster_size:
        raise HeaderError(f"the qcow2 header of {length} bytes is larger than a cluster")
    backing = _backing_name(data, backing_offset, backing_size, cluster_size)
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        virtual_size=size // 512 * 512,
        crypt_method=crypt_method,
        l1_size=l1_size,
        l1_table_offset=l1_offset,
        refcount_table_offset=refcount_offset,
        refcount_table_clusters=refcount_clusters,
        refcount_order=refcount_order,
        snapshot_count=snapshot_count,
        snapshots_offset=snapshots_offset,
        header_length=length,
        incompatible_features=masks[0],
        compatible_features=masks[1],
        autoclear_features=masks[2],
        compression_type=compression,
        backing_file_offset=backing_offset,
        backing_file=backing,
        extensions=_extensions(data, length, backing_offset or cluster_size),
    )
    _check_consistency(header, size)
    return header


def backing_reference(data: bytes) -> bytes | None:
    """Return the backing file's name alone, for scanning many files: about a microsecond each.

    Returns None if the image has no backing file, or the file is not qcow2. Checks only the header fields
    that tell where the name is.

    :param data: the first bytes of the file. 4 KiB hold the name in what QEMU and this library write.
    :raises Truncated: the name lies behind ``data``; read as much as its ``needed`` says and ask again.
    :raises HeaderError: QEMU would not open an image with this header, so the name cannot be told.
    """
    if not data.startswith(MAGIC):
        return None
    _check_start(data)
    _, _, offset, size, cluster_bits = _BACKING_FIELDS.unpack_from(data)
    return _backing_name(data, offset, size, 1 << cluster_bits)


def _check_start(data: bytes) -> None:
    """Check what everything else depends on: magic, version and cluster size."""
    if not data.startswith(MAGIC):
        raise NotQcow2("no qcow2 magic")
    _require(data, _BACKING_FIELDS.size)
    _, version, _, _, cluster_bits = _BACKING_FIELDS.unpack_from(data)
    if version not in (2, 3):
        raise HeaderError(f"qcow2 version {version} is unknown")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise HeaderError(f"qcow2 cluster size of 2**{cluster_bits} bytes is out of range")


def _require(data: bytes, needed: int) -> None:
    if len(data) < needed:
        error = Truncated(f"the qcow2 header is cut off: {needed} bytes needed, {len(data)} there")
        error.needed = needed
        raise error


def _version_3(data: bytes) -> tuple[int, tuple[int, int, int], int, int]:
    """Return header length, feature masks, refcount order and compression type."""
    _require(data, V3_LENGTH)
    incompatible, compatible, autoclear, refcount_order, length = V3_FIELDS.unpack_from(data, V2_LENGTH)
    if length < V3_LENGTH or length % 8:
        raise HeaderError(f"qcow2 header length {length} is impossible")
    compression = 0
    if length > _COMPRESSION_TYPE_AT:
        _require(data, _COMPRESSION_TYPE_AT + 1)
        compression = data[_COMPRESSION_TYPE_AT]
    return length, (incompatible, compatible, autoclear), refcount_order, compression


def _backing_name(data: bytes, offset: int, size: int, cluster_size: int) -> bytes | None:
    if not offset:
        return None
    # QEMU limits the name to the first cluster, whatever its length field says.
    if size > MAX_BACKING_NAME or offset + size > cluster_size:
        raise HeaderError("the qcow2 backing file name lies outside of the first cluster or is too long")
    if not size:
        return None
    _require(data, offset + size)
    return bytes(data[offset : offset + size])


def _extensions(data: bytes, start: int, end: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while start + _EXTENSION.size <= end:
        _require(data, start + _EXTENSION.size)
        kind, length = _EXTENSION.unpack_from(data, start)
        if kind == EXTENSION_END:
            break
        start += _EXTENSION.size
        if length > end - start:
            raise HeaderError("a qcow2 header extension is larger than its room")
        if kind in _KNOWN_EXTENSIONS:
            _require(data, start + length)
            found[kind] = bytes(data[start : start + length])
        start += (length + 7) // 8 * 8
    return found


def _check_consistency(header: Header, size: int) -> None:
    if header.crypt_method > 2:
        raise HeaderError(f"qcow2 encryption method {header.crypt_method} is unknown")
    if header.refcount_order > 6:
        raise HeaderError(f"qcow2 refcount order {header.refcount_order} is out of range")
    if header.extended_l2 and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise HeaderError("qcow2 clusters are too small for extended L2 entries")
    if bool(header.incompatible_features & Incompatible.COMPRESSION_TYPE) != bool(header.compression_type):
        raise HeaderError("the qcow2 compression type contradicts its feature bit")
    if header.l1_size * 8 > MAX_L1_BYTES:
        raise HeaderError(f"the qcow2 L1 table of {header.l1_size} entries is too large")
    if header.l1_table_offset + header.l1_size * 8 > MAX_OFFSET:
        raise HeaderError(f"the qcow2 L1 table at {header.l1_table_offset} lies outside of any file")
    if header.l1_table_offset % header.cluster_size:
        raise HeaderError("the qcow2 L1 table is not aligned to a cluster")
    if size > header.l1_size * header.l2_entries * header.cluster_size:
        raise HeaderError(f"the qcow2 L1 table is too small for a virtual size of {size} bytes")
    if len(header.backing_format or b"") > 15:
        raise HeaderError("the qcow2 backing format's name is too long")
