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
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import oslo_messaging
import pytest
from kombu.connection import Connection
from oslo_config import cfg

from imagecache_lib.precache import client, rpc
from imagecache_lib.store import layout
from tests.lab import glance as glance_lab
from tests.lab import rabbit as rabbit_lab
from tests.lab import relay as relay_lab
from tests.lab.fleet import Fleet
from tests.support import needs
from tests.support.ports import free_port

#: Hosts whose agents all tests share.
SHARED = ("alpha", "beta", "gamma")

#: Connections that break before an answer. The agent's first try fails of eight, its second stands two.
CUTS = 10

KIB = 2**10
MIB = 2**20


@pytest.fixture(scope="module")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rabbit_lab.Rabbit]:
    """A running RabbitMQ. Tests share it: hosts that are not shared have names of their own."""
    with rabbit_lab.running_rabbit(tmp_path_factory.mktemp("rabbit")) as running:
        yield running


@pytest.fixture(scope="module")
def link(glance: glance_lab.Glance) -> Iterator[relay_lab.Relay]:
    """The link between agents and Glance. Answers can be held on it: what is fetched stays half done."""
    with relay_lab.running_relay(glance.url) as running:
        yield running


@pytest.fixture(scope="module")
def shared(rabbit: rabbit_lab.Rabbit, link: relay_lab.Relay) -> Iterator[Fleet]:
    """The agents of three hosts that no test ends or breaks: alpha, beta and gamma."""
    with tempfile.TemporaryDirectory(prefix="imagecache-fleet-") as name:
        home = pathlib.Path(name)
        fleet = Fleet(home, home, rabbit, link.url, f"topic-{home.name}", contextlib.ExitStack())
        try:
            fleet.start_agents(*SHARED)
            yield fleet
        finally:
            fleet.close()


@pytest.fixture
def fleet(shared: Fleet, tmp_path: pathlib.Path) -> Iterator[Fleet]:
    """The shared agents, and what a test starts beside them, under names of its own."""
    fleet = dataclasses.replace(shared, home=tmp_path, stack=contextlib.ExitStack(), agents={})
    try:
        yield fleet
    finally:
        fleet.close()


def make_images(glance: glance_lab.Glance, *sizes: int) -> list[str]:
    return [glance.upload(os.urandom(size)) for size in sizes]


@contextlib.contextmanager
def half_done(
    fleet: Fleet, link: relay_lab.Relay, names: list[str], images: list[str]
) -> Iterator[tuple[subprocess.Popen[str], relay_lab.Hold]]:
    """Yield the conductor of a job whose hosts have one image, of 1 MiB, and half of another, of 4 MiB.

    They get the rest once that is let go.
    """
    with link.held_after(3 * MIB) as hold:
        running = fleet.start(names, images)
        fleet.wait_for(lambda: hold.count == len(names))
        fleet.wait_for(lambda: all(fleet.has(name, images[0]) for name in names))
        yield running, hold


def test_every_host_gets_every_image(fleet: Fleet, glance: glance_lab.Glance) -> None:
    images = make_images(glance, 3 * MIB, 5 * MIB)
    names = list(SHARED)
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
    running = fleet.impatient("start", "600", image, "alpha", "late")
    fleet.wait_for(lambda: fleet.has("alpha", image) and "Host late does not answer" in fleet.said())
    fleet.start_agent("late")
    ended = fleet.finish(running)
    assert {row["result"] for row in ended.values()} == {"cached"}


def test_a_host_that_is_lost_is_skipped_and_the_others_are_served(
    fleet: Fleet, glance: glance_lab.Glance, link: relay_lab.Relay
) -> None:
    (image,) = make_images(glance, 2 * MIB)
    fleet.start_agent("lost")
    with link.held_after(MIB) as hold:
        running = fleet.impatient("start", "12", image, "alpha", "lost")
        fleet.wait_for(lambda: hold.count == 2)
        fleet.kill_agent("lost")
    ended = fleet.finish(running, code=10)
    assert ended["alpha", image]["result"] == "cached"
    assert ended["lost", image]["result"] == "skipped"
    assert "down" in ended["lost", image]["reason"]


