# SPDX-License-Identifier: Apache-2.0
"""Mutants of images: no parser may do anything with them but accept or reject.

By hand, a million for each format's parser, in this process; and 20,000 for each format through the whole
library, compared with ``qemu-img convert``::

    python -m tests.campaigns.mutants --parsers 1000000 --library 20000

The seeds are images that the installed qemu-img makes, and those of :mod:`tests.support.odd_images`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import imagecache_lib as ic
from imagecache_lib.formats import contained, vhd
from imagecache_lib.formats.inspection import Inspection, Rules
from imagecache_lib.formats.reader import NeedMore, Prefix
from imagecache_lib.testing.sources import FakeSource
from tests.support.odd_images import dynamic_vhd

MIB = 2**20

#: How to have qemu-img make the seeds: format as QEMU names it, options.
SEEDS: tuple[tuple[str, str], ...] = (
    ("qcow2", "compat=0.10"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "extended_l2=on"),
    ("qcow2", "compression_type=zstd"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=streamOptimized"),
    ("vpc", "subformat=dynamic"),
    ("vpc", "subformat=dynamic,force_size=on"),
    ("vhdx", "log_size=1M"),
    ("vhdx", "subformat=fixed"),
    ("vdi", ""),
    ("vdi", "static=on"),
)

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
)

#: Where the formats keep what is parsed; the rest is the guest's data.
_HOT = ((0, 512), (0, 4096), (512, 10752), (192 * 1024, 192 * 1024 + 256), (2 * MIB, 2 * MIB + 64 * 1024))


def seeds(directory: pathlib.Path) -> list[tuple[str, bytes]]:
    """Return the format and the content of every seed."""
    data = random.Random(5).randbytes(128 * 1024) + bytes(768 * 1024) + random.Random(6).randbytes(128 * 1024)
    raw = directory / "seed.raw"
    raw.write_bytes(data)
    found = []
    for format, options in SEEDS:
        made = directory / "seed"
        more = ["-o", options] if options else []
        command = ["qemu-img", "convert", "-f", "raw", "-O", format, *more, str(raw), str(made)]
        subprocess.run(command, check=True, capture_output=True)
        found.append((format, made.read_bytes()))
    found.append(("vpc", dynamic_vhd(data)))
    return found


def mutants(image: bytes, chance: random.Random) -> Iterator[bytes]:
    """Yield changed images without end."""
    while True:
        data = bytearray(image)
        for _edit in range(chance.choice((1, 1, 1, 2, 3, 8))):
            if not data:
                break
            low, high = chance.choice(_HOT)
            if low >= len(data):
                low, high = 0, len(data)
            at = chance.randrange(low, min(high, len(data)))
            kind = chance.randrange(5)
            if kind == 0:
                data[at] = chance.randrange(256)
            elif kind == 1:
                data[at] ^= 1 << chance.randrange(8)
            elif kind == 2:
                size = chance.choice((2, 4, 8))
                order = chance.choice(("little", "big"))
                number = chance.choice(_ODD) & (1 << 8 * size) - 1
                data[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
            elif kind == 3:
                word = chance.choice(_WORDS)
                data[at : at + len(word)] = word
            else:
                del data[chance.randrange(len(data)) :]
        yield bytes(data)


def run_parsers(count: int, chance: random.Random, made: list[tuple[str, bytes]]) -> dict[str, int]:
    """Try ``count`` mutants on the parser of each format. Returns what came out, by format and outcome.

    :raises Exception: whatever a parser raises that it must not.
    """
    outcomes: dict[str, int] = {}
    rules = Rules(frozenset(("monolithicsparse", "streamoptimized")), 2**44)
    for format in sorted({format for format, _image in made}):
        # What is parsed lies in the first megabytes; copying the rest would be all that the time goes to.
        streams = [mutants(image[: 2 * MIB + 128 * 1024], chance) for each, image in made if each == format]
        for number in range(count):
            data = next(streams[number % len(streams)])
            outcome = "accepted"
            try:
                contained.examine(Prefix(data, whole=number % 2 == 0), format)
                if number % 64 == 0:
                    looking = Inspection(None, rules)
                    looking.feed(data)
                    looking.finish()
                vhd.is_fixed(data[-512:], len(data) - 512)
            except ic.ImageRejected as error:
                assert error.cause
                outcome = "rejected"
            except NeedMore as error:
                assert error.needed > len(data)
                outcome = "undecided"
            outcomes[f"{format} {outcome}"] = outcomes.get(f"{format} {outcome}", 0) + 1
    return outcomes


def run_library(count: int, chance: random.Random, made: list[tuple[str, bytes]]) -> dict[str, int]:
    """Cache ``count`` mutants of each format, and compare what is accepted with qemu-img's own conversion.

    :raises AssertionError: a base holds other bytes than those, or something is left of a refused image.
    """
    outcomes: dict[str, int] = {}
    for format in sorted({format for format, _image in made if format != "raw"}):
        streams = [mutants(image, chance) for each, image in made if each == format]
        with tempfile.TemporaryDirectory() as place:
            for number in range(count):
                outcome = _cache(next(streams[number % len(streams)]), format, number, pathlib.Path(place))
                outcomes[f"{format} {outcome}"] = outcomes.get(f"{format} {outcome}", 0) + 1
    return outcomes


def _cache(data: bytes, format: str, number: int, place: pathlib.Path) -> str:
    claimed = {"vpc": "vhd"}.get(format, format)
    instances = place / "instances"
    instances.mkdir(exist_ok=True)
    config = ic.CacheConfig(
        instances_path=str(instances), force_raw_images=number % 2 == 0, num_retries=0, max_virtual_size=2**36
    )
    manager = ic.ImageCacheManager(config, FakeSource({"mutant": data}, disk_format=claimed), observers=())
    try:
        with manager.fetch_or_reuse("mutant") as base:
            if base.virtual_size <= 64 * MIB:
                _compare(data, format, base, place)
    except ic.ImageRejected:
        assert not os.listdir(instances / "_base" / ".imagecache" / "stage")
        return "rejected"
    manager.evict_image("mutant")
    return "accepted"


def _compare(data: bytes, format: str, base: ic.BaseImage, place: pathlib.Path) -> None:
    image, expected, found = place / "image", place / "expected", place / "found"
    image.write_bytes(data)
    option = "driver=vpc,force_size_calc=current_size," if format == "vpc" else f"driver={format},"
    opened = f"{option}file.driver=file,file.filename={image}"
    command = ["qemu-img", "convert", "--image-opts", "-O", "raw", opened, str(expected)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return  # we read less of it than qemu-img does, such as no refcounts
    subprocess.run(["qemu-img", "convert", "-f", base.format, "-O", "raw", base.path, str(found)], check=True)
    assert expected.read_bytes() == found.read_bytes(), f"{format}: {data[:64].hex()}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parsers", type=int, default=1_000_000, help="mutants for the parser of each format"
    )
    parser.add_argument("--library", type=int, default=0, help="mutants of each format through the library")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as directory:
        made = seeds(pathlib.Path(directory))
    for name, run, count in (
        ("parsers", run_parsers, asked.parsers),
        ("library", run_library, asked.library),
    ):
        began = time.monotonic()
        for outcome, number in sorted(run(count, chance, made).items()) if count else ():
            sys.stdout.write(f"{name}: {outcome}: {number}\n")
        sys.stdout.write(f"{name}: {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
