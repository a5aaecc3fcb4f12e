# SPDX-License-Identifier: Apache-2.0
"""Mutants of images: nothing may become of them but acceptance, with the right bytes, or a refusal.

By hand, a million for each parser, in this process; and 20,000 of each format through the whole library,
where what is accepted is compared with what ``qemu-img convert`` reads when it is told the same driver, and
with what gzip, xz, zstd and bzip2 unpack::

    python -m tests.campaigns.mutants --parsers 1000000
    python -m tests.campaigns.mutants --library 20000 --format vmdk --keep failures

The seeds are those of :mod:`tests.campaigns.mutant_seeds`. The mutant with a given number is the same in each
run with one seed: ``--first`` begins with another, and failures are told by their number. ``--minutes`` ends
the run earlier; how many were tried is told.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

import imagecache_lib as ic
from imagecache_lib.formats import contained, superblock, vhd
from imagecache_lib.formats.inspection import Inspection, Rules
from imagecache_lib.formats.qcow2.decoder import StreamDecoder, Unstreamable
from imagecache_lib.formats.qcow2.spill import Spill
from imagecache_lib.formats.reader import NeedMore, Prefix
from imagecache_lib.ingest import decompress
from imagecache_lib.system import sparse
from imagecache_lib.system.waiter import Waiter
from imagecache_lib.testing.sources import FakeSource
from tests.campaigns import mutant_seeds
from tests.campaigns.mutant_seeds import MIB, PACKED, Seed
from tests.support.chain import Counted, EndlessRoom

_VMDK_TYPES = frozenset(("monolithicsparse", "streamoptimized"))
#: Disks larger than this are not compared byte by byte.
_COMPARED = 64 * MIB
#: Seconds after which a mutant counts as one that hangs the library. The machine may be busy.
_HANGS = 600

Parser = Callable[[bytes, int], str]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which mutants are tried.

    :param first: number of the first one.
    :param seconds: after which no other mutant of the same parser or format is tried, or None.
    """

    first: int = 0
    seconds: float | None = None

    def numbers(self, count: int) -> Iterator[int]:
        """Yield the numbers of the mutants to try."""
        ends = None if self.seconds is None else time.monotonic() + self.seconds
        for number in range(self.first, self.first + count):
            if ends is not None and time.monotonic() >= ends:
                return
            yield number


_EVERY = Limits()


class Hangs(BaseException):
    """A mutant took longer than any should."""


@dataclasses.dataclass
class Tally:
    """What became of the mutants.

    :param keep: a directory for the mutants that failed, or None.
    """

    keep: pathlib.Path | None = None
    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: int = 0

    def run(self, name: str, number: int, data: bytes, outcome: Callable[[], str]) -> None:
        """Try one mutant. What it raises is a failure, which is told and kept."""
        try:
            with _alarm(_HANGS):
                self.outcomes[f"{name} {outcome()}"] += 1
        except (Exception, Hangs):
            self.failures += 1
            self.outcomes[f"{name} FAILED"] += 1
            sys.stdout.write(f"{name} {number}: {traceback.format_exc()}\n")
            if self.keep is not None:
                (self.keep / f"{name.replace(' ', '-')}-{number}").write_bytes(data)


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(_signal: int, _frame: object) -> None:
        raise Hangs(seconds)

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- the parsers, in this process --------------------------------------------------------------------------


def parsers(seeds: Sequence[Seed]) -> Iterator[tuple[str, Parser, list[bytes]]]:
    """Yield the name of each parser, how to try it, and what to make its mutants of."""
    for format in ("qcow2", "vmdk", "vpc", "vhdx", "vdi"):
        yield f"header of {format}", _header_parser(format), list(_heads(format, seeds))
    yield "detection", _detect, [seed.data[: 68 * 1024] for seed in seeds if seed.kind not in PACKED]
    yield "superblock", _superblock, mutant_seeds.filesystems()
    yield "decoder of qcow2", _decode, mutant_seeds.small_qcow2()
    for name in PACKED:
        yield f"unpacking of {name}", _unpacker(name), [seed.data for seed in seeds if seed.kind == name]


def _heads(format: str, seeds: Sequence[Seed]) -> Iterator[bytes]:
    """Yield what is parsed of the seeds: copying the rest would be all that the time goes to."""
    for seed in seeds:
        if seed.kind == format:
            yield mutant_seeds.brought_forward(seed.data) if format == "vhdx" else seed.data[: 16 * 1024]


