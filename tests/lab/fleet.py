# SPDX-License-Identifier: Apache-2.0
"""A fleet on one machine: agents and conductors, each a process of its own, with a message bus between them.

Agents that a test does not end, configure or break are shared by all tests of a module: each test has its own
images, and its own job database.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from imagecache_lib.precache.reader import EmbeddedJobs
from imagecache_lib.store import layout
from tests.lab import glance as glance_lab
from tests.lab import rabbit as rabbit_lab
from tests.lab import server

_PYTHON = (sys.executable, "-W", "ignore", "-m")

#: A message bus that is gone is looked for every second, where oslo.messaging waits up to thirty.
_BUS = """
[oslo_messaging_rabbit]
rabbit_retry_interval = 1
rabbit_interval_max = 1
kombu_reconnect_delay = 0.5
"""


_BUS_URL = "OS_DEFAULT__TRANSPORT_URL"


@dataclasses.dataclass
class Fleet:
    """Agents, and the conductors of one test.

    :param home: for all that conductors write.
    :param agents_home: for all that agents write.
    :param glance_url: where agents fetch from.
    :param stack: ends what was started here.
    """

    home: pathlib.Path
    agents_home: pathlib.Path
    rabbit: rabbit_lab.Rabbit
    glance_url: str
    topic: str
    stack: contextlib.ExitStack
    agents: dict[str, tuple[int, contextlib.ExitStack]] = dataclasses.field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
        return {
            **kept,
            "HOME": str(self.home),
            _BUS_URL: _bus(self.rabbit.port),
            "OS_TOKEN": glance_lab.ADMIN,
            "IMAGECACHE_JOBS": self.jobs,
        }

    @property
    def jobs(self) -> str:
        """The path of the job database."""
        return str(self.home / "jobs.sqlite")

    # -- agents --------------------------------------------------------------------------------------

    def instances(self, name: str) -> pathlib.Path:
        return self.agents_home / name / "instances"

    def log(self, name: str) -> pathlib.Path:
        return self.agents_home / name / "agent.log"

    def start_agent(self, name: str, *words: str, interval: int = -1) -> int:
        """Start a host's agent, and return its pid when it is ready."""
        pid = self.launch_agent(name, *words, interval=interval)
        self.wait_until_ready(name)
        return pid

    def launch_agent(
        self,
        name: str,
        *words: str,
        interval: int = -1,
        directory: str | None = None,
        url: str | None = None,
        bus: int | None = None,
    ) -> int:
        """Start a host's agent, and return its pid at once.

        :param directory: name of the directory for all it keeps, if that is not the host's name.
        :param url: where it fetches from, if it does not do so where all others do.
        :param bus: loopback port of the message bus, if it is not the one of all others.
        """
        directory = directory or name
        self.instances(directory).mkdir(parents=True, exist_ok=True)
        configuration = self.agents_home / directory / "imagecache.conf"
        configuration.write_text(
            f"[DEFAULT]\nhost = {name}\ninstances_path = {self.instances(directory)}\n"
            f"[image_cache]\nmanager_interval = {interval}\n[glance]\nnum_retries = 1\n{_BUS}"
        )
        self.log(directory).write_bytes(b"")
        running = contextlib.ExitStack()
        self.stack.callback(running.close)
        options = ("--topic", self.topic, "--glance-endpoint", url or self.glance_url)
        pid = running.enter_context(
            server.running(
                [*_command(configuration), "agent", *options, *words],
                ready=lambda: True,
                log=self.log(directory),
                environment=self.environment if bus is None else {**self.environment, _BUS_URL: _bus(bus)},
            )
        )
        self.agents[directory] = pid, running
        return pid

    def wait_until_ready(self, *names: str) -> None:
        """Wait until agents that were launched are ready."""
        for name in names:
            pid, log = self.agents[name][0], self.log(name)

            def is_ready(pid: int = pid, log: pathlib.Path = log) -> bool:
                assert _is_running(pid), log.read_text()
                return b"is ready" in log.read_bytes()

            server.wait_until(is_ready, f"the agent of {name}", seconds=240)

    def start_agents(self, *names: str) -> None:
        """Start the agents of several hosts at the same time."""
        for name in names:
            self.launch_agent(name)
        self.wait_until_ready(*names)

    def kill_agent(self, name: str) -> None:
        """Have an agent die at this very instruction."""
        pid, running = self.agents.pop(name)
        os.kill(pid, signal.SIGKILL)
        running.close()

    def close(self) -> None:
        """End all that was started here. How agents end when they are asked to is no matter of this."""
        for name in list(self.agents):
            self.kill_agent(name)
        self.stack.close()

    def has(self, name: str, image_id: str) -> bool:
        return (self.instances(name) / "_base" / layout.base_name(image_id)).exists()

    def in_flight(self, name: str) -> list[pathlib.Path]:
        """Return what lies in the directory of files in flight of a host."""
        stage = self.instances(name) / "_base" / ".imagecache" / "stage"
        return list(stage.iterdir()) if stage.is_dir() else []

    def written(self, name: str) -> int:
        """Return how many bytes of the image that a host fetches are in its file."""
        sizes = [0]
        for path in self.in_flight(name):
            with contextlib.suppress(FileNotFoundError):  # it was published meanwhile
                sizes.append(path.stat().st_size if "." not in path.name else 0)
        return max(sizes)

    # -- conductors ----------------------------------------------------------------------------------

    def conductor(self, *words: str) -> subprocess.Popen[str]:
        """Begin a command of ``imagecache precache``."""
        configuration = self.home / "conductor.conf"
        configuration.write_text(_BUS)
        return self._begin(*_command(configuration), "precache", *words)

    def impatient(self, *words: str) -> subprocess.Popen[str]:
        """Begin what :mod:`tests.lab.impatient` does: a conductor that does not wait long for hosts."""
        return self._begin(*_PYTHON, "tests.lab.impatient", self.jobs, self.topic, *words)

    def _begin(self, *command: str) -> subprocess.Popen[str]:
        with (self.home / "conductor.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment
            )
        self.stack.enter_context(process)  # waits, and closes the pipe
        self.stack.callback(process.kill)
        return process

    def said(self) -> str:
        """Return what conductors said so far."""
        return (self.home / "conductor.log").read_text()

    def finish(self, process: subprocess.Popen[str], *, code: int = 0) -> dict[tuple[str, str], Any]:
        """Return the rows of a command's table, by host and image."""
        out, _err = process.communicate(timeout=400)
        assert process.returncode == code, (out, self.said())
        return {(row["host"], row.get("image", "")): row for row in json.loads(out)}

    def start(self, names: list[str], images: list[str], *words: str) -> subprocess.Popen[str]:
        hosts = [word for name in names for word in ("--host", name)]
        return self.conductor(
            "start", *images, *hosts, "--topic", self.topic, "--concurrency", "8", "-f", "json", *words
        )

    def resume(self) -> subprocess.Popen[str]:
        return self.conductor("resume", self.job_id(), "--topic", self.topic, "-f", "json")

    def cancel(self) -> dict[tuple[str, str], Any]:
        """Cancel the last job, and return the rows of its table."""
        return self.finish(
            self.conductor("cancel", self.job_id(), "--topic", self.topic, "-f", "json"), code=10
        )

    def job_id(self) -> str:
        """Return the id of the last job, once there is one."""
        self.wait_for(lambda: bool(EmbeddedJobs(self.jobs).summaries()))
        return EmbeddedJobs(self.jobs).summaries()[-1].id

    def attempt(self) -> int:
        """Return how often the last job was resumed."""
        return EmbeddedJobs(self.jobs).get(self.job_id()).attempt

    def wait_for(self, what: Callable[[], bool]) -> None:
        server.wait_until(what, "the fleet", seconds=240)


def _bus(port: int) -> str:
    """Return the transport URL of a message bus."""
    return f"rabbit://guest:guest@127.0.0.1:{port}/"


def _command(configuration: pathlib.Path) -> tuple[str, ...]:
    return (*_PYTHON, "imagecache_lib.cli.main", "--config-file", str(configuration))


def _is_running(pid: int) -> bool:
    """Whether a child runs: one that has ended, and is not waited for yet, is a zombie."""
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state not in "ZX"
