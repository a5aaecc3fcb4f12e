# SPDX-License-Identifier: Apache-2.0
"""Images that qemu-img does not make: VHDs of other writers, and images that another file belongs to."""

from __future__ import annotations

import struct

MIB = 2**20
_FOOTER = ">8sIIQI4sI4sQQHBBII16sB427s"
_DYNAMIC = ">8sQQIIII16sII512s192s256s"


def vhd_footer(
    *,
    creator: bytes = b"win ",
    original: int,
    current: int,
    geometry: tuple[int, int, int],
    kind: int = 3,
    data_offset: int = 512,
) -> bytes:
    """Return a VHD's footer with the right checksum."""
    footer = struct.pack(
        _FOOTER,
        *(b"conectix", 2, 0x10000, data_offset, 0, creator, 0x60003, b"Wi2k", original, current),
        *(*geometry, kind, 0, b"0123456789abcdef", 0, b""),
    )
    return footer[:64] + struct.pack(">I", ~sum(footer) & 0xFFFF_FFFF) + footer[68:]


def dynamic_vhd(data: bytes, **fields: object) -> bytes:
    """Return a dynamic VHD in which every block is allocated.

    :param fields: of :func:`vhd_footer`; ``original`` and ``current`` are the data's length if not given.
    """
    stated = {"original": len(data), "current": len(data), "geometry": (60, 4, 17), **fields}
    footer = vhd_footer(**stated)  # type: ignore[arg-type]
    count = -(-len(data) // MIB)
    header = struct.pack(
        _DYNAMIC,
        *(b"cxsparse", 2**64 - 1, 1536, 0x10000, count, MIB, 0, b"", 0, 0, b"", b"", b""),
    )
    header = header[:36] + struct.pack(">I", ~sum(header) & 0xFFFF_FFFF) + header[40:]
    bitmap = (b"\xff" * (MIB // 4096)).ljust(512, b"\0")
    table, blocks, at = [], [], 2048
    for index in range(count):
        table.append(at // 512)
        block = bitmap + data[index * MIB : (index + 1) * MIB].ljust(MIB, b"\0")
        blocks.append(block)
        at += len(block)
    entries = b"".join(struct.pack(">I", entry) for entry in table).ljust(512, b"\xff")
    return footer + header + entries + b"".join(blocks) + footer


def fixed_vhd(data: bytes) -> bytes:
    """Return a fixed VHD: the disk's bytes, and a footer behind them."""
    return data + vhd_footer(
        original=len(data), current=len(data), geometry=(60, 4, 17), kind=2, data_offset=2**64 - 1
    )


def with_descriptor(vmdk: bytes, old: bytes, new: bytes) -> bytes:
    """Return a VMDK in whose embedded descriptor something is replaced; the length stays.

    :raises ValueError: it is not there.
    """
    start, end = 512, 512 + 20 * 512
    descriptor = vmdk[start:end]
    if old not in descriptor:
        raise ValueError(old)
    return vmdk[:start] + descriptor.replace(old, new).rstrip(b"\0").ljust(end - start, b"\0") + vmdk[end:]


def edited(image: bytes, *edits: tuple[int, str, int]) -> bytes:
    """Return an image with numbers put into it: offset, format as in :mod:`struct`, value."""
    data = bytearray(image)
    for at, format, value in edits:
        struct.pack_into(format, data, at, value)
    return bytes(data)
