# SPDX-License-Identifier: Apache-2.0
"""``imagecache agent`` as a service: it is ready, and ends, with and without a message bus."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

COMMAND = (sys.executable, "-W", "ignore", "-m", "imagecache_lib.cli.main")


class Service:
    """An agent as systemd would run it, on a message bus that is not there."""

    def __init__(self, home: pathlib.Path) -> None:
        self.instances = home / "instances"
        self.instances.mkdir()
        self.report = home / "instances.json"
        self.report.write_text(json.dumps([]))
        self.configuration = home / "imagecache.conf"
        self.configuration.write_text(
            f"[DEFAULT]\nhost = here\ninstances_path = {self.instances}\n"
            "[image_cache]\nmanager_interval = 0\n"
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(str(home / "notify"))
        self.channel.settimeout(60)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("OS_")},
            "HOME": str(home),
            "NOTIFY_SOCKET": str(home / "notify"),
            "OS_DEFAULT__TRANSPORT_URL": f"rabbit://guest:guest@127.0.0.1:{self.port}/",
            "OS_TOKEN": "a-token",
        }
        self.processes: list[subprocess.Popen[str]] = []

    def start(self) -> subprocess.Popen[str]:
        command = [
            *COMMAND,
            "--config-file",
            str(self.configuration),
            "agent",
            "--instances",
            str(self.report),
        ]
        process = subprocess.Popen(
            [*command, "--glance-endpoint", "http://127.0.0.1:1/"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )
        self.processes.append(process)
        return process


@pytest.fixture
def service(tmp_path: pathlib.Path) -> Iterator[Service]:
    found = Service(tmp_path)
    yield found
    for process in found.processes:
        process.kill()
        process.communicate()
    found.channel.close()


def test_without_a_message_bus_it_is_ready_runs_its_pass_and_ends_soon(service: Service) -> None:
    running = service.start()
    assert service.channel.recv(100) == b"READY=1"
    scanned = service.instances / "_base" / ".imagecache" / "hosts"
    while not any(scanned.iterdir()):
        assert running.poll() is None
        time.sleep(0.05)
    told = time.monotonic()
    running.send_signal(signal.SIGTERM)
    assert service.channel.recv(100) == b"STOPPING=1"
    said, _err = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert time.monotonic() - told < 2.0, said
    assert "does not answer yet" in said
    assert "Traceback" not in said


def test_what_cannot_be_written_ends_it_before_it_says_that_it_is_ready(service: Service) -> None:
    (service.instances / "_base").write_text("a file where a directory belongs")
    running = service.start()
    said, _err = running.communicate(timeout=60)
    assert running.returncode == 7, said
    assert str(service.instances / "_base") in said
    service.channel.setblocking(False)
    with pytest.raises(BlockingIOError):
        service.channel.recv(100)
