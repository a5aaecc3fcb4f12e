# SPDX-License-Identifier: Apache-2.0
"""Nova's own tests with the adapter in the place of Nova's classes, in an environment of their own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Iterable

import imagecache_lib
from tests.lab import nova_suites_known as known
from tests.lab.environment import describe_library, environment

HERE = pathlib.Path(__file__).parent.parent / "lab"
SOURCES = pathlib.Path(imagecache_lib.__file__).parent.parent
ADAPTER = SOURCES / "integrations/nova/nova/virt"


#: Processes that share the tests: as many as a machine of CI has processors.
WORKERS = 2


def outcomes(tests: Iterable[str], tmp_path: pathlib.Path) -> dict[str, str]:
    """Return what became of each test, by id."""
    python = environment("nova-suites", HERE / "nova-suites-requirements.txt") / "bin/python"
    site = tmp_path / "site"
    site.mkdir()
    describe_library(site)
    more = {
        "PYTHONPATH": f"{SOURCES}:{site}",
        "IMAGECACHE_ADAPTER": str(ADAPTER),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "TMPDIR": str(tmp_path),
    }
    running = []
    for number in range(WORKERS):
        answer, log = tmp_path / f"outcomes.{number}", tmp_path / f"log.{number}"
        part = f"{number}/{WORKERS}"
        command = [str(python), "-P", str(HERE / "nova_suites.py"), str(answer), part, *tests]
        with open(log, "w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **more}
            )
        running.append((process, answer, log))
    found: dict[str, str] = {}
    for process, answer, log in running:
        process.wait()
        assert answer.exists(), log.read_text()[-4000:]
        found |= json.loads(answer.read_text())
    return found


def test_novas_own_tests_pass_through_the_adapter(tmp_path: pathlib.Path) -> None:
    found = outcomes(known.SUITES, tmp_path)
    ran = {suite: sum(name.startswith(f"{suite}.") for name in found) for suite in known.SUITES}
    assert ran == known.SUITES
    failed = {name: outcome for name, outcome in found.items() if outcome not in ("ok", "skipped")}
    assert {name: why for name, why in failed.items() if name not in known.CANNOT_APPLY} == {}
    # The list may only become shorter: a test that passes now leaves it.
    assert known.CANNOT_APPLY.keys() - failed.keys() == set()
    assert len(known.CANNOT_APPLY) <= known.AT_MOST
