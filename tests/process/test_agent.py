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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence

import pytest

from imagecache_lib.cli import exposition
from tests.support.ports import free_port

COMMAND = (sys.executable, "-W", "ignore", "-m", "imagecache_lib.cli.main")


def ask(url: str) -> tuple[int, str]:
    """Return the status and the body that an agent answers with."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def until(running: subprocess.Popen[bytes], what: Callable[[], bool]) -> None:
    """Ask until it holds, as long as the agent runs."""
    while not what():
        assert running.poll() is None
        time.sleep(0.05)


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
        self.port = free_port()
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(str(home / "notify"))
        self.channel.settimeout(300)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("OS_")},
            "HOME": str(home),
            "NOTIFY_SOCKET": str(home / "notify"),
            "OS_DEFAULT__TRANSPORT_URL": f"rabbit://guest:guest@127.0.0.1:{self.port}/",
            "OS_TOKEN": "a-token",
        }
        self.said = home / "said"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str, program: Sequence[str] = COMMAND) -> subprocess.Popen[bytes]:
        command = [
            *program,
            "--config-file",
            str(self.configuration),
            "agent",
            "--instances",
            str(self.report),
        ]
        with self.said.open("wb") as said:
            process = subprocess.Popen(
                [*command, "--glance-endpoint", "http://127.0.0.1:1/", *words],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )
        self.processes.append(process)
        return process

    def ended(self, process: subprocess.Popen[bytes]) -> str:
        """Wait for the end of an agent, and return what it said."""
        process.wait(timeout=300)
        return self.said.read_text()


@pytest.fixture
def service(tmp_path: pathlib.Path) -> Iterator[Service]:
    found = Service(tmp_path)
    yield found
    for process in found.processes:
        process.kill()
        process.wait()
    found.channel.close()


def test_without_a_message_bus_it_is_ready_runs_its_pass_and_ends_soon(service: Service) -> None:
    running = service.start()
    assert service.channel.recv(100) == b"READY=1"
    scanned = service.instances / "_base" / ".imagecache" / "hosts"
    until(running, lambda: any(scanned.iterdir()))
    away = f"The message bus at 127.0.0.1:{service.port} is not reachable: Connection refused; trying on"
    until(running, lambda: away in service.said.read_text())
    told = time.monotonic()
    running.send_signal(signal.SIGTERM)
    assert service.channel.recv(100) == b"STOPPING=1"
    said = service.ended(running)
    assert running.returncode == 0, said
    assert time.monotonic() - told < 15.0, "it waited for a message bus that is not there, which takes 20 s"
    assert "does not answer yet" in said
    assert said.count(away) == 1
    assert "guest" not in said
    assert "Traceback" not in said


def test_a_thread_of_others_that_never_ends_does_not_keep_it_alive(service: Service) -> None:
    program = """
import sys, threading
from imagecache_lib.cli import agent, main
agent.Agent.longest_end = 2.0
threading.Thread(target=threading.Event().wait).start()
sys.exit(main.main(sys.argv[1:]))
"""
    service.environment["OS_DEFAULT__TRANSPORT_URL"] = "fake://"  # one that is there, and stops
    running = service.start(program=(sys.executable, "-W", "ignore", "-c", program))
    assert service.channel.recv(100) == b"READY=1"
    running.send_signal(signal.SIGTERM)
    said = service.ended(running)
    assert running.returncode == 0, said
    assert "Something hangs and is left behind" in said


def test_what_cannot_be_written_ends_it_before_it_says_that_it_is_ready(service: Service) -> None:
    (service.instances / "_base").write_text("a file where a directory belongs")
    running = service.start()
    said = service.ended(running)
    assert running.returncode == 7, said
    assert str(service.instances / "_base") in said
    service.channel.setblocking(False)
    with pytest.raises(BlockingIOError):
        service.channel.recv(100)


def test_it_shows_its_figures_and_its_health(service: Service, tmp_path: pathlib.Path) -> None:
    port, file = free_port(), tmp_path / "imagecache.prom"
    running = service.start("--metrics", f"127.0.0.1:{port}", "--textfile", str(file))
    assert service.channel.recv(100) == b"READY=1"
    at = f"http://127.0.0.1:{port}"
    until(running, lambda: json.loads(ask(f"{at}/healthz")[1])["last_pass"] is not None)
    status, told = ask(f"{at}/healthz")
    facts = json.loads(told)
    assert (status, facts["status"], facts["message_bus"]) == (200, "ok", "not reached yet")
    until(running, lambda: 'imagecache_bytes{state="trash"} 0.0' in ask(f"{at}/metrics")[1])
    shown = ask(f"{at}/metrics")[1]
    for line in (
        'imagecache_build_info{version="',
        'imagecache_fetch_errors_total{reason="source"} 0.0',
        'imagecache_evicted_total{reason="age"} 0.0',
        "imagecache_damaged_bases 0.0",
        "imagecache_agent_listening 0.0",
        "imagecache_last_pass_timestamp_seconds 1",
    ):
        assert line in shown, line
    free = next(line for line in shown.splitlines() if line.startswith("imagecache_filesystem_free_bytes "))
    assert float(free.split()[1]) > 0
    assert "_created" not in shown
    assert ask(f"{at}/other")[0] == 404
    running.send_signal(signal.SIGTERM)
    said = service.ended(running)
    assert running.returncode == 0, said
    assert "imagecache_last_pass_timestamp_seconds 1" in file.read_text()


def test_a_failed_or_overdue_pass_is_ill_health_until_the_next_one() -> None:
    health = exposition.Health(2400)
    assert health.report()[0]
    health.failed("the cache is away")
    assert (health.report()[0], health.report()[1]["pass_error"]) == (False, "the cache is away")
    health.passed(2)
    assert (health.report()[0], health.report()[1]["problems"]) == (True, 2)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--metrics", "here"), 2, "HOST:PORT"),
        (("--metrics", "127.0.0.1:99999"), 2, "HOST:PORT"),
        (("--metrics", "192.0.2.1:9471"), 7, "192.0.2.1:9471 cannot be listened on"),
        (("--textfile", "/nonexistent/imagecache.prom"), 7, "/nonexistent/imagecache.prom"),
    ],
)
def test_figures_that_cannot_be_shown_end_it_at_once(
    service: Service, words: tuple[str, ...], code: int, told: str
) -> None:
    running = service.start(*words)
    said = service.ended(running)
    assert (running.returncode, told in said) == (code, True), said
