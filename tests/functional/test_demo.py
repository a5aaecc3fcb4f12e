# SPDX-License-Identifier: Apache-2.0
"""The demonstration holds what it claims with a real web server, too, beside the one that it brings."""

from __future__ import annotations

import pathlib
import subprocess
import sys

from tests.support import needs

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_demonstration_holds_what_it_claims() -> None:
    for program in ("qemu-img", "qemu-system-x86_64", "nginx"):
        needs.program(program)
    finished = run_demo("--server", "nginx")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Everything was as claimed" in finished.stdout
    assert "HELLO BOOT 1" in finished.stdout
    assert "✗" not in finished.stdout
