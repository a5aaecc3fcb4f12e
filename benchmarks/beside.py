# SPDX-License-Identifier: Apache-2.0
"""This tree beside another revision of it, by turns in one run: the pass, warm and cold spawns, raw copies.

``python -m benchmarks.beside bdf7ced`` unpacks the revision with git archive, and runs a process of each,
with the same Python. What is compared is the median of all turns. The machine's load counts on both sides,
and is printed; processor time and system calls, which it changes less, are printed beside the times.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import verify_pass

_HERE = pathlib.Path(__file__).resolve().parent.parent
_WORKER = pathlib.Path(__file__).with_name("beside_worker.py")

_COLD_MIB = 64

#: A line of ``strace -c``: share, seconds, microseconds each, calls, errors if any, name.
_CALLS = re.compile(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)")


class Tree:
    """A process that does what it is asked with one revision."""

    def __init__(self, tree: pathlib.Path, instances: pathlib.Path, images: int, *before: str) -> None:
        instances.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [*before, sys.executable, str(_WORKER), str(instances), str(images), str(_COLD_MIB)],
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, **options: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclasses.dataclass
class Row:
    """What was measured of one piece of work: for each side the seconds, processor seconds, and calls.

    :param extra: seconds that ours may take more, which the same run timed.
    :param extra_cpu: processor seconds of the same.
    """

    name: str
    target: float
    seconds: tuple[float, float]
    cpu: tuple[float, float] | None
    calls: tuple[float, float] | None
    extra: float = 0.0
    extra_cpu: float = 0.0
    per: int = 1

    def told(self) -> str:
        then, now = (each / self.per * 1e3 for each in self.seconds)
        extra = self.extra * 1e3
        parts = [f"{self.name}: {then:.3f} ms then, {now:.3f} ms now, {(now - extra) / then:.2f} x"]
        if extra:
            parts.append(f"after taking off a sync of {extra:.3f} ms")
        parts.append(f"(wanted: {self.target} x)")
        if self.cpu is not None:
            before, after = (each / self.per * 1e3 for each in self.cpu)
            ratio = (after - self.extra_cpu * 1e3) / before
            parts.append(f"processor {before:.3f} and {after:.3f} ms, {ratio:.2f} x")
            if self.extra_cpu:
                parts.append(f"after taking off {self.extra_cpu * 1e3:.3f} ms of that sync")
        if self.calls is not None:
            before, after = (each / self.per for each in self.calls)
            parts.append(f"{before:.1f} and {after:.1f} system calls")
        return ", ".join(parts)


class Beside:
    """Two revisions, each with a directory of its own."""

    def __init__(self, home: pathlib.Path, before: pathlib.Path, turns: int) -> None:
        self._home = home
        self._trees = (before, _HERE)
        self._turns = turns

    def warm(self, images: int, count: int) -> Row:
        answers = self._by_turns(f"warm-{images}", images, "spawn", count=count)
        return self._row(f"warm qcow2 spawn, {images} bases", 1.1, answers, synced=True, work="spawn")

    def cold(self, count: int) -> Row:
        answers = self._by_turns("cold", 1, "cold", count=count)
        return self._row(f"cold qcow2 spawn, {_COLD_MIB} MiB", 1.05, answers, synced=True)

    def verify(self, instances: int, bases: int) -> Row:
        where = self._home / "pass"
        for side in ("then", "now"):
            verify_pass.build(str(where / side), instances, bases)
        answers = self._by_turns("pass", 1, "verify", count=1, prepared=True)
        row = self._row(f"pass, per disk of {instances:,}", 1.15, answers, work="verify")
        return dataclasses.replace(row, per=instances)

    def copies(self, count: int) -> str:
        """Compare raw disks of ours with cp and sync."""
        ours, theirs = [], []
        tree = Tree(_HERE, self._home / "copies", 1)
        try:
            tree.ask("prepare")
            (base,) = (
                each for each in (self._home / "copies" / "_base").iterdir() if each.stat().st_size > 2**20
            )
            for _turn in range(self._turns):
                ours += tree.ask("spawn", count=count, backend="raw", image_id="cold")["each"]
                for _number in range(count):
                    target = self._home / "copies" / "copy"
                    started = time.perf_counter()
                    subprocess.run(["cp", "--sparse=always", base, target], check=True)
                    subprocess.run(["sync", "-d", target], check=True)
                    theirs.append(time.perf_counter() - started)
                    target.unlink()
        finally:
            tree.close()
        then, now = statistics.median(theirs) * 1e3, statistics.median(ours) * 1e3
        return (
            f"raw copy of {_COLD_MIB} MiB: cp and sync {then:.1f} ms, ours {now:.1f} ms, {now / then:.2f} x"
        )

    # -- how -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _both(self, where: str, images: int) -> Iterator[Sequence[Tree]]:
        (self._home / where).mkdir(exist_ok=True)
        trees = [
            Tree(tree, self._home / where / side, images)
            for tree, side in zip(self._trees, ("then", "now"), strict=True)
        ]
        try:
            yield trees
        finally:
            for tree in trees:
                tree.close()

    def _by_turns(
        self, where: str, images: int, work: str, *, count: int, prepared: bool = False
    ) -> list[list[dict[str, Any]]]:
        answers: list[list[dict[str, Any]]] = [[], []]
        with self._both(where, images) as trees:
            for tree in trees:
                if not prepared:
                    tree.ask("prepare")
                tree.ask(work, count=1)
            for turn in range(self._turns):
                for side in (0, 1) if turn % 2 else (1, 0):
                    answers[side].append(trees[side].ask(work, count=count))
        calls = [self._calls(side, where, images, work) for side in (0, 1)]
        for side in (0, 1):
            answers[side][0]["calls"] = calls[side]
        return answers

    def _calls(self, side: int, where: str, images: int, work: str) -> float:
        """Return the system calls of one piece of work: those of six, less those of one."""
        counted = []
        for count in (1, 6):
            log = self._home / "calls"
            instances = self._home / where / ("then", "now")[side]
            tree = Tree(self._trees[side], instances, images, "strace", "-f", "-c", "-o", f"{log}")
            tree.ask(work, count=1)
            tree.ask(work, count=count)
            tree.close()
            found = [match for line in log.read_text().splitlines() if (match := _CALLS.fullmatch(line))]
            counted.append(sum(int(match[1]) for match in found if match[2] != "total"))
        return (counted[1] - counted[0]) / 5

    def _row(
        self,
        name: str,
        target: float,
        answers: list[list[dict[str, Any]]],
        *,
        synced: bool = False,
        work: str | None = None,
    ) -> Row:
        each = [statistics.median(one for answer in side for one in answer["each"]) for side in answers]
        cpu = [min(answer["cpu"] for answer in side) for side in answers]
        # That of the earlier one's disks: a disk of ours has been synced already.
        sync = [one for answer in answers[0] for one in answer.get("sync", ())] if synced else []
        sync_cpu = min(answer.get("sync_cpu", 0.0) for answer in answers[0]) if synced else 0.0
        calls = (answers[0][0]["calls"], answers[1][0]["calls"]) if work else None
        return Row(
            name,
            target,
            (each[0], each[1]),
            (cpu[0], cpu[1]),
            calls,
            statistics.median(sync) if sync else 0.0,
            sync_cpu,
        )


_ROWS: Mapping[str, Callable[[Beside], str]] = {
    "pass": lambda beside: beside.verify(3000, 1000).told(),
    "warm": lambda beside: beside.warm(1, 40).told(),
    "warm-1000": lambda beside: beside.warm(1000, 40).told(),
    "cold": lambda beside: beside.cold(3).told(),
    "copies": lambda beside: beside.copies(3),
}


@contextlib.contextmanager
def _unpacked(revision: str, home: pathlib.Path) -> Iterator[pathlib.Path]:
    archive = subprocess.run(["git", "archive", revision], cwd=_HERE, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(home / "then", filter="data")
    yield home / "then"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision")
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(_ROWS)}; default: all")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--directory", help="where to measure; default: the one for temporary files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagecache-beside-", dir=options.directory) as directory:
        home = pathlib.Path(directory)
        with _unpacked(options.revision, home) as before:
            beside = Beside(home, before, options.turns)
            print(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors", flush=True)
            for name in options.rows or _ROWS:
                print(_ROWS[name](beside), flush=True)
            print(f"load average after: {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