def test_a_conductor_that_is_killed_repeats_no_download(
    fleet: Fleet, glance: glance_lab.Glance, link: relay_lab.Relay
) -> None:
    images = make_images(glance, MIB, 4 * MIB)
    with half_done(fleet, link, ["alpha", "beta"], images) as (running, _hold):
        running.kill()
        running.wait()
        resumed = fleet.resume()
        fleet.wait_for(lambda: fleet.attempt() == 1)
    ended = fleet.finish(resumed)
    assert {row["result"] for row in ended.values()} == {"cached"}
    assert [len(glance.downloads(image)) for image in images] == [2, 2]


def test_the_message_bus_restarts_meanwhile(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit, link: relay_lab.Relay
) -> None:
    *images, slow = make_images(glance, MIB, 4 * MIB, 30 * MIB)
    # So slow that it cannot end before it is cancelled, or be held beside the others.
    left = fleet.start(["gamma"], [slow], "--rate", "8K")
    fleet.wait_for(lambda: fleet.in_flight("gamma") != [])
    left.kill()
    left.wait()
    to_cancel = fleet.job_id()
    with half_done(fleet, link, ["alpha", "beta"], images) as (running, hold):
        rabbit.stop()
        cancelling = fleet.impatient("cancel", to_cancel)
        fleet.wait_for(lambda: "The message bus does not work" in fleet.said())
        beginning = fleet.impatient("start", "600", images[0], "gamma")
        hold.let_go()
        fleet.wait_for(lambda: fleet.has("alpha", images[1]) and fleet.has("beta", images[1]))
        fleet.wait_for(lambda: "Host gamma does not answer" in fleet.said())
        rabbit.start()
        cancelled = fleet.finish(cancelling, code=10)
        # In the host's own words, or in the conductor's: whichever is known first.
        assert cancelled["gamma", slow]["reason"].endswith("was cancelled")
        fleet.wait_for(lambda: not fleet.has("gamma", slow) and fleet.has("gamma", images[0]))
        rows = [row for each in (running, beginning) for row in fleet.finish(each).values()]
    assert [row["result"] for row in rows] == ["cached"] * 5
    assert [len(glance.downloads(image)) for image in images] == [3, 2]


def test_an_agent_that_the_message_bus_alone_does_not_reach_goes_on_fetching(
    fleet: Fleet,
    glance: glance_lab.Glance,
    rabbit: rabbit_lab.Rabbit,
    link: relay_lab.Relay,
    relay_to: Callable[[str], relay_lab.Relay],
) -> None:
    (image,) = make_images(glance, 2 * MIB)
    bus = relay_to(f"http://127.0.0.1:{rabbit.port}")
    for name in ("island", "sunk"):
        fleet.launch_agent(name, bus=bus.port)
    fleet.wait_until_ready("island", "sunk")
    with link.held_after(MIB) as hold:
        running = fleet.impatient("start", "600", image, "island", "sunk")
        fleet.wait_for(lambda: hold.count == 2)
        bus.sever()
        fleet.wait_for(lambda: "Host island does not answer" in fleet.said())
        hold.let_go()
        fleet.wait_for(lambda: fleet.has("island", image) and fleet.has("sunk", image))
        fleet.kill_agent("sunk")  # before it could tell
        fleet.launch_agent("sunk", bus=bus.port)
        bus.mend()
    ended = fleet.finish(running)
    assert ended["island", image]["result"] == "cached"
    assert ended["sunk", image]["result"] in ("cached", "existing")
    assert len(glance.downloads(image)) == 2