def _header_parser(format: str) -> Parser:
    def parse(data: bytes, number: int) -> str:
        try:
            contained.examine(Prefix(data, whole=number % 2 == 0), format)
            vhd.is_fixed(data[-512:], len(data) - 512)
        except ic.ImageRejected as error:
            assert error.cause
            return "rejected"
        except NeedMore as error:
            assert error.needed > len(data)
            return "undecided"
        return "accepted"

    return parse


def _detect(data: bytes, number: int) -> str:
    rules = Rules(_VMDK_TYPES, 2**44, strict=number % 8 != 0)
    looking = Inspection((None, "raw", "qcow2", "vhd", "iso", "vmdk")[number % 6], rules)
    try:
        looking.feed(data)
        return f"as {looking.finish().format}"
    except ic.ImageRejected as error:
        assert error.cause
        return "rejected"


def _superblock(data: bytes, _number: int) -> str:
    return "nothing" if superblock.read(data) is None else "something"


class _Nowhere:
    """Takes a disk's content, and checks that it is within the disk."""

    def write(self, data: sparse.Buffer, offset: int, start: int = 0, end: int | None = None) -> None:
        length = (len(data) if end is None else end) - start
        assert offset >= 0 and offset + length <= 2**30 + 2 * MIB

    def write_pieces(self, pieces: Iterable[tuple[int, sparse.Piece]]) -> None:
        for offset, (data, start, end) in pieces:
            self.write(data, offset, start, end)

    def truncate(self, size: int) -> None:
        assert size <= 2**30


def _decode(data: bytes, number: int) -> str:
    spill = Spill(io.BytesIO)
    size = len(data) if number % 2 else None
    try:
        with StreamDecoder(
            _Nowhere(), spill=spill, file_size=size, max_virtual_size=2**30, threads=1
        ) as decoder:
            for start in range(0, len(data), 65536):
                decoder.write(data[start : start + 65536])
            decoder.finish()
    except ic.ImageRejected as error:
        assert error.cause
        return "rejected"
    except Unstreamable:
        return "left to qemu-img"
    return "accepted"


def _unpacker(compression: str) -> Parser:
    waiter = Waiter(ic.System(name="campaign"))

    def unpack(data: bytes, number: int) -> str:
        counted = Counted()
        unpacking = decompress.Unpacking(
            compression if number % 2 else decompress.ANY,
            counted,
            waiter=waiter,
            most=4 * MIB,
            reservation=EndlessRoom(),
        )
        try:
            unpacking.feed(data)
            unpacking.finish()
        except ic.ImageRejected as error:
            assert error.cause
            return "rejected"
        finally:
            assert counted.taken <= 4 * MIB
        return "accepted"

    return unpack


def run_parsers(
    count: int,
    seed: int,
    seeds: Sequence[Seed],
    tally: Tally,
    *,
    only: str | None = None,
    limits: Limits = _EVERY,
) -> None:
    """Try ``count`` mutants on each parser."""
    for name, parse, images in parsers(seeds):
        if only is not None and only not in name:
            continue
        began = time.monotonic()
        for number in limits.numbers(count):
            chance = random.Random(f"{seed} {name} {number}")
            data = mutant_seeds.mutate(images[number % len(images)], chance)
            tally.run(name, number, data, functools.partial(parse, data, number))
        _tell(name, tally, began)


# -- the whole library, beside other programs --------------------------------------------------------------


def run_library(
    count: int,
    seed: int,
    seeds: Sequence[Seed],
    tally: Tally,
    *,
    only: str | None = None,
    limits: Limits = _EVERY,
) -> None:
    """Cache ``count`` mutants of each format, and compare what is accepted with what other programs read."""
    for kind in dict.fromkeys(each.kind for each in seeds):
        if only is not None and only != kind:
            continue
        began = time.monotonic()
        chosen = [each for each in seeds if each.kind == kind]
        with tempfile.TemporaryDirectory() as place:
            for number in limits.numbers(count):
                chance = random.Random(f"{seed} library {kind} {number}")
                origin = chosen[number % len(chosen)]
                data = mutant_seeds.mutate(origin.data, chance)
                mutant = _Mutant(origin, data, chance.choice(origin.claimed), chance.random() < 0.5)
                tally.run(
                    f"library {kind}",
                    number,
                    data,
                    functools.partial(mutant.outcome, pathlib.Path(place)),
                )
        _tell(f"library {kind}", tally, began)


