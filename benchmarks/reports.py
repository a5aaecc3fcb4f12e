# SPDX-License-Identifier: Apache-2.0
"""What a report costs a conductor, and how old its news are: many hosts at work, a real RabbitMQ.

    python -m benchmarks.reports [--hosts 1300] [--seconds 40] [--speakers 2]

The conductor runs a real job in a process of its own: real mailbox, real job database, real decisions. A few
processes speak for the hosts, as often as agents do while they fetch: each report has the one image that is
under way. What the conductor asks from time to time is asked over RabbitMQ, too, of one agent that answers
for all. A report carries the moment at which it was sent as the number of bytes that came, so that the age
of what the conductor believes can be read from its job.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import oslo_messaging
from oslo_config import cfg

from imagecache_lib import errors
from imagecache_lib.precache import client, job, mailbox, reporter, rpc
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.precacher import AggregatePrecacher
from tests.lab import rabbit as rabbit_lab

_TOPIC = "imagecache-benchmark"
_STUB = "all-hosts"
_IMAGES = tuple(str(uuid.UUID(int=number + 1)) for number in range(10))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports")
    parser.add_argument("--hosts", type=int, default=1300)
    parser.add_argument("--seconds", type=float, default=40.0, help="to measure, after as many to settle")
    parser.add_argument("--speakers", type=int, default=2, help="processes that speak for the hosts")
    parser.add_argument("--speak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.speak is not None:
        return _speak(_names(options.hosts)[options.speak :: options.speakers], answers=options.speak == 0)
    with tempfile.TemporaryDirectory(prefix="imagecache-reports-", dir="/var/tmp") as home:
        (pathlib.Path(home) / "rabbit").mkdir()
        with rabbit_lab.running_rabbit(pathlib.Path(home) / "rabbit") as rabbit:
            os.environ["OS_DEFAULT__TRANSPORT_URL"] = rabbit.url
            with _speakers(options) as speakers:
                broker = int((rabbit.home / "rabbit.pid").read_text())
                figures = _measure(home, options, speakers, broker)
    print(f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for name, value in figures.items():
        print(f"{name:<44} {value:>10.2f}")
    return 0


def _names(hosts: int) -> list[str]:
    return [f"compute-{number:05d}" for number in range(hosts)]


def _configured() -> Any:
    cfg.CONF([], project="imagecache-benchmark", default_config_files=[])
    return cfg.CONF


# -- those that speak for the hosts ------------------------------------------------------------------


class _Stub:
    """Answers for every host that its task goes on. The conductor's client puts in which host it is."""

    target = oslo_messaging.Target(version="1.3")

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def poll(self, _context: Any, job_id: Any) -> Any:
        cells = {each: {"result": None, "reason": "", "received": 0, "total": None} for each in _IMAGES}
        return {"result": cells}


@contextlib.contextmanager
def _speakers(options: argparse.Namespace) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reports", "--hosts", str(options.hosts)]
    command += ["--speakers", str(options.speakers), "--speak"]
    running = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for number in range(options.speakers)
    ]
    try:
        yield running
    finally:
        for each in running:
            each.kill()
            each.communicate()


def _speak(names: Sequence[str], *, answers: bool) -> int:
    transport = rpc.transport(_configured())
    if answers:
        target = oslo_messaging.Target(topic=_TOPIC, server=_STUB)
        policy = oslo_messaging.ExplicitRPCAccessPolicy
        oslo_messaging.get_rpc_server(transport, target, [_Stub()], access_policy=policy).start()
    told = json.loads(sys.stdin.readline())
    sender = mailbox.RpcSender(transport, topic=_TOPIC)
    began = time.monotonic()
    for turn in range(sys.maxsize):
        name, number = names[turn % len(names)], turn // len(names) + 1
        due = began + turn * reporter.REPORT_SECONDS / len(names)
        time.sleep(max(0.0, due - time.monotonic()))
        who = client.AgentInfo(name, time.time(), reports=True)
        cell = job.Cell(None, "", int((time.time() - told["epoch"]) * 1000), 2**40)
        report = client.TaskReport({_IMAGES[0]: cell}, who, 0, number)
        try:
            sender.send(told["mailbox"], client.HostReport(name, told["job"], report))
        except errors.BackendError:
            break  # the mailbox went with its conductor
    return 0


