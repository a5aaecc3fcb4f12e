# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus on the loopback interface, with series that were recorded before it started."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from tests.lab import server
from tests.support import needs
from tests.support.ports import free_port


@dataclasses.dataclass(frozen=True)
class Prometheus:
    """A running server.

    :param port: that it listens on.
    """

    port: int

    def range(self, expression: str, begin: float, end: float, step: float) -> list[dict[str, Any]]:
        """Evaluate an expression at each step between two times, in epoch seconds; return its series."""
        return self._result("query_range", query=expression, start=begin, end=end, step=step)

    def at(self, expression: str, when: float) -> list[dict[str, Any]]:
        """Evaluate an expression at one time."""
        return self._result("query", query=expression, time=when)

    def rules(self) -> list[dict[str, Any]]:
        """Return the alert rules that it loaded, with the health of each."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/rules", timeout=120) as answer:
            groups = json.load(answer)["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _result(self, what: str, **fields: object) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(fields)}"
        try:
            with urllib.request.urlopen(url, timeout=120) as answer:
                told = json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{fields['query']}: {error.read().decode()}") from error
        found: list[dict[str, Any]] = told["data"]["result"]
        return found


def promtool(*words: str | pathlib.Path) -> str:
    """Run promtool, and return what it prints.

    :raises AssertionError: it found a fault.
    """
    done = subprocess.run([needs.program("promtool"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def running_prometheus(home: pathlib.Path, series: str, rules: pathlib.Path) -> Iterator[Prometheus]:
    """Run a server that has these series, in OpenMetrics with timestamps, and that evaluates these rules."""
    (home / "recorded").write_text(series)
    promtool("tsdb", "create-blocks-from", "openmetrics", home / "recorded", home / "data")
    configuration = home / "prometheus.yml"
    configuration.write_text(f"global: {{evaluation_interval: 1s}}\nrule_files: [{rules}]\n")
    port = free_port()
    command = [
        needs.program("prometheus"),
        f"--config.file={configuration}",
        f"--storage.tsdb.path={home / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with server.running(command, ready=lambda: _is_ready(port), log=home / "prometheus.log"):
        yield Prometheus(port)


def _is_ready(port: int) -> bool:
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5) as answer,
    ):
        return bool(answer.status == 200)
    return False
