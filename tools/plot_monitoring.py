# SPDX-License-Identifier: Apache-2.0
"""Draw what some of the dashboard's expressions give on the recorded day: ``plot_monitoring.py FILE.svg``.

A real Prometheus evaluates them. The picture is matplotlib's, with the titles of the dashboard's panels.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
# The same day gives the same file.
mpl.rcParams["svg.hashsalt"] = "imagecache-lib"
mpl.rcParams["font.size"] = 8

from matplotlib import pyplot as plt  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.lab.prometheus import running_prometheus  # noqa: E402
from tests.support import recorded_series  # noqa: E402

MONITORING = ROOT / "examples/monitoring"
#: Titles of panels, and what a unit of the axis is: its name, and how many of the expression's it has.
PANELS = {
    "Bytes on disk by what keeps them": ("MiB", 2**20),
    "Filesystem, free": ("per cent", 0.01),
    "Failed fetches by reason": ("in 20 minutes", 1),
    "Since the last pass": ("minutes", 60),
}
#: When the day ends: any time will do, the same each time.
END = 1_790_000_000.0


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="imagecache-") as name:
        home = pathlib.Path(name)
        series = recorded_series.record(home / "caches", END)
        with running_prometheus(home, series, MONITORING / "rules.yml") as prometheus:
            figure, axes = plt.subplots(2, 2, figsize=(9, 5.6))
            for axis, (title, (unit, scale)) in zip(axes.flat, PANELS.items(), strict=True):
                found = prometheus.range(expression(title), END - recorded_series.DAY + 3600, END, 600)
                draw(axis, title, unit, scale, found)
            figure.tight_layout()
            figure.savefig(sys.argv[1], metadata={"Date": None})
    return 0


def expression(title: str) -> str:
    """Return the expression of the dashboard's panel of that title."""
    panels = json.loads((MONITORING / "grafana.json").read_text())["panels"]
    found: str = next(each for each in panels if each["title"] == title)["targets"][0]["expr"]
    return found.replace("$__rate_interval", "20m").replace("$instance", ".*")


def draw(axis: Any, title: str, unit: str, scale: float, found: list[dict[str, Any]]) -> None:
    """Draw an expression's series, of which those that are 0 all day are left out."""
    begin = END - recorded_series.DAY
    for each in found:
        hours = [(float(when) - begin) / 3600 for when, _value in each["values"]]
        values = [float(value) / scale for _when, value in each["values"]]
        if any(values):
            axis.plot(hours, values, label=", ".join(each["metric"].values()), linewidth=1.2)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("hours")
    axis.set_ylabel(unit)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    sys.exit(main())
