# SPDX-License-Identifier: Apache-2.0
"""What is measured: series of samples, rows that compare two of them with a target, groups of both."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: One run of one competitor: at least ``seconds``.
Sample = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Least, median and most of some values."""

    least: float
    median: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min(values), statistics.median(values), max(values), len(values))


@dataclasses.dataclass
class Group:
    """Competitors that did the same thing by turns.

    :param timed: what was timed, and from where.
    :param notes: what was found beside, a sentence each.
    """

    key: str
    title: str
    timed: str
    series: dict[str, list[Sample]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def spread(self, name: str, key: str = "seconds") -> Spread:
        return Spread.of([sample[key] for sample in self.series[name]])

    def middle(self, name: str) -> Sample:
        """Return the sample whose time is the (lower) median, whole."""
        ordered = sorted(self.series[name], key=lambda sample: float(sample["seconds"]))
        return ordered[(len(ordered) - 1) // 2]


@dataclasses.dataclass(frozen=True)
class Row:
    """One number to reach.

    :param ours: and ``against``: what the ratio is of, in words with the medians.
    :param ratio: ours over theirs; for an absolute target the value itself.
    :param target: ratio that is wanted at most. None: the row is only there to be compared with.
    :param group: key of the group that it comes from.
    :param spread: least and most of the ratio of the runs of one turn. None: there are no pairs.
    """

    work: str
    ours: str
    against: str
    ratio: float
    target: float | None
    group: str
    spread: tuple[float, float] | None = None
    unit: str = ""

    @property
    def reached(self) -> bool:
        return self.target is None or self.ratio <= self.target


def compare(group: Group, work: str, ours: str, against: str, target: float | None) -> Row:
    """Return the row that compares the medians of two series of a group."""
    mine, theirs = group.spread(ours), group.spread(against)
    pairs = [
        a["seconds"] / b["seconds"] for a, b in zip(group.series[ours], group.series[against], strict=True)
    ]
    return Row(
        work,
        f"{ours}: {show_seconds(mine.median)}",
        f"{against}: {show_seconds(theirs.median)}",
        mine.median / theirs.median,
        target,
        group.key,
        (min(pairs), max(pairs)),
    )


def by_turns(
    group: Group,
    competitors: Mapping[str, Callable[[], Sample]],
    repetitions: int,
    tell: Callable[[str], None],
) -> Group:
    """Run all competitors once, then all again: a machine that slows down slows all of them."""
    for name in competitors:
        group.series[name] = []
    for repetition in range(repetitions):
        for name, run in competitors.items():
            sample = run()
            group.series[name].append(sample)
            tell(f"{group.key} {repetition + 1}/{repetitions} {name}: {show_seconds(sample['seconds'])}")
    return group


def show_seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"


def show_bytes(count: float) -> str:
    return f"{count / 2**20:.4g} MiB"
