# SPDX-License-Identifier: Apache-2.0
"""Holds every test to the rule of execve_rule, and notes beside a report what the tests ran on.

The servers of tests are on loopback, which no proxy of the machine stands before.
"""

from __future__ import annotations

import os
import pathlib
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.support import execve_rule

if any(name.lower().endswith("_proxy") for name in os.environ):
    for variable in ("no_proxy", "NO_PROXY"):
        passed_by = [os.environ.get(variable, ""), "127.0.0.1", "localhost", "::1"]
        os.environ[variable] = ",".join(filter(None, passed_by))


@pytest.fixture(autouse=True)
def no_program_opens_what_it_was_not_told() -> Iterator[None]:
    """Fail the test in which any process broke the rule: what is raised there may be lost."""
    execve_rule.take_notes()
    yield
    assert not (found := execve_rule.take_notes()), found


def pytest_sessionfinish(session: pytest.Session) -> None:
    report = session.config.getoption("xmlpath")
    # A worker of pytest-xdist has no report of its own.
    if report and not hasattr(session.config, "workerinput"):
        path = pathlib.Path(report).with_suffix(".machine")
        path.parent.mkdir(parents=True, exist_ok=True)
        user = "root" if os.geteuid() == 0 else "a user"
        path.write_text(f"Python {platform.python_version()}, {_qemu()}, {_system()}, as {user}\n")


def _qemu() -> str:
    if shutil.which("qemu-img") is None:
        return "no QEMU"
    said = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\d+(?:\.\d+)+)", said)
    return f"QEMU {version[1]}" if version else "QEMU of no version"


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()
