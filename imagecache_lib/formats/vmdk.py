# SPDX-License-Identifier: Apache-2.0
"""VMDK images that are one file: a hosted sparse extent with its descriptor in it.

Facts from VMware's "Virtual Disk Format 5.0" technical note: the sparse extent's header, the embedded
descriptor, and the footer that takes the header's place where ``gdOffset`` is all ones. A descriptor is bytes
here: what it names may be written in any alphabet, and nothing is looked up by it.
"""

from __future__ import annotations

import dataclasses
import re
import struct

from imagecache_lib import errors
from imagecache_lib.formats.reader import Reader

MAGIC = b"KDMV"
_SECTOR = 512
_HEADER = struct.Struct("<4sIIQQQQIQQ13xH")
_GD_AT_END = 2**64 - 1
#: The footer, which is a header, lies before the last sector and behind a marker of its own.
_FOOTER_FROM_END = 2 * _SECTOR
_MARKER_FROM_END = 3 * _SECTOR
_FOOTER_MARKER = 3
#: Of the header's flags: grains are compressed, and begin with a marker.
_COMPRESSED = 1 << 16
#: The only way in which they are compressed.
_DEFLATE = 1
#: Most sectors of a compressed grain. All of one is unpacked, and held in memory, for each piece that is read
#: of it, so that a large one costs the square of its size. VMware's programs and QEMU write 128.
_MOST_COMPRESSED = 2048
#: Bytes before the data of a compressed grain.
MARKER_BYTES = 12
#: Most grains of one grain table, and the usual number.
_TABLE_ENTRIES = 512

#: What is looked through for a parent: more than the header says, as a reader may look further than that, and
#: there where all writers put the descriptor, as a reader may look there whatever the header says.
_LOOKED_THROUGH = 20 * _SECTOR
_USUAL_DESCRIPTOR = _SECTOR
_MOST_DESCRIPTOR = 2**20
_LAST_DESCRIPTOR = 8 * 2**20

_ALONE = b"ffffffff"
_ASSIGNMENT = re.compile(rb"([a-z0-9_.]+)[ \t]*=[ \t]*(.*)", re.IGNORECASE | re.DOTALL)
#: The name of an extent that is more than a name: the address of one, and no letter of a drive.
_ADDRESS = re.compile(rb'"\s*[a-z][a-z0-9+.-]+:', re.IGNORECASE)
_EXTENT = re.compile(rb"(?:rw|rdonly|noaccess)\s+\d+\s+(\S+)", re.IGNORECASE)

_CONVERT = "have its owner export it as one streamOptimized or monolithicSparse file, or convert it to qcow2"
_OTHER_FILES = "another file belongs to the vmdk image, or may belong to it"


@dataclasses.dataclass(frozen=True)
class Vmdk:
    """What a VMDK image says.

    :param virtual_size: in bytes.
    :param create_type: the descriptor's ``createType``, in lower case.
    """

    virtual_size: int
    create_type: str


def read(image: Reader) -> Vmdk:
    """Return what an image's header and descriptor say.

    :raises ImageRejected: the image is broken, or is not known to be self-contained.
    :raises NeedMore: the bytes that tell have not arrived yet.
    """
    start = image.read(0, _HEADER.size)
    if b"disk descriptorfile" in start.lower():
        raise errors.ImageRejected(_OTHER_FILES, next_step=_CONVERT)  # a descriptor without its extents
    header = _Header.parse(start)
    found = _descriptor(image, header)
    size = image.size
    if header.directory == _GD_AT_END and size is not None:
        _check_footer(image, header, size)
    return Vmdk(header.capacity * _SECTOR, found)


@dataclasses.dataclass(frozen=True)
class _Header:
    flags: int
    capacity: int
    grain: int
    entries: int
    descriptor_at: int
    descriptor_sectors: int
    directory: int

    @classmethod
    def parse(cls, data: bytes) -> _Header:
        if len(data) < _HEADER.size:
            raise _broken("its header is cut off")
        fields = _HEADER.unpack(data)
        magic, version, flags, capacity, grain, at, sectors, entries, _redundant, directory = fields[:10]
        if magic != MAGIC:
            raise _broken("it has no sparse extent's header")
        if version not in (1, 2, 3):
            raise _broken(f"version {version} is unknown")
        # Programs that go by the one and such that go by the other would read different disks.
        if fields[10] != (_DEFLATE if flags & _COMPRESSED else 0):
            raise _broken("its header says two things of how its grains are compressed")
        if flags & _COMPRESSED and grain > _MOST_COMPRESSED:
            raise _broken(f"its compressed grains are of {grain} sectors, the most is {_MOST_COMPRESSED}")
        if not capacity:
            raise errors.ImageRejected(_OTHER_FILES, next_step=_CONVERT)
        return cls(flags, capacity, grain, entries, at, sectors, directory)


