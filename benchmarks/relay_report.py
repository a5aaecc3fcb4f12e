# SPDX-License-Identifier: Apache-2.0
"""What the documentation says of relaying: the model's figures, beside what was measured.

    python -m benchmarks.relay_report [--lab FILE] [--directory doc/source/reference/benchmarks] [FLEET ...]

FILE has what ``python -m benchmarks.relay --json`` printed. Without it, the measured figures of the last
report stay. With numbers of fleets, from 0 on, only these are modelled anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl

from benchmarks import relay_model
from benchmarks.relay_model import Fleet

mpl.use("Agg")
# The same figures give the same file.
mpl.rcParams["svg.hashsalt"] = "imagecache-lib"

from matplotlib import pyplot as plt  # noqa: E402

_SIZE = 1_700_000_000
_ONE_SITE = Fleet(hosts=10_000, size=_SIZE, heads=8)
_SITES = Fleet(hosts=10_000, size=_SIZE, sites=40, wan=1e9, origin=10e9)

#: What is modelled, by its name in the table.
_FLEETS: dict[str, Fleet] = {
    "1,300 hosts, 1 head": Fleet(hosts=1300, size=_SIZE, heads=1),
    "1,300 hosts, 2 heads": Fleet(hosts=1300, size=_SIZE),
    "1,300 hosts, 4 heads": Fleet(hosts=1300, size=_SIZE, heads=4),
    "1,300 hosts, 2 heads, a hop of 0.02 s": Fleet(hosts=1300, size=_SIZE, hop=0.02),
    "1,300 hosts, 2 heads, a hop of 0.1 s": Fleet(hosts=1300, size=_SIZE, hop=0.1),
    "1,300 hosts, 2 heads, with faults": Fleet(hosts=1300, size=_SIZE).with_faults(0.01),
    "1,000 hosts at 4 sites": Fleet(hosts=1000, size=_SIZE, sites=4, wan=1e9, origin=1e9),
    "10,000 hosts at one site, 8 heads": Fleet(hosts=10_000, size=_SIZE, heads=8),
    "10,000 hosts at one site, 8 heads, with faults": Fleet(hosts=10_000, size=_SIZE, heads=8).with_faults(
        0.01
    ),
    "10,000 hosts at 40 sites": _SITES,
    "10,000 hosts at 40 sites, with faults": _SITES.with_faults(0.01),
    "2,600 hosts, 3 GB at 2.4 Gbit/s, 5 heads": Fleet(
        hosts=2600, size=3_000_000_000, link=2.4e9, origin=12e9, heads=5
    ),
}

#: Which of them the page compares with others' figures, and under which name.
_NAMED = {"1,300 hosts, 2 heads": "ours", "2,600 hosts, 3 GB at 2.4 Gbit/s, 5 heads": "krakens"}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relay_report")
    parser.add_argument("fleet", nargs="*", type=int, default=list(range(len(_FLEETS))))
    parser.add_argument("--lab", type=pathlib.Path)
    parser.add_argument(
        "--directory", type=pathlib.Path, default=pathlib.Path("doc/source/reference/benchmarks")
    )
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    kept = options.directory / "relay.json"
    before = json.loads(kept.read_text()) if kept.exists() else {"lab": [], "model": []}
    lab = before["lab"]
    if options.lab is not None:
        lab = [json.loads(line) for line in options.lab.read_text().splitlines() if line.startswith("{")]
    modelled = {each["name"]: each for each in before["model"]}
    for number, (name, fleet) in enumerate(_FLEETS.items()):
        if number in options.fleet:
            began = time.monotonic()
            modelled[name] = _figures(name, relay_model.run(fleet))
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    found = {"lab": lab, "model": [modelled[name] for name in _FLEETS if name in modelled]}
    kept.write_text(json.dumps(found, indent=1) + "\n")
    (options.directory / "relay.inc").write_text(_tables(found))
    _draw(found, options.directory)
    return 0


def _figures(name: str, outcome: relay_model.Outcome) -> dict[str, Any]:
    times = sorted(outcome.times.values())
    return {
        "name": name,
        "median": round(outcome.median, 1),
        "p99": round(outcome.p99, 1),
        "last": round(outcome.last, 1),
        "done": len(times),
        "hosts": outcome.fleet.hosts,
        "origin": round(outcome.origin, 2),
        "moved": outcome.moved,
        "fleet": {key: value for key, value in dataclasses.asdict(outcome.fleet).items() if _is_plain(value)},
        # Enough for a curve.
        "times": [round(times[int(share * (len(times) - 1) / 100)], 1) for share in range(101)],
    }


def _is_plain(value: object) -> bool:
    return not isinstance(value, dict)


def _tables(found: dict[str, Any]) -> str:
    lab = [
        (
            each["scenario"],
            each["hosts"],
            each["heads"],
            f"{each['median']:.1f}",
            f"{each['last']:.1f}",
            f"{each['last'] / each['ideal']:.2f}",
            f"{each['origin']:.2f}",
            f"{max(0.0, each['after_last_byte']):.2f}",
            f"{each['load']:.0f}",
        )
        for each in found["lab"]
    ]
    model = [
        (each["name"], each["median"], each["p99"], each["last"], each["done"], each["origin"], each["moved"])
        for each in found["model"]
    ]
    titles = (
        "scenario",
        "hosts",
        "heads",
        "median s",
        "last s",
        "last / ideal",
        "origin",
        "decode s",
        "load",
    )
    return (
        _table("Measured", titles, lab)
        + "\n"
        + _table("Modelled", ("fleet", "median s", "p99 s", "last s", "done", "origin", "moved"), model)
        + "\n"
        + "".join(_named(found["model"], name, as_name) for name, as_name in _NAMED.items())
    )


def _named(modelled: Sequence[dict[str, Any]], name: str, as_name: str) -> str:
    """Return a figure that the page's text refers to."""
    (found,) = (each for each in modelled if each["name"] == name)
    told = f"median {found['median']:.0f} s, p99 {found['p99']:.0f} s, last {found['last']:.0f} s"
    return f".. |{as_name}| replace:: {told}\n"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if not at else ' '} - {cell}" for at, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def _draw(found: dict[str, Any], directory: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5))
    for each in found["model"]:
        if "hop of" not in each["name"]:
            shares = [share * each["done"] / each["hosts"] for share in range(101)]
            axes.plot(each["times"], shares, label=each["name"], linewidth=1.3)
    axes.axvline(90, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("seconds since the begin of the job (modelled)")
    axes.set_ylabel("% of hosts that have the image")
    axes.set_xlim(left=0)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(directory / "relay-model.svg", metadata={"Date": None})
    plt.close(figure)
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(found["lab"]) + 1.2))
    names = [f"{each['scenario']}, {each['hosts']} hosts, {each['heads']} heads" for each in found["lab"]]
    axes.barh(names, [each["last"] / each["ideal"] for each in found["lab"]], color="#2a6f97")
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("until the last host / time of the image over one link (measured)")
    figure.tight_layout()
    figure.savefig(directory / "relay-measured.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
