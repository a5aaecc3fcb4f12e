# SPDX-License-Identifier: Apache-2.0
"""A fleet on one machine: real agents, a real RabbitMQ, a real Glance, and what happens when they go away."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import oslo_messaging
import pytest
from kombu.connection import Connection
from oslo_config import cfg

from imagecache_lib.precache import client, rpc
from imagecache_lib.precache.reader import EmbeddedJobs
from imagecache_lib.store import layout
from tests.lab import glance as glance_lab
from tests.lab import rabbit as rabbit_lab
from tests.lab import relay as relay_lab
from tests.lab import server
from tests.support import needs
from tests.support.ports import free_port

COMMAND = (sys.executable, "-W", "ignore", "-m", "imagecache_lib.cli.main")
MIB = 2**20


@pytest.fixture(scope="module")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rabbit_lab.Rabbit]:
    """A running RabbitMQ. Tests share it: their agents have names of their own."""
    with rabbit_lab.running_rabbit(tmp_path_factory.mktemp("rabbit")) as running:
        yield running


@dataclasses.dataclass
class Fleet:
    """Agents and conductors of one test.

    :param home: for all they write.
    """

    home: pathlib.Path
    rabbit: rabbit_lab.Rabbit
    glance_url: str
    topic: str
    stack: contextlib.ExitStack
    agents: dict[str, contextlib.ExitStack] = dataclasses.field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
        return {
            **kept,
            "HOME": str(self.home),
            "OS_DEFAULT__TRANSPORT_URL": self.rabbit.url,
            "OS_TOKEN": glance_lab.ADMIN,
            "IMAGECACHE_JOBS": str(self.home / "jobs.sqlite"),
        }

    def instances(self, name: str) -> pathlib.Path:
        return self.home / name / "instances"

    def start_agent(self, name: str, *words: str, interval: int = -1, directory: str | None = None) -> int:
        """Start a host's agent, and return its pid when it is ready.

        :param directory: name of the directory for all it keeps, if that is not the host's name.
        """
        directory = directory or name
        self.instances(directory).mkdir(parents=True, exist_ok=True)
        configuration = self.home / directory / "imagecache.conf"
        configuration.write_text(
            f"[DEFAULT]\nhost = {name}\ninstances_path = {self.instances(directory)}\n"
            f"[image_cache]\nmanager_interval = {interval}\n[glance]\nnum_retries = 1\n"
            "[oslo_messaging_rabbit]\nrabbit_retry_interval = 1\nkombu_reconnect_delay = 0.5\n"
        )
        log = self.home / directory / "agent.log"
        log.write_bytes(b"")
        running = self.agents[directory] = contextlib.ExitStack()
        self.stack.callback(running.close)
        command = [
            *COMMAND,
            "--config-file",
            str(configuration),
            "agent",
            "--topic",
            self.topic,
            "--glance-endpoint",
            self.glance_url,
            *words,
        ]
        return running.enter_context(
            server.running(
                command, ready=lambda: b"is ready" in log.read_bytes(), log=log, environment=self.environment
            )
        )

    def stop_agent(self, name: str) -> None:
        self.agents.pop(name).close()

    def conductor(self, *words: str) -> subprocess.Popen[str]:
        """Begin a command."""
        with (self.home / "conductor.log").open("ab") as log:
            process = subprocess.Popen(
                [*COMMAND, "precache", *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
            )
        self.stack.enter_context(process)  # waits, and closes the pipe
        self.stack.callback(process.kill)
        return process

    def finish(self, process: subprocess.Popen[str], *, code: int = 0) -> dict[tuple[str, str], Any]:
        """Return the rows of a command's table, by host and image."""
        out, _err = process.communicate(timeout=180)
        assert process.returncode == code, (out, (self.home / "conductor.log").read_text())
        return {(row["host"], row.get("image", "")): row for row in json.loads(out)}

    def start(self, names: list[str], images: list[str], *words: str) -> subprocess.Popen[str]:
        hosts = [word for name in names for word in ("--host", name)]
        return self.conductor(
            "start", *images, *hosts, "--topic", self.topic, "--concurrency", "8", "-f", "json", *words
        )

    def job_id(self) -> str:
        listed = subprocess.run(
            [*COMMAND, "precache", "list", "-f", "json"],
            check=True,
            capture_output=True,
            text=True,
            env=self.environment,
        )
        return str(json.loads(listed.stdout)[-1]["id"])

    def attempt(self) -> int:
        """Return how often the last job was resumed."""
        return EmbeddedJobs(str(self.home / "jobs.sqlite")).get(self.job_id()).attempt

    def resume(self) -> subprocess.Popen[str]:
        return self.conductor("resume", self.job_id(), "--topic", self.topic, "-f", "json")

    def has(self, name: str, image_id: str) -> bool:
        return (self.instances(name) / "_base" / layout.base_name(image_id)).exists()

    def wait_for(self, what: Callable[[], bool]) -> None:
        server.wait_until(what, "the fleet", seconds=120)