def _descriptor(image: Reader, header: _Header) -> str:
    """Check the embedded descriptor and return its ``createType``."""
    start, length = header.descriptor_at * _SECTOR, header.descriptor_sectors * _SECTOR
    if not start or not length or length > _MOST_DESCRIPTOR or start > _LAST_DESCRIPTOR:
        raise _broken("it has no descriptor where one can be")
    data = image.read(start, max(length, _LOOKED_THROUGH))
    _require_no_parent(data, image.read(_USUAL_DESCRIPTOR, _LOOKED_THROUGH))
    text = data[:length].split(b"\0", 1)[0]
    kinds, create_type = [], None
    for line in (each.strip() for each in text.splitlines()):
        if not line or line.startswith(b"#"):
            continue
        if extent := _EXTENT.match(line):
            if b"/" in line or _ADDRESS.search(line):
                raise errors.ImageRejected(_OTHER_FILES, next_step=_CONVERT)
            kinds.append(extent[1].upper())
        elif assignment := _ASSIGNMENT.fullmatch(line):
            key, value = assignment[1].lower(), assignment[2].strip().strip(b'"')
            if key == b"createtype":
                if create_type is not None:
                    raise _broken("its descriptor states createType twice")
                create_type = value.decode("ascii", "replace").lower()
            elif key == b"parentcid" and value.lower() != _ALONE:
                raise errors.ImageRejected(_OTHER_FILES, next_step=_CONVERT)
        else:
            raise _broken("its descriptor has a line that is none of the format's")
    if kinds != [b"SPARSE"]:
        raise errors.ImageRejected(_OTHER_FILES, next_step=_CONVERT)
    if create_type is None:
        raise _broken("its descriptor states no createType")
    return create_type


def _require_no_parent(*pieces: bytes) -> None:
    if any(b"parentfilenamehint" in piece.lower() for piece in pieces):
        raise errors.ImageRejected(_OTHER_FILES, next_step=_CONVERT)


def _check_footer(image: Reader, header: _Header, size: int) -> None:
    """Check the header at the end, which is the one that counts, against the one at the beginning."""
    marker = image.read(max(size - _MARKER_FROM_END, 0), 16)
    if len(marker) < 16 or struct.unpack_from("<I", marker, 12)[0] != _FOOTER_MARKER:
        raise _broken("the footer that its header announces is missing")
    footer = _Header.parse(image.read(size - _FOOTER_FROM_END, _HEADER.size))
    if footer.capacity != header.capacity:
        raise _broken("header and footer differ in the disk's size")
    # Wherever the footer has the descriptor, there is no parent in it.
    _require_no_parent(image.read(footer.descriptor_at * _SECTOR, _LOOKED_THROUGH))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where an image has its grains, in bytes.

    :param directory_at: where the grain directory lies: for each grain table the sector with which it begins,
        in 32 bits. A grain table has the sectors of ``table_entries`` grains.
    :param compressed: whether grains are compressed, so that each takes as much as its marker says.
    """

    directory_at: int
    grain_size: int
    table_entries: int
    disk_size: int
    compressed: bool


def layout(image: Reader) -> Layout:
    """Return where a whole image has its grains.

    :raises ImageRejected: as :func:`read`, or its grains have no size.
    """
    header = _Header.parse(image.read(0, _HEADER.size))
    size = image.size
    if header.directory == _GD_AT_END and size is not None:
        header = _Header.parse(image.read(size - _FOOTER_FROM_END, _HEADER.size))
    if not header.grain or not 0 < header.entries <= _TABLE_ENTRIES:
        raise _broken("its grain tables are not as a hosted extent has them")
    return Layout(
        header.directory * _SECTOR,
        header.grain * _SECTOR,
        header.entries,
        header.capacity * _SECTOR,
        bool(header.flags & _COMPRESSED),
    )


def _broken(how: str) -> errors.ImageRejected:
    return errors.ImageRejected(f"the vmdk image is broken: {how}", next_step=_CONVERT)
