# SPDX-License-Identifier: Apache-2.0
"""The demonstration keeps its claims, with either web server, and notices one that is not so."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("web_server", ["nginx", "range_server"])
def test_the_demonstration_holds_what_it_claims(web_server: str) -> None:
    for program in ("qemu-img", "qemu-system-x86_64", *(["nginx"] if web_server == "nginx" else [])):
        needs.program(program)
    finished = run_demo("--server", web_server)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Everything was as claimed" in finished.stdout
    assert "HELLO BOOT 1" in finished.stdout
    assert "✗" not in finished.stdout
