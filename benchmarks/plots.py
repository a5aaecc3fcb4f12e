# SPDX-License-Identifier: Apache-2.0
"""The results as pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl

from benchmarks.figures import Group, Row

mpl.use("Agg")
# The same results give the same file.
mpl.rcParams["svg.hashsalt"] = "imagecache-lib"

from matplotlib import pyplot as plt  # noqa: E402

_REACHED, _MISSED, _OURS, _OTHERS = "#2a7f62", "#b3413a", "#2a6f97", "#9aa5b1"


def draw(groups: Sequence[Group], rows: Sequence[Row], directory: pathlib.Path) -> list[tuple[str, str]]:
    """Draw all pictures into a directory; return the name of each and what it shows."""
    return [_targets(rows, directory), _cold(groups, directory)]


def _targets(rows: Sequence[Row], directory: pathlib.Path) -> tuple[str, str]:
    rows = [row for row in rows if row.target is not None]
    figure, axes = plt.subplots(figsize=(9, 0.38 * len(rows) + 1.2))
    shares = [row.ratio / (row.target or 1) for row in rows]
    colours = [_REACHED if row.reached else _MISSED for row in rows]
    axes.barh([row.work for row in rows], shares, color=colours)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("ratio measured / ratio to reach (left of the line: reached)")
    return _save(figure, directory, "targets.svg", "What was measured over what was to be reached")


def _cold(groups: Sequence[Group], directory: pathlib.Path) -> tuple[str, str]:
    cold = [group for group in groups if group.key.startswith("cold-")]
    heights = [len(group.series) for group in cold] or [1]
    figure, all_axes = plt.subplots(
        len(cold) or 1,
        1,
        figsize=(9, 0.42 * sum(heights) + 0.7 * len(heights)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        sharex=True,
    )
    for axes, group in zip(all_axes[:, 0], cold, strict=False):
        spreads = {name: group.spread(name) for name in group.series}
        medians = [spread.median for spread in spreads.values()]
        axes.barh(
            list(spreads),
            medians,
            xerr=[
                [spread.median - spread.least for spread in spreads.values()],
                [spread.most - spread.median for spread in spreads.values()],
            ],
            color=[_OURS if name.startswith("imagecache-lib") else _OTHERS for name in spreads],
            ecolor="black",
            capsize=3,
        )
        axes.invert_yaxis()
        axes.set_title(group.title, loc="left", fontsize=10)
    all_axes[-1, 0].set_xlabel("seconds: median, and least to most")
    return _save(figure, directory, "cold.svg", "Cold spawns")


def _save(figure: Any, directory: pathlib.Path, name: str, shows: str) -> tuple[str, str]:
    figure.tight_layout()
    figure.savefig(directory / name, metadata={"Date": None})
    plt.close(figure)
    return name, shows
