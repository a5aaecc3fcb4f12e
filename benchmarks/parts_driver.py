# SPDX-License-Identifier: Apache-2.0
"""The parts of a cold spawn, each alone on one thread: what no order of the work can make less."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from benchmarks import cache_driver, meter, serving

_STEP = 2**20


def receive(url: str) -> dict[str, Any]:
    """Fetch the data over a new connection, to nowhere."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    measured = meter.Meter()
    try:
        connection.request("GET", parts.path)
        answer = connection.getresponse()
        while answer.read1(_STEP):
            pass
    finally:
        connection.close()
    return measured.read()


def digest(path: str) -> dict[str, Any]:
    """Compute the SHA-512 of a file that is in the page cache. Reading it is not counted."""
    found, spent = hashlib.sha512(), 0.0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_STEP):
            began = time.thread_time()
            found.update(chunk)
            spent += time.thread_time() - began
    return {"seconds": spent, "cpu": spent}


def inflate(path: str) -> dict[str, Any]:
    """Inflate all compressed clusters of a qcow2 image. Reading them is not counted."""
    from imagecache_lib.formats.qcow2 import inflate
    from imagecache_lib.formats.qcow2.header import Compression, parse

    spent = 0.0
    with open(path, "rb", buffering=0) as file:
        header = parse(os.pread(file.fileno(), _STEP, 0))
        way = inflate.fastest_deflate()
        if header.compression_type != Compression.DEFLATE:
            found = inflate.zstd()
            assert found is not None
            way = found
        batch: list[bytes] = []
        for start, stop in (*_compressed(file.fileno()), (0, 0)):
            if stop:
                batch.append(os.pread(file.fileno(), stop - start, start))
            if len(batch) == 64 or not stop:
                began = time.thread_time()
                for data in batch:
                    way.one(data, header.cluster_size)
                spent += time.thread_time() - began
                batch.clear()
    return {"seconds": spent, "cpu": spent}


def _compressed(fd: int) -> Iterator[tuple[int, int]]:
    """Yield where the compressed clusters of an image lie."""
    from imagecache_lib.formats.qcow2 import tables
    from imagecache_lib.formats.qcow2.header import parse

    geometry = tables.Geometry.of(parse(os.pread(fd, _STEP, 0)), os.fstat(fd).st_size)
    listed = tables.TableList(geometry)
    listed.add(os.pread(fd, geometry.l1_end - geometry.l1_start, geometry.l1_start))
    listed.finish()
    while (offset := listed.peek()) is not None:
        raw = os.pread(fd, geometry.cluster_size, offset)
        for descriptor in tables.parse_l2(raw, geometry, listed.pop(), listed).descriptors:
            if descriptor & tables.COMPRESSED:
                yield geometry.compressed_range(descriptor)


def place(path: str, directory: str, holes: bool) -> dict[str, Any]:
    """Look for zeros, write and sum up the content of a raw disk, in pieces of 1 MiB. Nothing is synced.

    :param directory: on the filesystem that is written to.
    :param holes: what is a hole in the raw disk is looked through too, as it arrives for a raw image.
    """
    from imagecache_lib.store.checksums import Checksums
    from imagecache_lib.system import sparse

    spent = 0.0
    with open(path, "rb", buffering=0) as file, tempfile.TemporaryFile(dir=directory) as out:
        size = os.fstat(file.fileno()).st_size
        sink = sparse.SparseFile(out.fileno(), Checksums())
        extents = [(0, size)] if holes else list(sparse.data_extents(file.fileno()))
        for first, last in extents:
            for offset in range(first, last, _STEP):
                data = os.pread(file.fileno(), min(_STEP, last - offset), offset)
                began = time.thread_time()
                sink.write(data, offset)
                spent += time.thread_time() - began
    return {"seconds": spent, "cpu": spent}


def write(path: str, directory: str) -> dict[str, Any]:
    """Write as many bytes as a raw disk has that are not zero, where it has them, and sync them."""
    from imagecache_lib.system import sparse

    runs = []
    with open(path, "rb", buffering=0) as file:
        for first, last in sparse.data_extents(file.fileno()):
            for offset in range(first, last, _STEP):
                data = os.pread(file.fileno(), min(_STEP, last - offset), offset)
                runs += [(offset + a, offset + b) for a, b in sparse.data_runs(data, offset)]
    content = memoryview(os.urandom(_STEP))
    with tempfile.TemporaryFile(dir=directory) as out:
        measured = meter.Meter()
        for start, end in runs:
            os.pwrite(out.fileno(), content[: end - start], start)
        os.fsync(out.fileno())
        return measured.read()


def touch(directory: str, size: int) -> dict[str, Any]:
    """Have the kernel hold free memory for a file of so many bytes that is backed already.

    A virtual machine's host may take free memory back and give it anew when it is written to, which costs
    more than the write does.
    """
    content = bytes(_STEP)
    with tempfile.TemporaryFile(dir=directory) as out:
        for offset in range(0, size, _STEP):
            os.pwrite(out.fileno(), content, offset)
    return {}


def look(directory: str, names: list[str]) -> dict[str, Any]:
    """List directories, and open, stat and read 4 KiB of each file: the least that a pass has to do."""
    measured = meter.Meter()
    for name in names:
        with os.scandir(os.path.join(directory, name)) as entries:
            for entry in entries:
                fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                os.fstat(fd)
                os.pread(fd, 4096, 0)
                os.close(fd)
    return measured.read()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--without-extras", action="store_true")
    if parser.parse_args().without_extras:
        sys.modules.update(dict.fromkeys(cache_driver.INFLATERS))  # type: ignore[arg-type]
    serving.serve(
        {
            "receive": receive,
            "digest": digest,
            "inflate": inflate,
            "look": look,
            "place": place,
            "touch": touch,
            "write": write,
        }
    )


if __name__ == "__main__":
    main()