@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_a_broker_without_memory_or_disk_holds_up_the_news_and_no_download(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit, link: relay_lab.Relay, lacking: str
) -> None:
    images = make_images(glance, MIB, 4 * MIB)
    with half_done(fleet, link, ["alpha"], images) as (running, hold):
        with rabbit.alarm(lacking):
            hold.let_go()
            fleet.wait_for(lambda: fleet.has("alpha", images[1]))
        ended = fleet.finish(running)
    assert {row["result"] for row in ended.values()} == {"cached"}
    assert [len(glance.downloads(image)) for image in images] == [1, 1]


def test_the_virtual_host_is_deleted_and_made_again(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit, link: relay_lab.Relay
) -> None:
    images = make_images(glance, MIB, 4 * MIB)
    with half_done(fleet, link, ["alpha"], images) as (running, hold):

        def fetch_the_rest() -> None:
            hold.let_go()
            fleet.wait_for(lambda: fleet.has("alpha", images[1]))

        rabbit.remake_vhost(fetch_the_rest)
        ended = fleet.finish(running)
    assert {row["result"] for row in ended.values()} == {"cached"}
    assert [len(glance.downloads(image)) for image in images] == [1, 1]


def test_an_agent_killed_while_it_fetches_goes_on_with_the_missing_bytes_alone_when_it_is_back(
    fleet: Fleet, glance: glance_lab.Glance, link: relay_lab.Relay
) -> None:
    images = make_images(glance, MIB, 4 * MIB)
    fleet.start_agent("killed")
    with half_done(fleet, link, ["killed"], images) as (running, _hold):
        fleet.wait_for(lambda: fleet.written("killed") >= MIB)
        fleet.kill_agent("killed")
        fleet.start_agent("killed")
    ended = fleet.finish(running)
    assert {row["result"] for row in ended.values()} <= {"cached", "existing"}
    assert len(glance.downloads(images[0])) == 1
    whole, rest = glance.downloads(images[1])
    assert whole.range is None
    assert int(str(rest.range).removeprefix("bytes=").rstrip("-")) >= MIB


def test_messages_that_nobody_meant_for_an_agent_cost_the_next_job_nothing(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit
) -> None:
    (image,) = make_images(glance, MIB)
    envelope = json.dumps(
        {"oslo.version": "2.0", "oslo.message": json.dumps({"method": "begin", "args": {}})}
    )
    bodies = [b"", b"\xff\x00", b"null", b"[]", b"{}", envelope.encode()[:-9], envelope.encode()]
    bodies += [
        json.dumps({"oslo.version": "2.0", "oslo.message": inner}).encode() for inner in ("{", 5, None)
    ]
    much = json.dumps({"oslo.version": "2.0", "oslo.message": "[" * 48 * MIB}).encode()
    url = rabbit.url.replace("rabbit://", "amqp://") + "/"
    with Connection(url) as connection:  # type: ignore[no-untyped-call]
        producer = connection.Producer()

        def publish(body: bytes, kind: str) -> None:
            where = f"{fleet.topic}.alpha"
            producer.publish(body, routing_key=where, content_type=kind, content_encoding="binary")

        for body in bodies:
            for kind in ("application/json", "application/x-python-serialize", "application/octet-stream"):
                publish(body, kind)
        for body in (much, bytes(64 * MIB)):
            publish(body, "application/json")
    ended = fleet.finish(fleet.start(["alpha"], [image], "--deadline", "60s"))
    assert ended["alpha", image]["result"] == "cached"


def test_a_job_that_was_cancelled_while_its_host_was_down_fetches_nothing_later(
    fleet: Fleet, glance: glance_lab.Glance
) -> None:
    image, other = make_images(glance, 4 * MIB, MIB)
    fleet.start_agent("asleep")
    fleet.kill_agent("asleep")  # its queue stays, and takes calls
    running = fleet.impatient("start", "600", image, "asleep")
    fleet.wait_for(lambda: "Host asleep does not answer" in fleet.said())
    fleet.finish(fleet.impatient("cancel", fleet.job_id()), code=10)
    assert fleet.finish(running, code=10)["asleep", image]["result"] == "skipped"
    fleet.start_agent("asleep")
    ended = fleet.finish(fleet.start(["asleep"], [other]))  # which waits for its turn, if there is another
    assert ended["asleep", other]["result"] == "cached"
    assert not fleet.has("asleep", image)
    assert fleet.in_flight("asleep") == []