@pytest.fixture
def fleet_of(rabbit: rabbit_lab.Rabbit) -> Iterator[Callable[[str], Fleet]]:
    """Make a fleet that fetches from a URL."""
    with (
        tempfile.TemporaryDirectory(prefix="imagecache-fleet-") as home,
        contextlib.ExitStack() as processes,
    ):
        yield lambda url: Fleet(pathlib.Path(home), rabbit, url, f"topic-{os.path.basename(home)}", processes)


@pytest.fixture
def fleet(fleet_of: Callable[[str], Fleet], glance: glance_lab.Glance) -> Fleet:
    return fleet_of(glance.url)


def make_images(glance: glance_lab.Glance, *sizes: int) -> list[str]:
    return [glance.upload(os.urandom(size)) for size in sizes]


def test_every_host_gets_every_image(fleet: Fleet, glance: glance_lab.Glance) -> None:
    images = make_images(glance, 3 * MIB, 5 * MIB)
    names = ["alpha", "beta", "gamma"]
    for name in names:
        fleet.start_agent(name)
    hosts = [word for name in names for word in ("--host", name)]
    plan = fleet.finish(fleet.conductor("plan", *images, *hosts, "--topic", fleet.topic, "-f", "json"))
    assert [row["to_fetch"] for row in plan.values()] == [8 * MIB] * 3
    ended = fleet.finish(fleet.start(names, images, "--pin-until", "1h"))
    assert {row["result"] for row in ended.values()} == {"cached"}
    assert all(fleet.has(name, image) for name in names for image in images)
    assert [len(glance.downloads(image)) for image in images] == [3, 3]
    again = fleet.finish(fleet.start(names, [*images, "no-such-image"]), code=10)
    assert [row["result"] for row in again.values()] == ["existing", "existing", "error"] * 3
    assert all("no-such-image" in again[name, "no-such-image"]["reason"] for name in names)


def test_a_host_that_was_down_is_served_when_it_is_back(fleet: Fleet, glance: glance_lab.Glance) -> None:
    (image,) = make_images(glance, 2 * MIB)
    fleet.start_agent("alpha")
    running = fleet.start(["alpha", "beta"], [image], "--deadline", "120s")
    fleet.wait_for(lambda: fleet.has("alpha", image))
    fleet.start_agent("beta")
    ended = fleet.finish(running)
    assert {row["result"] for row in ended.values()} == {"cached"}


def test_a_host_that_is_lost_is_skipped_and_the_others_are_served(
    fleet: Fleet, glance: glance_lab.Glance
) -> None:
    images = make_images(glance, 8 * MIB)
    fleet.start_agent("alpha")
    pid = fleet.start_agent("beta")
    running = fleet.start(["alpha", "beta"], images, "--rate", "1M", "--deadline", "25s")
    stage = fleet.instances("beta") / "_base" / ".imagecache" / "stage"
    fleet.wait_for(lambda: stage.is_dir() and any(stage.iterdir()))
    os.kill(pid, signal.SIGKILL)
    ended = fleet.finish(running, code=10)
    assert ended["alpha", images[0]]["result"] == "cached"
    assert ended["beta", images[0]]["result"] == "skipped"
    assert "down" in ended["beta", images[0]]["reason"]


