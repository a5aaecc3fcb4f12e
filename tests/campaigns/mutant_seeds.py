# SPDX-License-Identifier: Apache-2.0
"""What mutants are made of: images of every format, and how they are changed."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import lzma
import pathlib
import random
import struct
import subprocess

import zstandard

from tests.support import odd_images, qcow2_images

MIB = 2**20

#: How to have qemu-img make the seeds: format as QEMU names it, options.
_MADE: tuple[tuple[str, str], ...] = (
    ("qcow2", "compat=0.10"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "extended_l2=on"),
    ("qcow2", "compression_type=zstd"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=streamOptimized"),
    ("vpc", "subformat=dynamic"),
    ("vpc", "subformat=dynamic,force_size=on"),
    ("vhdx", "log_size=1M"),
    ("vhdx", "subformat=fixed,log_size=1M"),
    ("vdi", ""),
    ("vdi", "static=on"),
    # What is not accepted as itself: a mutant is refused, or is the raw disk that its bytes are.
    ("qed", ""),
    ("qcow", ""),
    ("parallels", ""),
)

#: Formats that are no image formats of QEMU's, but ways to pack a disk.
PACKED = ("bzip2", "gzip", "xz", "zstd")

#: The beginning of a disk that is encrypted as a whole: LUKS version 1.
_LUKS = b"LUKS\xba\xbe\x00\x01".ljust(592, b"\0")

#: Numbers that parsers stumble over.
_ODD = (0, 1, 2, 3, 4, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_WORDS = (
    b"parentFileNameHint",
    b'"',
    b"=",
    b"\n",
    b"RW 1 SPARSE ",
    b"createType",
    b"conectix",
    b"metadata",
    b"\0",
    b"QFI\xfb",
    b"KDMV",
    b"vhdxfile",
    b"EFI PART",
    b"CD001",
    b"\x55\xaa",
    b"\x1f\x8b\x08",
)

#: Where the formats keep what is parsed; the rest is the guest's data.
_HOT = (
    (0, 128),
    (64, 512),
    (0, 512),
    (0, 4096),
    (512, 10752),
    (32 * 1024, 36 * 1024),
    (192 * 1024, 192 * 1024 + 256),
    (256 * 1024, 256 * 1024 + 512),
    (320 * 1024, 320 * 1024 + 64),
    (3 * MIB, 3 * MIB + 128 * 1024),
    (1024, 1280),
    (4000, 4096),
    (-1024, None),
)


@dataclasses.dataclass(frozen=True)
class Seed:
    """An image that mutants are made of.

    :param kind: QEMU's name of its format, or one of :data:`PACKED`.
    :param claimed: the disk formats, by Glance's names, that it may be claimed to have.
    """

    kind: str
    data: bytes
    claimed: tuple[str | None, ...]


def make(directory: pathlib.Path) -> list[Seed]:
    """Return the seeds."""
    disk = random.Random(5).randbytes(128 * 1024) + bytes(768 * 1024) + random.Random(6).randbytes(128 * 1024)
    raw = directory / "seed.raw"
    raw.write_bytes(disk)
    found = []
    for format, options in _MADE:
        made = directory / "seed"
        more = ["-o", options] if options else []
        command = ["qemu-img", "convert", "-f", "raw", "-O", format, *more, str(raw), str(made)]
        subprocess.run(command, check=True, capture_output=True)
        claim = {"vpc": "vhd"}.get(format, format)
        found.append(Seed(format, made.read_bytes(), (claim, None)))
    found.append(Seed("vpc", odd_images.dynamic_vhd(disk), ("vhd", "vpc", None)))
    found.append(Seed("vpc", odd_images.fixed_vhd(disk), ("vhd", None)))
    found += [Seed("qcow2", image, ("qcow2", None)) for image in small_qcow2()]
    for data in (partitioned(disk), optical(disk), _LUKS + disk[len(_LUKS) :], disk):
        found.append(Seed("raw", data, ("raw", "iso", None)))
    packed = random.Random(7).randbytes(512) + bytes(1024)
    for name, pack in (
        ("gzip", gzip.compress),
        ("xz", lzma.compress),
        ("zstd", zstandard.ZstdCompressor(write_checksum=True).compress),
        ("bzip2", bz2.compress),
    ):
        found.append(Seed(name, pack(packed), ("raw",)))
        found.append(Seed(name, pack(packed) + pack(packed), ("raw",)))
        found.append(Seed(name, pack(packed) + pack(b"") + bytes(8) + pack(packed), ("raw",)))
    return found


def small_qcow2() -> list[bytes]:
    """Return small qcow2 images whose parts lie in a random order, with clusters of every kind."""
    chance = random.Random(8)
    made = []
    for version, extended, compression in ((2, False, 0), (3, False, 0), (3, False, 1), (3, True, 0)):
        bits = 14 if extended else 9
        clusters = {}
        for number in range(6 if extended else 40):
            kind = chance.choice(("data", "compressed", "zero"))
            data = chance.randbytes(1 << bits - 1) + bytes(1 << bits - 1)
            clusters[number] = qcow2_images.Cluster(kind, data if kind != "zero" else b"")
        made.append(
            qcow2_images.build(
                64 << bits,
                clusters,
                cluster_bits=bits,
                version=version,
                extended=extended,
                compression=compression,
                compress=zstandard.ZstdCompressor().compress if compression else qcow2_images.deflated,
                order=chance,
            )
        )
    return made


def partitioned(disk: bytes) -> bytes:
    """Return a disk with a protective MBR and the header of a GUID partition table."""
    entry = bytes((0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0)) + (len(disk) // 512 - 1).to_bytes(
        4, "little"
    )
    boot = bytes(446) + entry + bytes(48) + b"\x55\xaa"
    return boot + b"EFI PART".ljust(512, b"\0") + disk[1024:]


def optical(disk: bytes) -> bytes:
    """Return an ISO 9660 image, as far as its volume descriptors show it."""
    first = b"\x01CD001\x01".ljust(2048, b"\0")
    last = b"\xffCD001\x01".ljust(2048, b"\0")
    return bytes(32768) + first + last + disk[32768 + 4096 :]


def filesystems() -> list[bytes]:
    """Return what shows a swap area, an ext4, a FAT, an XFS and an NTFS filesystem, and zeros behind."""
    swap = bytes(1024) + struct.pack("<III", 1, 255, 0) + b"sixteen bytes id" + b"label"
    ext = bytes(1024) + struct.pack("<IIIIIII", 64, 256, 0, 9, 9, 0, 0)
    ext += bytes(1080 - len(ext)) + b"\x53\xef"
    fat = b"\xeb\x3c\x90mkfs.fat" + struct.pack("<HBHBHHB", 512, 4, 1, 2, 512, 2048, 0xF8)
    fat = fat.ljust(54, b"\0") + b"FAT16   "
    wide = fat[:54].ljust(82, b"\0") + b"FAT32   "
    xfs = b"XFSB" + struct.pack(">IQ", 4096, 4096)
    ntfs = b"\xeb\x52\x90NTFS    " + struct.pack("<H", 512)
    images = [swap.ljust(4086, b"\0") + b"SWAPSPACE2", ext, fat, wide, xfs, ntfs]
    return [image.ljust(64 * 1024, b"\0") for image in images]


def brought_forward(vhdx: bytes) -> bytes:
    """Return the beginning of a VHDX image whose metadata region directly follows the region table."""
    at = vhdx.index(b"metadata")
    start, end = 192 * 1024, 256 * 1024
    table = vhdx[start:end].replace(at.to_bytes(8, "little"), end.to_bytes(8, "little"), 1)
    return vhdx[:start] + table + vhdx[at : at + 128 * 1024]


def mutate(image: bytes, chance: random.Random) -> bytes:
    """Return a changed image."""
    data = bytearray(image)
    for _edit in range(chance.choice((1, 1, 1, 2, 3, 8))):
        if data:
            _edit_once(data, chance)
    return bytes(data)


def _edit_once(data: bytearray, chance: random.Random) -> None:
    low, high = chance.choice(_HOT)
    if low < 0:
        low = max(0, len(data) + low)
    if low >= len(data):
        low, high = 0, len(data)
    at = chance.randrange(low, min(high or len(data), len(data)))
    kind = chance.randrange(12)
    if kind < 2:
        data[at] = chance.randrange(256)
    elif kind < 5:
        data[at] ^= 1 << chance.randrange(8)
    elif kind < 8:
        size = chance.choice((2, 4, 8))
        order = chance.choice(("little", "big"))
        number = chance.choice(_ODD) & (1 << 8 * size) - 1
        # Aligned as often as not: so are the fields of all formats.
        at -= at % size if chance.random() < 0.5 else 0
        data[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
    elif kind < 9:
        word = chance.choice(_WORDS)
        data[at : at + len(word)] = word
    elif kind < 10:
        # One part of the image in the place of another.
        size = chance.choice((8, 16, 64, 512))
        origin = chance.randrange(len(data))
        data[at : at + size] = data[origin : origin + size]
    elif kind < 11:
        data += bytes(chance.choice((1, 511, 512, 513, 65536)))
    else:
        del data[chance.randrange(len(data)) :]