def test_the_image_service_is_lost_and_back(
    fleet: Fleet, glance: glance_lab.Glance, relay_to: Callable[[str], relay_lab.Relay]
) -> None:
    (image,) = make_images(glance, 4 * MIB)
    relay = relay_to(glance.url)
    fleet.launch_agent("cut-off", url=relay.url)
    fleet.wait_until_ready("cut-off")
    relay.cut_after(*[1] * CUTS)
    ended = fleet.finish(fleet.start(["cut-off"], [image]))
    assert ended["cut-off", image]["result"] == "cached"
    assert relay.resets == CUTS
    assert "to be tried again" in fleet.log("cut-off").read_text()


def test_an_agent_stops_gracefully_and_evicts_what_its_instances_do_not_need(
    fleet: Fleet, glance: glance_lab.Glance
) -> None:
    (image,) = make_images(glance, MIB)
    instances = fleet.home / "instances.json"
    instances.write_text("[]")
    pid = fleet.start_agent("tidy", "--instances", str(instances), interval=1)
    fleet.finish(fleet.start(["tidy"], [image]))
    base = fleet.instances("tidy") / "_base" / layout.base_name(image)
    os.utime(base, (1, 1))
    os.utime(base.parent / ".imagecache" / "records" / f"{base.name}.json", (1, 1))
    fleet.wait_for(lambda: not base.exists())
    os.kill(pid, signal.SIGTERM)
    fleet.wait_for(lambda: not os.path.exists(f"/proc/{pid}/fd") or not os.listdir(f"/proc/{pid}/fd"))
    assert "Traceback" not in fleet.log("tidy").read_text()


def test_an_agent_that_speaks_another_version_is_told_apart_from_one_that_is_down(
    fleet: Fleet, rabbit: rabbit_lab.Rabbit
) -> None:
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
    images = make_images(glance, 30 * MIB)
    for directory in ("one", "another"):
        fleet.launch_agent("twin", directory=directory)
    fleet.wait_until_ready("one", "another")
    ended = fleet.finish(fleet.start(["twin"], images, "--rate", "256K"), code=10)
    assert ended["twin", images[0]]["result"] == "error"
    assert "two agents answer" in ended["twin", images[0]]["reason"]


def test_a_plan_ends_although_the_broker_takes_no_messages(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit
) -> None:
    images = make_images(glance, MIB)
    words = (*images, "--host", "alpha", "--topic", fleet.topic, "--timeout", "2s", "-f", "json")
    with rabbit.alarm():
        began = time.monotonic()
        plan = fleet.finish(fleet.conductor("plan", *words), code=5)
        assert time.monotonic() - began < 150  # the command itself takes long where much else runs
    assert plan["alpha", ""]["problem"]
    ended = fleet.finish(fleet.start(["alpha"], images))
    assert ended["alpha", images[0]]["result"] == "cached"


def test_a_job_is_cancelled_after_its_conductor_was_killed(fleet: Fleet, glance: glance_lab.Glance) -> None:
    # So slow that it cannot end before it is cancelled, however busy the machine is.
    images = make_images(glance, 512 * KIB, 30 * MIB)
    running = fleet.start(["alpha"], images, "--rate", "256K")
    fleet.wait_for(lambda: fleet.has("alpha", images[0]))
    running.kill()
    running.wait()
    began = time.monotonic()
    fleet.conductor("list").communicate()
    usual = time.monotonic() - began
    began = time.monotonic()
    ended = fleet.cancel()
    took = time.monotonic() - began
    assert took < 25 + 2 * usual, "the conductor is seen to be dead on its own machine, not after 30 s"
    assert [row["result"] for row in ended.values()] == ["cached", "skipped"]
    fleet.wait_for(lambda: fleet.in_flight("alpha") == [])


