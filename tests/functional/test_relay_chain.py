# SPDX-License-Identifier: Apache-2.0
"""Real hosts in namespaces of their own pass an image on: one download, at about the speed of one link."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from tests.support import needs

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(("scenario", "hosts", "done"), [("chain", 4, 4), ("trouble", 7, 5)])
def test_hosts_receive_from_each_other_and_one_asks_the_origin(scenario: str, hosts: int, done: int) -> None:
    needs.root()
    words = [scenario, "--hosts", str(hosts), "--heads", "1", "--megabytes", "8", "--json"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.relay", *words]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    (outcome,) = [json.loads(line) for line in ran.stdout.splitlines()]
    # The rest of what benchmarks/relay.py measures depends on how busy the machine is.
    assert outcome["done"] == done
    assert outcome["origin"] < 1.2