def test_a_conductor_that_is_killed_repeats_no_download(fleet: Fleet, glance: glance_lab.Glance) -> None:
    images = make_images(glance, MIB, 6 * MIB)
    for name in ("alpha", "beta"):
        fleet.start_agent(name)
    running = fleet.start(["alpha", "beta"], images, "--rate", "1M")
    fleet.wait_for(lambda: fleet.has("alpha", images[0]) and fleet.has("beta", images[0]))
    running.kill()
    running.wait()
    ended = fleet.finish(fleet.resume())
    assert {row["result"] for row in ended.values()} == {"cached"}
    assert [len(glance.downloads(image)) for image in images] == [2, 2]


def test_the_message_bus_restarts_meanwhile(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit
) -> None:
    images = make_images(glance, MIB, 6 * MIB)
    for name in ("alpha", "beta"):
        fleet.start_agent(name)
    running = fleet.start(["alpha", "beta"], images, "--rate", "1M")
    fleet.wait_for(lambda: fleet.has("alpha", images[0]) and fleet.has("beta", images[0]))
    rabbit.stop()
    fleet.wait_for(lambda: fleet.has("alpha", images[1]) and fleet.has("beta", images[1]))
    rabbit.start()
    ended = fleet.finish(running)
    assert {row["result"] for row in ended.values()} == {"cached"}
    assert [len(glance.downloads(image)) for image in images] == [2, 2]


@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_a_broker_without_memory_or_disk_holds_up_the_news_and_no_download(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit, lacking: str
) -> None:
    images = make_images(glance, MIB, 4 * MIB)
    fleet.start_agent("alpha")
    running = fleet.start(["alpha"], images, "--rate", "1M")
    fleet.wait_for(lambda: fleet.has("alpha", images[0]))
    with rabbit.alarm(lacking):
        fleet.wait_for(lambda: fleet.has("alpha", images[1]))
    ended = fleet.finish(running)
    assert {row["result"] for row in ended.values()} == {"cached"}
    assert [len(glance.downloads(image)) for image in images] == [1, 1]


def test_the_virtual_host_is_deleted_and_made_again(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit
) -> None:
    images = make_images(glance, MIB, 4 * MIB)
    fleet.start_agent("alpha")
    running = fleet.start(["alpha"], images, "--rate", "1M")
    fleet.wait_for(lambda: fleet.has("alpha", images[0]))
    rabbit.remake_vhost(lambda: fleet.wait_for(lambda: fleet.has("alpha", images[1])))
    ended = fleet.finish(running)
    assert {row["result"] for row in ended.values()} == {"cached"}
    assert [len(glance.downloads(image)) for image in images] == [1, 1]


def test_an_agent_killed_while_it_fetches_repeats_nothing_finished_when_it_is_back(
    fleet: Fleet, glance: glance_lab.Glance
) -> None:
    images = make_images(glance, MIB, 4 * MIB)
    pid = fleet.start_agent("alpha")
    running = fleet.start(["alpha"], images, "--rate", "512K")
    stage = fleet.instances("alpha") / "_base" / ".imagecache" / "stage"
    fleet.wait_for(lambda: fleet.has("alpha", images[0]) and any(stage.iterdir()))
    os.kill(pid, signal.SIGKILL)
    fleet.stop_agent("alpha")
    fleet.start_agent("alpha")
    ended = fleet.finish(running)
    assert {row["result"] for row in ended.values()} <= {"cached", "existing"}
    assert len(glance.downloads(images[0])) == 1
    assert len(glance.downloads(images[1])) <= 2


def test_messages_that_nobody_meant_for_an_agent_cost_the_next_job_nothing(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit
) -> None:
    (image,) = make_images(glance, MIB)
    pid = fleet.start_agent("alpha")
    envelope = json.dumps(
        {"oslo.version": "2.0", "oslo.message": json.dumps({"method": "begin", "args": {}})}
    )
    bodies = [b"", b"\xff\x00", b"null", b"[]", b"{}", envelope.encode()[:-9], envelope.encode()]
    bodies += [
        json.dumps({"oslo.version": "2.0", "oslo.message": inner}).encode() for inner in ("{", 5, None)
    ]
    url = rabbit.url.replace("rabbit://", "amqp://") + "/"
    with Connection(url) as connection:  # type: ignore[no-untyped-call]
        producer = connection.Producer()
        for body in bodies:
            for kind in ("application/json", "application/x-python-serialize", "application/octet-stream"):
                producer.publish(
                    body, routing_key=f"{fleet.topic}.alpha", content_type=kind, content_encoding="binary"
                )
    ended = fleet.finish(fleet.start(["alpha"], [image], "--deadline", "60s"))
    assert ended["alpha", image]["result"] == "cached"
    assert os.path.exists(f"/proc/{pid}")