def test_left_resumed_and_cancelled_it_stops(fleet: Fleet, glance: glance_lab.Glance) -> None:
    images = make_images(glance, 30 * MIB)
    left = fleet.start(["alpha"], images, "--rate", "256K")
    fleet.wait_for(lambda: fleet.in_flight("alpha") != [])
    left.send_signal(signal.SIGINT)
    fleet.finish(left, code=10)
    resumed = fleet.resume()
    fleet.wait_for(lambda: fleet.attempt() == 1)
    fleet.cancel()
    ended = fleet.finish(resumed, code=10)
    assert ended["alpha", images[0]]["result"] == "skipped"
    fleet.wait_for(lambda: fleet.in_flight("alpha") == [])
    assert not fleet.has("alpha", images[0])


def mailboxes(rabbit: rabbit_lab.Rabbit, topic: str) -> dict[str, str]:
    """Return the queues of conductors with their arguments."""
    listed = rabbit.control("-q", "list_queues", "name", "arguments").splitlines()
    rows = [line.split("\t", 1) for line in listed if line.startswith(f"{topic}-conductor-")]
    return {row[0]: row[-1] for row in rows}


def test_agents_report_to_a_queue_that_expires_with_its_conductor(
    fleet: Fleet, glance: glance_lab.Glance, rabbit: rabbit_lab.Rabbit, link: relay_lab.Relay
) -> None:
    images, earlier = make_images(glance, MIB, 4 * MIB), set(mailboxes(rabbit, fleet.topic))

    def own() -> dict[str, str]:
        found = mailboxes(rabbit, fleet.topic)
        return {name: arguments for name, arguments in found.items() if name not in earlier}

    with half_done(fleet, link, ["alpha"], images) as (running, _hold):
        running.kill()
        running.wait()
        fleet.wait_for(lambda: len(own()) == 1)  # those without an expiry vanish
        assert all("x-expires" in arguments for arguments in own().values())
    ended = fleet.finish(fleet.resume())
    assert {row["result"] for row in ended.values()} == {"cached"}


def test_two_that_resume_one_job_fetch_once(
    fleet: Fleet, glance: glance_lab.Glance, link: relay_lab.Relay
) -> None:
    images = make_images(glance, MIB, 4 * MIB)
    with half_done(fleet, link, ["alpha"], images) as (running, _hold):
        running.kill()
        running.wait()
        both = [fleet.resume(), fleet.resume()]
        fleet.wait_for(lambda: fleet.attempt() == 1)
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
        "giver",
        "--serve-peers",
        f"127.0.0.1:{port}",
        "--peer-token-file",
        secret,
        "--peer-cert",
        certificate,
        "--peer-key",
        key,
    )
    fleet.finish(fleet.start(["giver"], [image]))
    glance.delete(image)
    fleet.start_agent(
        "taker",
        "--peer",
        f"https://127.0.0.1:{port}",
        "--trust-peers",
        "--peer-token-file",
        secret,
        "--peer-cafile",
        certificate,
    )
    ended = fleet.finish(fleet.start(["taker", "gamma"], [image]), code=10)
    assert [row["result"] for row in ended.values()] == ["cached", "error"]
    assert fleet.has("taker", image)


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
        fleet.launch_agent(name, *words, "--serve-peers", f"{name}:{port}")
    fleet.wait_until_ready(*relaying)
    names = [*relaying, "alpha"]
    ended = fleet.finish(fleet.start(names, images, "--relay", "--heads", "1"))
    assert {row["result"] for row in ended.values()} == {"cached"}
    assert [len(glance.downloads(image)) for image in images] == [2, 2]
    assert [fleet.in_flight(name) for name in names] == [[]] * 4
