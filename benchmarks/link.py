# SPDX-License-Identifier: Apache-2.0
"""A cold spawn over a link of 1 Gbit/s, in a network namespace that has nothing else.

Run as a module it is the part that lives in the namespace; its own Glance serves there. The namespace goes
with its last process.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks import figures, lab, serving
from benchmarks.cold import FLOOR, OURS
from benchmarks.figures import Group, Row
from tests.lab import glance as glance_lab
from tests.support import needs

_RATE = "1gbit"


def measure(running: lab.Lab) -> tuple[Group, list[Row]]:
    group = Group(
        "link",
        "Cold spawn at 1 Gbit/s, zlib qcow2",
        "As the cold spawn, in a network namespace whose loopback a token bucket limits to 1 Gbit/s with "
        "frames of 1,500 bytes. The download is to nowhere, with its digest on a second thread.",
    )
    home = running.home / "link"
    home.mkdir()
    file = running.data.files["zlib"]
    order = {
        "home": str(home),
        "image": str(file.path),
        "sha512": file.sha512,
        "size": running.data.virtual_size,
        "repetitions": running.scale.repetitions,
    }
    out = subprocess.run(
        [needs.program("unshare"), "--net", "--", sys.executable, "-m", __name__, json.dumps(order)],
        check=True,
        cwd=serving.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    ).stdout
    group.series = json.loads(out)
    for name in group.series:
        running.tell(f"{group.key} {name}: {figures.show_seconds(group.spread(name).median)}")
    rate = file.size * 8 / group.spread(FLOOR).median / 1e9
    group.notes.append(f"The download alone came at {rate:.3g} Gbit/s of payload.")
    return group, [figures.compare(group, "cold spawn at 1 Gbit/s", OURS, FLOOR, 1.1)]


def _inside(order: dict[str, Any]) -> dict[str, list[figures.Sample]]:
    home = pathlib.Path(order["home"])
    ip, tc = needs.program("ip"), needs.program("tc")
    subprocess.run([ip, "link", "set", "lo", "up"], check=True)
    (home / "glance").mkdir()
    with glance_lab.running_glance(home / "glance") as glance:
        image_id = glance.upload(pathlib.Path(order["image"]), disk_format="qcow2")
        subprocess.run([ip, "link", "set", "lo", "mtu", "1500"], check=True)
        limit = ["root", "tbf", "rate", _RATE, "burst", "256kb", "latency", "50ms"]
        subprocess.run([tc, "qdisc", "replace", "dev", "lo", *limit], check=True)
        arguments = ["--glance", glance.url, "--token", glance_lab.MEMBER]
        (home / "instances").mkdir()
        with (
            serving.Competitor(
                sys.executable,
                "benchmarks.cache_driver",
                "--instances",
                str(home / "instances"),
                *arguments,
                log=home / "ours.log",
            ) as ours,
            serving.Competitor(
                sys.executable, "benchmarks.floor_driver", *arguments, log=home / "floor.log"
            ) as floor,
        ):

            def cold() -> figures.Sample:
                ours.ask("forget")
                lab.settle()
                return ours.ask("spawn", image_id=image_id, size=order["size"])

            group = Group("link", "", "")
            competitors = {
                OURS: cold,
                FLOOR: lambda: floor.ask("download", image_id=image_id, digest=order["sha512"]),
            }
            figures.by_turns(group, competitors, order["repetitions"], lambda _line: None)
            return group.series


if __name__ == "__main__":
    print(json.dumps(_inside(json.loads(sys.argv[1]))))
