# SPDX-License-Identifier: Apache-2.0
"""Writes qcow2 images of any layout for tests, which qemu-img would not do, and decodes them."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable

from imagecache_lib.formats.qcow2 import decoder, header, walk
from imagecache_lib.formats.qcow2.spill import Spill
from imagecache_lib.system import sparse

COMPRESSED = 1 << 62
COPIED = 1 << 63
MAX_VIRTUAL_SIZE = 2**40


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One guest cluster.

    :param kind: ``data``, ``compressed`` or ``zero``; what is absent is unallocated.
    :param bitmap: subcluster bitmap of an image with extended L2 entries; its data is what it allocates.
    """

    kind: str
    data: bytes = b""
    bitmap: int = 0xFFFF_FFFF


@dataclasses.dataclass
class Part:
    """Something contiguous in the file, from a cluster boundary on."""

    name: str
    length: int
    offset: int = 0


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def build(
    virtual_size: int,
    clusters: dict[int, Cluster],
    *,
    cluster_bits: int = 9,
    version: int = 3,
    extended: bool = False,
    compression: int = 0,
    compress: Callable[[bytes], bytes] = deflated,
    order: random.Random | None = None,
) -> bytes:
    """Return the file. With ``order`` its parts lie in a random order, among parts that nobody uses."""
    clusters = dict(clusters)
    size = 1 << cluster_bits
    entry_size = 16 if extended else 8
    per_table = size // entry_size
    l1_size = max(1, -(-virtual_size // (per_table * size)))
    offsets: dict[int, int] = {}
    parts = [Part("refcounts", size), Part("l1", l1_size * 8)]
    parts += [Part(f"l2 {index}", size) for index in sorted({guest // per_table for guest in clusters})]
    streams: list[tuple[int, bytes]] = []
    content: dict[str, bytes] = {}
    for guest, cluster in sorted(clusters.items()):
        stream = compress(cluster.data) if cluster.kind == "compressed" else b""
        # As QEMU does: a cluster that compression does not shrink is stored as it is.
        if cluster.kind == "data" or len(stream) >= size:
            clusters[guest] = dataclasses.replace(cluster, kind="data")
            parts.append(Part(f"data {guest}", size))
            content[f"data {guest}"] = cluster.data
        elif cluster.kind == "compressed":
            streams.append((guest, stream))
    packs = _pack(streams, order)
    for number, pack in enumerate(packs):
        parts.append(Part(f"pack {number}", sum(len(stream) for _, stream in pack)))
        content[f"pack {number}"] = b"".join(stream for _, stream in pack)
    if order is not None:
        for number in range(order.randrange(4)):
            parts.append(Part(f"unused {number}", size))
            content[f"unused {number}"] = order.randbytes(size)
        order.shuffle(parts)
    end = size
    for part in parts:
        part.offset = end
        end += -(-part.length // size) * size
    places = {part.name: part.offset for part in parts}
    for number, pack in enumerate(packs):
        at = places[f"pack {number}"]
        for guest, stream in pack:
            offsets[guest] = _compressed_descriptor(at, len(stream), cluster_bits)
            at += len(stream)
    content |= _tables(clusters, places, offsets, l1_size, per_table, extended)
    image = bytearray(max(part.offset + part.length for part in parts))
    fields = _header(virtual_size, places, l1_size, cluster_bits, version, extended, compression)
    image[: len(fields)] = fields
    for part in parts:
        data = content.get(part.name, b"")
        image[part.offset : part.offset + len(data)] = data
    return bytes(image)


def _pack(streams: list[tuple[int, bytes]], order: random.Random | None) -> list[list[tuple[int, bytes]]]:
    """Lay compressed clusters end to end, as QEMU does; a new pack begins on a new cluster."""
    if order is not None:
        order.shuffle(streams)
    packs: list[list[tuple[int, bytes]]] = []
    for stream in streams:
        if not packs or (order is not None and order.random() < 0.2):
            packs.append([])
        packs[-1].append(stream)
    return packs


def _compressed_descriptor(offset: int, length: int, cluster_bits: int) -> int:
    sectors = (offset + length - 1) // 512 - offset // 512
    return COMPRESSED | sectors << (62 - (cluster_bits - 8)) | offset


def _tables(
    clusters: dict[int, Cluster],
    places: dict[str, int],
    compressed: dict[int, int],
    l1_size: int,
    per_table: int,
    extended: bool,
) -> dict[str, bytes]:
    used = {guest // per_table for guest in clusters}
    content = {
        "l1": struct.pack(
            f">{l1_size}Q", *(places[f"l2 {i}"] | COPIED if i in used else 0 for i in range(l1_size))
        )
    }
    for index in used:
        entries = []
        for guest in range(index * per_table, (index + 1) * per_table):
            cluster = clusters.get(guest)
            entry = bitmap = 0
            if cluster is not None and cluster.kind == "data":
                entry, bitmap = places[f"data {guest}"] | COPIED, cluster.bitmap
            elif cluster is not None and cluster.kind == "compressed":
                entry = compressed[guest]
            elif cluster is not None:
                entry, bitmap = (0, 0xFFFF_FFFF << 32) if extended else (1, 0)
            entries += [entry, bitmap] if extended else [entry]
        content[f"l2 {index}"] = struct.pack(f">{len(entries)}Q", *entries)
    return content


def _header(
    virtual_size: int,
    places: dict[str, int],
    l1_size: int,
    cluster_bits: int,
    version: int,
    extended: bool,
    compression: int,
) -> bytes:
    fields = header.V2_FIELDS.pack(
        header.MAGIC,
        version,
        0,
        0,
        cluster_bits,
        virtual_size,
        0,
        l1_size,
        places["l1"],
        places["refcounts"],
        1,
        0,
        0,
    )
    if version == 2:
        return fields
    features = (16 if extended else 0) | (8 if compression else 0)
    return fields + header.V3_FIELDS.pack(features, 0, 0, 4, 112) + bytes([compression]).ljust(8, b"\0")


def disk_of(
    virtual_size: int, clusters: dict[int, Cluster], *, cluster_bits: int, extended: bool = False
) -> bytes:
    """Return what the guest sees."""
    size = 1 << cluster_bits
    disk = bytearray(-(-virtual_size // size) * size)
    for guest, cluster in clusters.items():
        if cluster.kind == "zero":
            continue
        seen = bytearray(cluster.data)
        if extended and cluster.kind == "data":
            for number in range(32):
                if not cluster.bitmap >> number & 1:
                    seen[number * size // 32 : (number + 1) * size // 32] = bytes(size // 32)
        disk[guest * size : (guest + 1) * size] = seen
    return bytes(disk[:virtual_size])


def repeating() -> bytes:
    """Return an image of 512 MiB that are one compressed cluster, which its table names 8,192 times."""
    size = 65536
    image = bytearray(build(8192 * size, {0: Cluster("compressed", b"\1" * size)}, cluster_bits=16))
    (l1_at,) = struct.unpack_from(">Q", image, 40)
    l2_at = struct.unpack_from(">Q", image, l1_at)[0] & 0x00FF_FFFF_FFFF_FE00
    image[l2_at : l2_at + size] = image[l2_at : l2_at + 8] * 8192
    return bytes(image)


def decode(
    image: bytes,
    *,
    chunks: Callable[[], int] = lambda: 2**20,
    file_size: bool = True,
    max_virtual_size: int = MAX_VIRTUAL_SIZE,
    map_bytes: int = walk.MAP_BYTES,
) -> tuple[bytes, decoder.Decoded]:
    """Decode in chunks of the given sizes; return the disk and what the decoder says of it."""
    with tempfile.TemporaryFile() as out:
        with decoder.StreamDecoder(
            sparse.SparseFile(out.fileno()),
            spill=Spill(tempfile.TemporaryFile),
            file_size=len(image) if file_size else None,
            max_virtual_size=max_virtual_size,
            threads=2,
            map_bytes=map_bytes,
        ) as decoding:
            stream = io.BytesIO(image)
            while chunk := stream.read(chunks()):
                decoding.write(chunk)
            decoded = decoding.finish()
        out.seek(0)
        return out.read(), decoded


def convert(image: bytes | str, *, directory: str | None = None) -> bytes | None:
    """Return what qemu-img makes of it, None if it refuses."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        path = image if isinstance(image, str) else os.path.join(place, "image")
        if isinstance(image, bytes):
            with open(path, "wb") as file:
                file.write(image)
        raw = os.path.join(place, "raw")
        done = subprocess.run(
            ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], capture_output=True, check=False
        )
        if done.returncode:
            return None
        with open(raw, "rb") as file:
            return file.read()
