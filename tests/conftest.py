# SPDX-License-Identifier: Apache-2.0
"""Holds every test to the rule of execve_rule, and notes what tests ran on, and which one runs.

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


class RunningTest:
    """Keeps the name of the test that runs in a file, where it stays when the process dies or is stopped."""

    def __init__(self, path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self.path.write_text(f"{item.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    report = config.getoption("xmlpath")
    if report:
        # Workers of pytest-xdist have no report of their own, and know that of who started them.
        worker = getattr(config, "workerinput", {"workerid": "main"})["workerid"]
        config.pluginmanager.register(RunningTest(pathlib.Path(report).with_suffix(f".{worker}.running")))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    report = session.config.getoption("xmlpath")
    if report and not hasattr(session.config, "workerinput"):
        path = pathlib.Path(report).with_suffix(".machine")
        user = "root" if os.geteuid() == 0 else "a user"
        path.write_text(f"Python {platform.python_version()}, {_qemu()}, {_system()}, as {user}\n")
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            for running in path.parent.glob(f"{path.stem}.*.running"):
                running.unlink()


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