def test_a_job_that_was_cancelled_while_its_host_was_down_fetches_nothing_later(
    fleet: Fleet, glance: glance_lab.Glance
) -> None:
    (image,) = make_images(glance, 90 * MIB)
    os.kill(fleet.start_agent("alpha"), signal.SIGKILL)  # its queue stays, and takes calls
    fleet.stop_agent("alpha")
    running = fleet.start(["alpha"], [image], "--rate", "256K")
    fleet.wait_for(lambda: "alpha" in (fleet.home / "conductor.log").read_text())
    fleet.finish(fleet.conductor("cancel", fleet.job_id(), "--topic", fleet.topic, "-f", "json"), code=10)
    assert fleet.finish(running, code=10)["alpha", image]["result"] == "skipped"
    fleet.start_agent("alpha")
    (other,) = make_images(glance, MIB)
    ended = fleet.finish(fleet.start(["alpha"], [other]))  # which waits for its turn, if there is another
    assert ended["alpha", other]["result"] == "cached"
    assert not fleet.has("alpha", image)
    stage = fleet.instances("alpha") / "_base" / ".imagecache" / "stage"
    assert not any(stage.iterdir())


def test_the_image_service_is_lost_and_back(
    fleet_of: Callable[[str], Fleet],
    glance: glance_lab.Glance,
    relay_to: Callable[[str], relay_lab.Relay],
) -> None:
    (image,) = make_images(glance, 4 * MIB)
    relay = relay_to(glance.url)
    fleet = fleet_of(relay.url)
    fleet.start_agent("alpha")
    relay.cut_after(*[1] * 16)
    ended = fleet.finish(fleet.start(["alpha"], [image]))
    assert ended["alpha", image]["result"] == "cached"
    assert relay.resets == 16
    assert "to be tried again" in (fleet.home / "alpha" / "agent.log").read_text()


def test_an_agent_stops_gracefully_and_evicts_what_its_instances_do_not_need(
    fleet: Fleet, glance: glance_lab.Glance
) -> None:
    (image,) = make_images(glance, MIB)
    instances = fleet.home / "instances.json"
    instances.write_text("[]")
    pid = fleet.start_agent("alpha", "--instances", str(instances), interval=1)
    fleet.finish(fleet.start(["alpha"], [image]))
    base = fleet.instances("alpha") / "_base" / layout.base_name(image)
    os.utime(base, (1, 1))
    os.utime(base.parent / ".imagecache" / "records" / f"{base.name}.json", (1, 1))
    fleet.wait_for(lambda: not base.exists())
    os.kill(pid, signal.SIGTERM)
    fleet.wait_for(lambda: not os.path.exists(f"/proc/{pid}/fd") or not os.listdir(f"/proc/{pid}/fd"))
    assert "Traceback" not in (fleet.home / "alpha" / "agent.log").read_text()


def test_an_agent_that_speaks_another_version_is_told_apart_from_one_that_is_down(
    fleet: Fleet, rabbit: rabbit_lab.Rabbit
) -> None:
    fleet.start_agent("alpha")
    cfg.CONF([], project="imagecache-test", default_config_files=[])
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=rabbit.url)
    try:
        ours = rpc.RpcHostClient(transport, topic=fleet.topic)
        with pytest.raises(client.UnknownTask):
            ours.poll("alpha", "a-job")
        with pytest.raises(client.HostUnsupported):
            rpc.RpcHostClient(transport, topic=fleet.topic, version="2.0").poll("alpha", "a-job")
        with pytest.raises(client.HostDown):
            rpc.RpcHostClient(transport, topic="another", timeout=1).poll("alpha", "a-job")
    finally:
        transport.cleanup()