# -- the conductor -----------------------------------------------------------------------------------


class _Client(rpc.RpcHostClient):
    """Counts what comes and what is asked, and asks the one agent that answers for all.

    :ivar delays: seconds from the sending of each report to its arrival.
    :ivar begun: set once every host was asked to begin.
    """

    def __init__(self, hosts: int, **options: Any) -> None:
        super().__init__(**options)
        self.heard, self.polls, self.mailbox = 0, 0, ""
        self.delays: list[float] = []
        self.begun = threading.Event()
        self._left = set(_names(hosts))
        self._last: dict[str, client.TaskReport] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def listening(self, inbox: client.Inbox) -> Iterator[str | None]:
        self._inbox = inbox
        with super().listening(self) as name:
            self.mailbox = name or ""
            yield name

    def put(self, item: client.HostReport) -> None:
        self.heard += 1
        if item.report.agent is not None:
            self.delays.append(time.time() - item.report.agent.clock)
        self._last[item.host] = item.report
        self._inbox.put(item)

    def begin(self, host: str, task: client.HostTask) -> client.AgentInfo | None:
        with self._lock:
            self._left.discard(host)
            if not self._left:
                self.begun.set()
        return client.AgentInfo(host, time.time(), reports=True)

    def poll(self, host: str, job_id: str) -> client.TaskReport:
        self.polls += 1
        super().poll(_STUB, job_id)
        who = client.AgentInfo(host, time.time(), reports=True)
        last = self._last.get(host, client.TaskReport({}))
        cells = {**{each: job.Cell() for each in _IMAGES}, **last.cells}
        return client.TaskReport(cells, who, 0, last.number)


def _measure(
    home: str, options: argparse.Namespace, speakers: Sequence[subprocess.Popen[str]], broker: int
) -> Mapping[str, float]:
    conf = _configured()
    hosts = _Client(
        options.hosts, transport=rpc.transport(conf), topic=_TOPIC, mailboxes=mailbox.transport(conf)
    )
    conductor = AggregatePrecacher(JobDatabase(os.path.join(home, "jobs.sqlite")), hosts)
    work = conductor.start("all", _names(options.hosts), _IMAGES, job.Terms(concurrency=options.hosts))
    leave, epoch = threading.Event(), time.time()
    running = threading.Thread(target=conductor.run, args=(work.id,), kwargs={"leave": leave}, daemon=True)
    running.start()
    hosts.begun.wait(120)
    for speaker in speakers:
        assert speaker.stdin is not None
        speaker.stdin.write(json.dumps({"mailbox": hosts.mailbox, "job": work.id, "epoch": epoch}) + "\n")
        speaker.stdin.flush()
    time.sleep(options.seconds)
    ages: list[float] = []
    own = 0.0
    before = (hosts.heard, hosts.polls, _cpu(), _cpu_of(broker), time.monotonic())
    while time.monotonic() - before[-1] < options.seconds:
        mark = time.thread_time()
        cells, now = conductor.status(work.id).cells, time.time()
        ages += [now - epoch - row[_IMAGES[0]].received / 1000 for row in cells.values()]
        own += time.thread_time() - mark
        time.sleep(0.5)
    after = (hosts.heard, hosts.polls, _cpu() - own, _cpu_of(broker), time.monotonic())
    for speaker in speakers:
        speaker.kill()  # what they say after the conductor has left would fail
    leave.set()
    running.join(30)
    heard, polls = after[0] - before[0], after[1] - before[1]
    cpu, broker_cpu, seconds = (last - first for first, last in zip(before[2:], after[2:], strict=True))
    quantiles = statistics.quantiles(ages, n=100)
    delays = statistics.quantiles(hosts.delays[-heard:], n=100)
    return {
        "hosts at work": options.hosts,
        "reports a second": heard / seconds,
        "questions a second": polls / seconds,
        "conductor, ms of CPU a report, all included": 1000 * cpu / heard,
        "conductor, share of a core": cpu / seconds,
        "RabbitMQ, ms of CPU a report": 1000 * broker_cpu / heard,
        "from sending to arrival, median, ms": 1000 * delays[49],
        "from sending to arrival, p99, ms": 1000 * delays[98],
        "age of news, median, s": quantiles[49],
        "age of news, p99, s": quantiles[98],
        "age of news, most, s": max(ages),
    }


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _cpu_of(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