class _Source(FakeSource):
    """Has one mutant."""

    def __init__(self, data: bytes, claimed: str | None, compression: str | None) -> None:
        super().__init__({"mutant": data}, disk_format=claimed)
        self._compression = compression

    def describe(self, image_id: str) -> ic.Image:
        return dataclasses.replace(super().describe(image_id), compression=self._compression)


@dataclasses.dataclass(frozen=True)
class _Mutant:
    origin: Seed
    data: bytes
    claimed: str | None
    force_raw: bool

    def outcome(self, place: pathlib.Path) -> str:
        """Cache it, compare it, and return what came out.

        :raises AssertionError: the base holds other bytes than it should, or something is left of a refused
            image.
        """
        instances = place / "instances"
        instances.mkdir(exist_ok=True)
        config = ic.CacheConfig(
            instances_path=str(instances),
            force_raw_images=self.force_raw,
            num_retries=0,
            max_virtual_size=2**36,
            decompress_images=True,
        )
        compression = self.origin.kind if self.origin.kind in PACKED else None
        source = _Source(self.data, self.claimed, compression)
        manager = ic.ImageCacheManager(config, source, observers=())
        try:
            with manager.fetch_or_reuse("mutant") as base:
                found = self._compare(base, place)
        except ic.ImageRejected:
            found = "rejected"
        except (ic.NoSpaceError, ic.BackendError) as error:
            found = type(error).__name__
        finally:
            assert not os.listdir(instances / "_base" / ".imagecache" / "stage")
        manager.evict_image("mutant")
        return found

    def _compare(self, base: ic.BaseImage, place: pathlib.Path) -> str:
        if base.virtual_size > _COMPARED:
            return "accepted, too large to compare"
        if base.format != "raw":
            stored = pathlib.Path(base.path).read_bytes()
            assert stored == self.data, "what is kept is not what came"
        expected = self._as_others_read_it(base, place)
        if expected is None:
            # The other program reads more of it, such as refcounts, or all of what is kept as it is.
            return f"accepted as {base.format}, refused by the other program"
        assert base.virtual_size == -(-len(expected) // 512) * 512, (base.virtual_size, len(expected))
        if base.format == "raw":
            assert pathlib.Path(base.path).read_bytes() == expected, "other bytes"
        return "accepted, equal"

    def _as_others_read_it(self, base: ic.BaseImage, place: pathlib.Path) -> bytes | None:
        """Return the disk as another program reads it, or None if that program refuses it."""
        image, out = place / "image", place / "expected"
        image.write_bytes(self.data)
        if self.origin.kind in PACKED:
            unpacked = subprocess.run(
                [self.origin.kind, "-dc"], input=self.data, capture_output=True, check=False
            )
            return None if unpacked.returncode else unpacked.stdout
        source = base.source_format or base.format
        if source == "raw":
            return self.data
        option = "driver=vpc,force_size_calc=current_size," if source == "vpc" else f"driver={source},"
        opened = f"{option}file.driver=file,file.filename={image}"
        command = ["qemu-img", "convert", "--image-opts", "-O", "raw", opened, str(out)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        return out.read_bytes()


def _tell(name: str, tally: Tally, began: float) -> None:
    outcomes = {
        each: number for each, number in sorted(tally.outcomes.items()) if each.startswith(f"{name} ")
    }
    for outcome, number in outcomes.items():
        sys.stdout.write(f"{outcome}: {number}\n")
    seconds = time.monotonic() - began
    sys.stdout.write(f"{name}: {sum(outcomes.values())} mutants in {seconds:.0f} s\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parsers", type=int, default=0, help="mutants for each parser")
    parser.add_argument("--library", type=int, default=0, help="mutants of each format through the library")
    parser.add_argument("--format", help="only this format, or the parsers that have this in their names")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("IMAGECACHE_SEED", "1")))
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--minutes", type=float, help="most minutes for each parser or format")
    parser.add_argument("--keep", type=pathlib.Path, help="directory for the mutants that fail")
    asked = parser.parse_args()
    if asked.keep is not None:
        asked.keep.mkdir(parents=True, exist_ok=True)
    tally = Tally(asked.keep)
    limits = Limits(asked.first, asked.minutes and asked.minutes * 60)
    with tempfile.TemporaryDirectory() as directory:
        seeds = mutant_seeds.make(pathlib.Path(directory))
    sys.stdout.write(f"seed {asked.seed}, {len(seeds)} images\n")
    for run, count in ((run_parsers, asked.parsers), (run_library, asked.library)):
        if count:
            run(count, asked.seed, seeds, tally, only=asked.format, limits=limits)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
