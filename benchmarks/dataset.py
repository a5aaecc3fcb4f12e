# SPDX-License-Identifier: Apache-2.0
"""The image that is measured: a sparse ext4 full of real files, raw and as three kinds of qcow2."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import shutil
import stat
import subprocess
import sys

from benchmarks import meter
from tests.support import needs

#: Where real files come from, until there are enough.
_SOURCES = ("/usr/lib", "/usr/bin", "/usr/share", "/opt", sys.prefix)
_LARGEST_FILE = 128 * 2**20

#: Name, disk format, and arguments of qemu-img convert that make it from the raw one.
_KINDS = (
    ("zlib", "qcow2", ("-c", "-o", "compression_type=zlib")),
    ("zstd", "qcow2", ("-c", "-o", "compression_type=zstd")),
    ("uncompressed", "qcow2", ()),
)


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One of the files.

    :param kind: raw, zlib, zstd or uncompressed.
    :param disk_format: Glance's name of the format.
    """

    kind: str
    disk_format: str
    path: pathlib.Path
    sha512: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclasses.dataclass(frozen=True)
class DataSet:
    """The files, and what the raw one takes on disk: the data."""

    files: dict[str, ImageFile]
    virtual_size: int
    data: int


def make(home: pathlib.Path, *, data: int, virtual_size: int) -> DataSet:
    """Make all files in a directory.

    :param data: bytes of real files to put in, about.
    """
    tree, raw = home / "tree", home / "raw.img"
    gather(tree, data)
    subprocess.run(
        [needs.program("mke2fs"), "-q", "-t", "ext4", "-d", tree, raw, f"{virtual_size // 1024}k"],
        check=True,
        capture_output=True,
    )
    shutil.rmtree(tree)
    files = {"raw": ImageFile("raw", "raw", raw, _sha512(raw))}
    for kind, disk_format, arguments in _KINDS:
        path = home / f"{kind}.{disk_format}"
        subprocess.run(
            ["qemu-img", "convert", "-f", "raw", "-O", disk_format, *arguments, raw, path], check=True
        )
        files[kind] = ImageFile(kind, disk_format, path, _sha512(path))
    return DataSet(files, virtual_size, meter.allocated(str(raw)))


def gather(tree: pathlib.Path, wanted: int) -> int:
    """Copy real files into a new directory until there are so many bytes; return how many there are."""
    got = 0
    for source in _SOURCES:
        for directory, names, files in os.walk(source):
            names.sort()
            for name in sorted(files):
                path = os.path.join(directory, name)
                found = os.lstat(path)
                most = min(_LARGEST_FILE, wanted - got)
                if not stat.S_ISREG(found.st_mode) or not 0 < found.st_size <= most:
                    continue
                target = tree / directory.lstrip("/") / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                # A file takes whole blocks of the filesystem.
                got += -(-found.st_size // 4096) * 4096
                if got >= wanted:
                    return got
    return got


def _sha512(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()