class FirstRelease:
    """An agent's endpoint as the first release had it: it has everything at once."""

    target = oslo_messaging.Target(version="1.0")

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def begin(self, _context: Any, task: Any) -> Any:
        unknown = {"deadline_in", "pin_for"} & task.keys()
        return (
            {"error": {"kind": "BackendError", "cause": f"unknown: {unknown}"}}
            if unknown
            else {"result": None}
        )

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def poll(self, _context: Any, job_id: Any) -> Any:
        return {"result": {"an-image": {"result": "cached", "reason": "", "received": 5, "total": 5}}}


def test_an_agent_of_the_first_release_is_served(fleet: Fleet, rabbit: rabbit_lab.Rabbit) -> None:
    cfg.CONF([], project="imagecache-test", default_config_files=[])
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=rabbit.url)
    listening = oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(topic=fleet.topic, server="old"),
        [FirstRelease()],
        access_policy=oslo_messaging.ExplicitRPCAccessPolicy,
    )
    listening.start()
    try:
        ended = fleet.finish(fleet.start(["old"], ["an-image"], "--deadline", "60s", "--pin-until", "1h"))
    finally:
        listening.stop()
        listening.wait()
        transport.cleanup()
    assert ended["old", "an-image"]["result"] == "cached"


def test_two_agents_under_one_name_are_named_as_the_cause(fleet: Fleet, glance: glance_lab.Glance) -> None:
    images = make_images(glance, 6 * MIB)
    fleet.start_agent("alpha")
    fleet.start_agent("alpha", directory="twin")
    ended = fleet.finish(fleet.start(["alpha"], images, "--rate", "1M"), code=10)
    assert ended["alpha", images[0]]["result"] == "error"
    assert "two agents answer" in ended["alpha", images[0]]["reason"]


def test_a_plan_ends_although_the_broker_takes_no_messages(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit
) -> None:
    images = make_images(glance, MIB)
    fleet.start_agent("alpha")
    with rabbit.alarm():
        began = time.monotonic()
        plan = fleet.finish(
            fleet.conductor("plan", *images, "--host", "alpha", "--topic", fleet.topic, "-f", "json"), code=10
        )
        assert time.monotonic() - began < 60
    assert plan["alpha", ""]["problem"]
    ended = fleet.finish(fleet.start(["alpha"], images))
    assert ended["alpha", images[0]]["result"] == "cached"


def test_a_job_is_cancelled_after_its_conductor_was_killed(fleet: Fleet, glance: glance_lab.Glance) -> None:
    images = make_images(glance, MIB, 90 * MIB)
    fleet.start_agent("alpha")
    running = fleet.start(["alpha"], images, "--rate", "1M")
    fleet.wait_for(lambda: fleet.has("alpha", images[0]))
    running.kill()
    running.wait()
    began = time.monotonic()
    ended = fleet.finish(
        fleet.conductor("cancel", fleet.job_id(), "--topic", fleet.topic, "-f", "json"), code=10
    )
    assert time.monotonic() - began < 25, "the conductor is seen to be dead on its own machine"
    assert [row["result"] for row in ended.values()] == ["cached", "skipped"]
    stage = fleet.instances("alpha") / "_base" / ".imagecache" / "stage"
    fleet.wait_for(lambda: not any(stage.iterdir()))


def test_left_resumed_and_cancelled_it_stops(fleet: Fleet, glance: glance_lab.Glance) -> None:
    images = make_images(glance, 90 * MIB)
    fleet.start_agent("alpha")
    stage = fleet.instances("alpha") / "_base" / ".imagecache" / "stage"
    # So slow that it cannot end before it is cancelled, however busy the machine is.
    left = fleet.start(["alpha"], images, "--rate", "256K")
    fleet.wait_for(lambda: stage.is_dir() and any(stage.iterdir()))
    left.send_signal(signal.SIGINT)
    fleet.finish(left, code=10)
    resumed = fleet.resume()
    fleet.wait_for(lambda: fleet.attempt() == 1)
    fleet.finish(fleet.conductor("cancel", fleet.job_id(), "--topic", fleet.topic, "-f", "json"), code=10)
    ended = fleet.finish(resumed, code=10)
    assert ended["alpha", images[0]]["result"] == "skipped"
    fleet.wait_for(lambda: not any(stage.iterdir()))
    assert not fleet.has("alpha", images[0])


