# SPDX-License-Identifier: Apache-2.0
"""The qcow2 decoder against ``qemu-img convert -t none`` on the same images, in turn, in one run.

``python -m benchmarks.decode [--source DIR] [--data-mib N] [--runs N] [--work DIR]``

The images hold an ext4 filesystem made of real files. Ours reads the image in pieces of 1 MiB, hashes it with
SHA-512 on a second thread, decodes it to a new file, and fsyncs that; qemu-img only converts, and writes
directly. Both read the image from the page cache.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import queue
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

from imagecache_lib.formats.qcow2 import decoder, inflate
from imagecache_lib.formats.qcow2.spill import Spill
from imagecache_lib.system import sparse

_PIECE = 2**20
_KINDS = {
    "zlib": ["-c"],
    "zstd": ["-c", "-o", "compression_type=zstd"],
    "plain": [],
    "plain, 4 KiB clusters": ["-o", "cluster_size=4k"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="/usr/lib", help="directory of files that the images hold")
    parser.add_argument("--data-mib", type=int, default=986, help="how much of it, at most")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", help="directory for images and disks; default: the system's temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        raw = make_disk(work, arguments.source, arguments.data_mib * 2**20)
        print("| image | stored MiB | data MiB | qemu-img s | ours s | ratio | ours, zlib only s | ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for kind, options in _KINDS.items():
            image = os.path.join(work, "image")
            subprocess.run(
                ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, image], check=True
            )
            print_row(kind, image, raw, arguments.runs)


def make_disk(work: str, source: str, limit: int) -> str:
    """Return the path of a sparse 4 GiB disk with an ext4 filesystem of at most ``limit`` bytes of files."""
    tree = os.path.join(work, "tree")
    total = 0
    for directory, _, names in sorted(os.walk(source)):
        for name in sorted(names):
            path = os.path.join(directory, name)
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            total += os.path.getsize(path)
            if total > limit:
                return _filesystem(work, tree)
            copy = os.path.join(tree, os.path.relpath(path, source))
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copyfile(path, copy)
    return _filesystem(work, tree)


def _filesystem(work: str, tree: str) -> str:
    raw = os.path.join(work, "raw")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, raw, "4G"], check=True)
    shutil.rmtree(tree)
    return raw


def print_row(kind: str, image: str, raw: str, runs: int) -> None:
    out = os.path.join(os.path.dirname(image), "out")
    ways: dict[str, Callable[[], None]] = {
        "qemu": lambda: convert(image, out),
        "ours": lambda: decode(image, out, None),
        "zlib": lambda: decode(image, out, inflate.Zlib()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
            if name == "ours":
                subprocess.run(["cmp", "--", out, raw], check=True)
            os.unlink(out)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    spread = {
        name: f"{median[name]:.2f} ({min(values):.2f}-{max(values):.2f})" for name, values in seconds.items()
    }
    stored, data = os.path.getsize(image) >> 20, os.stat(raw).st_blocks >> 11
    cells = [kind, str(stored), str(data), spread["qemu"]]
    for name in ("ours", "zlib"):
        cells += [spread[name], f"{median[name] / median['qemu']:.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def convert(image: str, out: str) -> None:
    subprocess.run(["qemu-img", "convert", "-t", "none", "-f", "qcow2", "-O", "raw", image, out], check=True)


def decode(image: str, out: str, chosen: inflate.Inflater | None) -> None:
    digest, pieces = hashlib.sha512(), queue.Queue[bytes | None](8)

    def hash_pieces() -> None:
        while (piece := pieces.get()) is not None:
            digest.update(piece)

    hashing = threading.Thread(target=hash_pieces)
    hashing.start()
    descriptor = os.open(out, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with (
            open(image, "rb", buffering=0) as source,
            decoder.StreamDecoder(
                sparse.SparseFile(descriptor),
                spill=Spill(tempfile.TemporaryFile),
                file_size=os.path.getsize(image),
                max_virtual_size=2**44,
                inflater=chosen,
            ) as decoding,
        ):
            while piece := source.read(_PIECE):
                pieces.put(piece)
                decoding.write(piece)
            decoding.finish()
        os.fsync(descriptor)
    finally:
        pieces.put(None)
        hashing.join()
        os.close(descriptor)


if __name__ == "__main__":
    main()
