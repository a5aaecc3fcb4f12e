# SPDX-License-Identifier: Apache-2.0
"""The driver that the documentation shows works as it is printed there."""

from __future__ import annotations

import pathlib
import subprocess
import sys

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "driver_60_lines.py"
MIB = 2**20


def run_example(instances: pathlib.Path, image: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLE, instances, image], capture_output=True, text=True, check=False, timeout=300
    )


def test_the_driver_example_makes_grows_keeps_and_removes_disks(tmp_path: pathlib.Path) -> None:
    instances = tmp_path / "instances"
    instances.mkdir()
    image = tmp_path / "image.raw"
    image.write_bytes(b"\7" * MIB + bytes(3 * MIB))
    finished = run_example(instances, image)
    assert finished.returncode == 0, finished.stderr
    first, second, grown, used, unused = finished.stdout.splitlines()
    assert f"virtual_size={2**30}" in first and f"virtual_size={2**30}" in second
    assert f"virtual_size={2**31}" in grown
    assert used.startswith("kept debian - used by the disk ")
    assert unused.startswith("kept debian - unused, too young")
    assert sorted(path.name for path in instances.iterdir()) == ["_base", "locks"]
    (base,) = (path for path in (instances / "_base").iterdir() if path.is_file())
    assert base.stat().st_size == 4 * MIB


def test_the_driver_example_gives_up_for_good_where_no_other_host_would_do_better(
    tmp_path: pathlib.Path,
) -> None:
    finished = run_example(tmp_path, tmp_path / "absent")
    assert finished.returncode != 0
    assert "BuildAborted: image debian: the file is not there" in finished.stderr


def test_the_driver_example_has_as_many_lines_as_it_says() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