def mailboxes(rabbit: rabbit_lab.Rabbit, topic: str) -> dict[str, str]:
    """Return the queues of conductors with their arguments."""
    listed = rabbit.control("-q", "list_queues", "name", "arguments").splitlines()
    rows = [line.split("\t", 1) for line in listed if line.startswith(f"{topic}-conductor-")]
    return {row[0]: row[-1] for row in rows}


def test_agents_report_to_a_queue_that_expires_with_its_conductor(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit
) -> None:
    images = make_images(glance, MIB, 6 * MIB)
    fleet.start_agent("alpha")
    running = fleet.start(["alpha"], images, "--rate", "1M")
    fleet.wait_for(lambda: fleet.has("alpha", images[0]))
    running.kill()
    running.wait()
    fleet.wait_for(lambda: len(mailboxes(rabbit, fleet.topic)) == 1)  # those without an expiry vanish
    assert all("x-expires" in arguments for arguments in mailboxes(rabbit, fleet.topic).values())
    ended = fleet.finish(fleet.resume())
    assert {row["result"] for row in ended.values()} == {"cached"}


def test_two_that_resume_one_job_fetch_once(fleet: Fleet, glance: glance_lab.Glance) -> None:
    images = make_images(glance, MIB, 6 * MIB)
    fleet.start_agent("alpha")
    running = fleet.start(["alpha"], images, "--rate", "1M")
    fleet.wait_for(lambda: fleet.has("alpha", images[0]))
    running.kill()
    running.wait()
    both = [fleet.resume(), fleet.resume()]
    for each in both:
        assert {row["result"] for row in fleet.finish(each).values()} == {"cached"}
    assert [len(glance.downloads(image)) for image in images] == [1, 1]


def test_an_image_that_is_gone_comes_from_a_peer(fleet: Fleet, glance: glance_lab.Glance) -> None:
    (image,) = make_images(glance, 3 * MIB)
    secret, key, certificate = (str(fleet.home / name) for name in ("secret", "key.pem", "cert.pem"))
    pathlib.Path(secret).write_text("a-secret-of-the-peers\n")
    subprocess.run(
        [
            needs.program("openssl"),
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    port = free_port()
    fleet.start_agent(
        "beta",
        "--serve-peers",
        f"127.0.0.1:{port}",
        "--peer-token-file",
        secret,
        "--peer-cert",
        certificate,
        "--peer-key",
        key,
    )
    fleet.finish(fleet.start(["beta"], [image]))
    glance.delete(image)
    fleet.start_agent(
        "alpha",
        "--peer",
        f"https://127.0.0.1:{port}",
        "--trust-peers",
        "--peer-token-file",
        secret,
        "--peer-cafile",
        certificate,
    )
    fleet.start_agent("gamma")
    ended = fleet.finish(fleet.start(["alpha", "gamma"], [image]), code=10)
    assert [row["result"] for row in ended.values()] == ["cached", "error"]
    assert fleet.has("alpha", image)


def test_hosts_that_relay_fetch_an_image_once_and_others_by_themselves(
    fleet: Fleet, glance: glance_lab.Glance, tmp_path: pathlib.Path
) -> None:
    images = make_images(glance, 8 * MIB, 6 * MIB)
    token = tmp_path / "token"
    token.write_text("a-secret-of-the-hosts\n")
    # A loopback address is a host's name and its address at once.
    relaying = [f"127.0.0.{number}" for number in (21, 22, 23)]
    with socket.create_server(("127.0.0.20", 0)) as listener:
        port = listener.getsockname()[1]
    words = ["--peer-token-file", str(token), "--relay", f"http://{{host}}:{port}"]
    for name in relaying:
        fleet.start_agent(name, *words, "--serve-peers", f"{name}:{port}")
    fleet.start_agent("alpha")
    names = [*relaying, "alpha"]
    ended = fleet.finish(fleet.start(names, images, "--relay", "--heads", "1"))
    assert {row["result"] for row in ended.values()} == {"cached"}
    assert [len(glance.downloads(image)) for image in images] == [2, 2]
    stages = [os.listdir(fleet.instances(name) / "_base" / ".imagecache" / "stage") for name in names]
    assert stages == [[]] * 4
