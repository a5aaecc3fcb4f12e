# SPDX-License-Identifier: Apache-2.0
"""Nova's own tests with the adapter in the place of Nova's classes, in an environment of their own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import subprocess

import imagecache_lib
from tests.lab import nova_suites_known as known
from tests.lab.environment import environment

HERE = pathlib.Path(__file__).parent.parent / "lab"
SOURCES = pathlib.Path(imagecache_lib.__file__).parent.parent
ADAPTER = SOURCES / "integrations/nova/nova/virt"


def outcomes(tests: list[str], tmp_path: pathlib.Path) -> dict[str, str]:
    """Return what became of each test, by id."""
    python = environment("nova-suites", HERE / "nova-suites-requirements.txt") / "bin/python"
    answer = tmp_path / "outcomes.json"
    # What says which backends there are lies beside the sources only where the package is installed.
    metadata = tmp_path / "metadata/imagecache_lib-0.dist-info"
    metadata.mkdir(parents=True)
    for name in ("METADATA", "entry_points.txt"):
        text = importlib.metadata.distribution("imagecache-lib").read_text(name)
        assert text is not None
        (metadata / name).write_text(text)
    more = {
        "PYTHONPATH": f"{SOURCES}:{metadata.parent}",
        "IMAGECACHE_ADAPTER": str(ADAPTER),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "TMPDIR": str(tmp_path),
    }
    command = [str(python), "-P", str(HERE / "nova_suites.py"), str(answer), *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **more})
    assert answer.exists(), done.stderr[-4000:]
    found: dict[str, str] = json.loads(answer.read_text())
    return found


def compare(tests: list[str], at_least: int, tmp_path: pathlib.Path) -> None:
    found = outcomes(tests, tmp_path)
    assert len(found) >= at_least, f"only {len(found)} tests ran"
    failed = {name for name, outcome in found.items() if outcome not in ("ok", "skipped")}
    expected = {name for name in known.CANNOT_APPLY if name in found}
    assert failed - expected == set()
    # The list may only become shorter: one that passes now leaves it.
    assert expected - failed == set()


def test_novas_image_types_and_cache_pass_their_own_tests(tmp_path: pathlib.Path) -> None:
    compare(known.SAMPLE, 178, tmp_path)
