# SPDX-License-Identifier: Apache-2.0
"""The results as JSON, as Markdown, and as reStructuredText for the documentation."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from benchmarks import figures, plots
from benchmarks.figures import Group, Row

_RATIOS = (
    "Ratios of medians; in brackets the least and the most of the ratios of single turns, in which each "
    "competitor ran once."
)
_SMALL = "A quick run with little data: it shows that the benchmarks work, and its numbers mean little."


@dataclasses.dataclass(frozen=True)
class Results:
    """All of one run.

    :param machine: facts by name.
    :param busy: other programs ran when it began.
    :param seconds: that the run took.
    :param failures: why what was not measured was not, by the group's key.
    """

    machine: dict[str, str]
    groups: list[Group]
    rows: list[Row]
    quick: bool
    busy: bool
    seconds: float
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Table:
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class _Heading:
    text: str


@dataclasses.dataclass(frozen=True)
class _Figure:
    name: str
    shows: str


_BUSY = "Other programs kept the machine busy beside this run: spreads are wide, and ratios only hint."

#: In a cell that has nothing to say.
_NOTHING = "-"

_Block = str | _Table | _Heading | _Figure


def write(results: Results, directory: pathlib.Path) -> None:
    """Write every form of the results into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    drawn = [_Figure(name, shows) for name, shows in plots.draw(results.groups, results.rows, directory)]
    blocks = _blocks(results, drawn)
    (directory / "results.json").write_text(json.dumps(_plain(results), indent=1) + "\n")
    (directory / "results.md").write_text(_markdown(blocks))
    # Not .rst: it is included by a page and is none itself.
    (directory / "results.inc").write_text(_rst(blocks, directory.name))


def targets(rows: Sequence[Row]) -> str:
    """Return the table of targets alone, to be shown at the end of a run."""
    return _markdown([_targets(rows)])


def _plain(results: Results) -> dict[str, object]:
    return {
        "quick": results.quick,
        "busy": results.busy,
        "seconds": round(results.seconds, 1),
        "machine": results.machine,
        "failures": results.failures,
        "rows": [{**dataclasses.asdict(row), "reached": row.reached} for row in results.rows],
        "groups": [dataclasses.asdict(group) for group in results.groups],
    }


# -- content -------------------------------------------------------------------------------------------


def _blocks(results: Results, drawn: list[_Figure]) -> list[_Block]:
    blocks: list[_Block] = [_SMALL] if results.quick else []
    if results.busy:
        blocks.append(_BUSY)
    blocks += [
        _Heading("Numbers to reach"),
        _RATIOS,
        _targets(results.rows),
        *drawn,
        _Heading("Machine and versions"),
        _Table(("what", "which"), list(results.machine.items())),
    ]
    blocks += [f"Not measured: {key}: {why}" for key, why in results.failures.items()]
    for group in results.groups:
        blocks += [_Heading(group.title), group.timed, _spreads(group)]
        if (parts := _parts(group)) is not None:
            blocks += [_why(group, results.rows), parts]
        blocks += group.notes
    return blocks


def _targets(rows: Sequence[Row]) -> _Table:
    lines = []
    for row in rows:
        ratio = f"{row.ratio:.3g}{' ' + row.unit if row.unit else ''}"
        if row.spread is not None:
            ratio += f" ({row.spread[0]:.3g} to {row.spread[1]:.3g})"
        target, reached = _NOTHING, _NOTHING
        if row.target is not None:
            target, reached = f"≤ {row.target:.3g}", "yes" if row.reached else "**no**"
        lines.append((row.work, row.ours, row.against, ratio, target, reached))
    return _Table(("work", "ours", "against", "ratio", "target", "reached"), lines)


def _spreads(group: Group) -> _Table:
    show, lines = figures.show_seconds, []
    for name in group.series:
        spread = group.spread(name)
        lines.append(
            (
                name,
                show(spread.least),
                show(spread.median),
                show(spread.most),
                str(spread.count),
                _beside(group, name),
            )
        )
    return _Table(("competitor", "min", "median", "max", "runs", "beside"), lines)


def _beside(group: Group, name: str) -> str:
    """Return what else was counted in the median run."""
    sample, said = group.middle(name), []
    if "cpu" in sample:
        said.append(f"processor {sample['cpu'] + sample.get('cpu_children', 0):.2f} s")
    if "cpu_machine" in sample:
        said.append(f"whole machine {sample['cpu_machine']:.2f} s")
    if "allocated" in sample:
        said.append(f"base {figures.show_bytes(sample['allocated'])}")
    if "peak_over_import" in sample:
        said.append(f"peak memory over imports {figures.show_bytes(sample['peak_over_import'])}")
    if "downloads" in sample:
        said.append(f"downloads {sample['downloads']}")
    return ", ".join(said) or _NOTHING


def _why(group: Group, rows: Sequence[Row]) -> str:
    missed = [row.work for row in rows if row.group == group.key and not row.reached]
    if not missed:
        return "Where the time goes, in the median run:"
    return f"Not reached: {'; '.join(missed)}. Where the time goes, in the median run:"


def _parts(group: Group) -> _Table | None:
    """Return where the time of our median runs went. None: nothing is known of it."""
    with_phases = [name for name in group.series if group.middle(name).get("phases")]
    if not with_phases:
        return None
    phases = list(dict.fromkeys(phase for name in with_phases for phase in group.middle(name)["phases"]))
    lines = []
    for phase in phases:
        times = [group.middle(name)["phases"].get(phase) for name in with_phases]
        lines.append((phase, *(_NOTHING if time is None else figures.show_seconds(time) for time in times)))
    return _Table(("phase", *with_phases), lines)


# -- forms ---------------------------------------------------------------------------------------------


def _markdown(blocks: Sequence[_Block]) -> str:
    out = []
    for block in blocks:
        if isinstance(block, _Heading):
            out.append(f"## {block.text}")
        elif isinstance(block, _Figure):
            out.append(f"![{block.shows}]({block.name})")
        elif isinstance(block, _Table):
            rule = ("---",) * len(block.header)
            out.append("\n".join(f"| {' | '.join(line)} |" for line in (block.header, rule, *block.rows)))
        else:
            out.append(block)
    return "\n\n".join(out) + "\n"


def _rst(blocks: Sequence[_Block], directory: str) -> str:
    out = []
    for block in blocks:
        if isinstance(block, _Heading):
            out.append(f"{block.text}\n{'-' * len(block.text)}")
        elif isinstance(block, _Figure):
            out.append(f".. figure:: {directory}/{block.name}\n   :alt: {block.shows}\n\n   {block.shows}")
        elif isinstance(block, _Table):
            lines = [".. list-table::", "   :header-rows: 1", ""]
            for cells in (block.header, *block.rows):
                lines += [f"   {'  -' if at else '* -'} {_escaped(cell)}" for at, cell in enumerate(cells)]
            out.append("\n".join(lines))
        else:
            out.append(_escaped(block))
    return "\n\n".join(out) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("_", "\\_").replace("`", "\\`").replace("|", "\\|")
