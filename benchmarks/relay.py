# SPDX-License-Identifier: Apache-2.0
"""Hosts that pass an image on to each other: real agents behind links of their own, a real conductor.

    python -m benchmarks.relay [--hosts 16] [--megabytes 24] [--heads 1 2] [--json] [SCENARIO ...]

Scenarios: ``chain`` (nothing goes wrong), ``trouble`` (the third host's link is a fifth as fast, and the
sixth host is killed), ``unicast`` (each host asks the origin), ``few`` (two to six hosts, by chain and by
unicast: from how many on a chain takes less time).

Everything lives in network namespaces without names: the origin, a web server, and one for each host. Links
carry 20 Mbit/s each way, and the origin sends 40 Mbit/s. *Ideal* is the time that the image takes over one
link. Calls and reports go over pipes. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import itertools
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.relay_agent import IMAGE
from imagecache_lib.precache import chains, client, job, wire
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.precacher import AggregatePrecacher
from tests.lab import links
from tests.support import needs

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_LINK = 20
_ORIGIN = 40
_SLOW = 4
_SLOW_PLACE, _KILLED_PLACE = 2, 5
_KILLED_AFTER = 5.0


@dataclasses.dataclass
class Outcome:
    """What one run took.

    :param ideal: seconds that the image takes over one link.
    :param median: seconds until half of the hosts had the image in their caches, from the job's begin.
    :param last: seconds until the last of them had it, those that were slowed down or killed apart.
    :param origin: what the origin sent, in images.
    :param after_last_byte: the most seconds between a host's last byte and the image in its cache.
    :param done: hosts that ended with the image in the cache.
    """

    scenario: str
    hosts: int
    heads: int
    ideal: float
    median: float
    last: float
    origin: float
    after_last_byte: float
    done: int
    load: float


class Host:
    """An agent in a namespace of its own."""

    def __init__(self, number: int, inside: tuple[str, ...], words: Sequence[str]) -> None:
        self.number = number
        self.inside = inside
        self.name = links.address(number)
        self._process = subprocess.Popen(
            [*inside, sys.executable, "-W", "ignore", "-m", "benchmarks.relay_agent", *words],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._ids = itertools.count()
        self._answers: dict[int, queue.SimpleQueue[Any]] = {}
        self._lock = threading.Lock()
        self.inbox: client.Inbox | None = None
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        json.loads(self._lines.readline())
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for text in self._lines:
            told = json.loads(text)
            if "report" in told:
                if self.inbox is not None:
                    self.inbox.put(wire.to_report(told["report"]))
            else:
                self._answers[told["id"]].put(told["answer"])

    def ask(self, method: str, value: Any = None) -> Any:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        number = next(self._ids)
        self._answers[number] = answer
        assert self._process.stdin is not None
        try:
            with self._lock:
                self._process.stdin.write(json.dumps({"id": number, "method": method, "value": value}) + "\n")
            return answer.get(timeout=10)
        except (OSError, queue.Empty):
            raise client.HostDown(f"host {self.name} does not answer") from None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Hosts(client.HostClient):
    """Reaches agents over their pipes.

    :ivar routes: the route that each host was given first, by its name.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.by_name = {host.name: host for host in hosts}
        self.routes: dict[str, chains.HostRoute | None] = {}

    @contextlib.contextmanager
    def listening(self, inbox: client.Inbox) -> Iterator[str | None]:
        for host in self.by_name.values():
            host.inbox = inbox
        yield "0" * 32

    def survey(self, host: str, image_ids: Sequence[str]) -> client.Survey:
        raise NotImplementedError

    def begin(self, host: str, task: client.HostTask) -> client.AgentInfo | None:
        self.routes.setdefault(host, task.relay)
        answer = self.by_name[host].ask("begin", wire.from_task(task))
        wire.result_of(answer)
        return wire.agent_of(answer)

    def poll(self, host: str, job_id: str) -> client.TaskReport:
        return wire.to_poll(self.by_name[host].ask("poll", job_id))

    def cancel(self, host: str, job_id: str) -> None:
        self.by_name[host].ask("cancel", job_id)

    def release(self, host: str, job_id: str) -> None:
        self.by_name[host].ask("release", job_id)

    def chain(self) -> list[str]:
        """Return the names of the hosts of the first chain, as it was begun."""
        behind = {
            route.parents[0]: name
            for name, route in self.routes.items()
            if route is not None and route.parents
        }
        at: str | None = next(
            name for name, route in self.routes.items() if route is not None and route.origin
        )
        found = []
        while at is not None:
            found.append(at)
            at = behind.get(at)
        return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relay")
    parser.add_argument("scenario", nargs="*", default=["chain", "trouble", "unicast", "few"])
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--megabytes", type=int, default=24, help="of the image, which is raw")
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each run")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    needs.root()
    for scenario, hosts, heads in _runs(options):
        if options.inside:
            outcome = _measure(scenario, hosts, heads, options.megabytes * 2**20)
            print(json.dumps(dataclasses.asdict(outcome)), flush=True)
            return 0
        _print(_in_a_namespace(scenario, hosts, heads, options), as_json=options.json)
    return 0


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    for scenario in options.scenario:
        if scenario == "few":
            for hosts in range(2, 7):
                yield "unicast", hosts, 1
                yield "chain", hosts, 1
        elif scenario == "unicast":
            yield scenario, options.hosts, 1
        else:
            for heads in options.heads:
                yield scenario, options.hosts, heads


def _in_a_namespace(scenario: str, hosts: int, heads: int, options: argparse.Namespace) -> Outcome:
    words = [scenario, "--hosts", str(hosts), "--heads", str(heads), "--megabytes", str(options.megabytes)]
    command = [needs.program("unshare"), "--net", "--", sys.executable, "-W", "ignore"]
    command += ["-m", "benchmarks.relay", "--inside", *words]
    done = subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def _print(outcome: Outcome, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)
        return
    print(
        f"{outcome.scenario:8} {outcome.hosts:3} hosts, {outcome.heads} heads: median {outcome.median:5.1f} s"
        f" ({outcome.median / outcome.ideal:4.2f} x ideal), last {outcome.last:5.1f} s "
        f"({outcome.last / outcome.ideal:4.2f} x), {outcome.origin:5.2f} images from the origin, cached "
        f"{outcome.after_last_byte:4.2f} s after the last byte, {outcome.done} done, load {outcome.load:.1f}",
        flush=True,
    )


def _measure(scenario: str, count: int, heads: int, size: int) -> Outcome:
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="imagecache-relay-", dir="/dev/shm"))
        )
        links.bring_up_origin(f"{_ORIGIN}mbit")
        url, digest = _serve(directory, size)
        hosts = [_host(stack, directory, number, url, digest) for number in range(1, count + 1)]
        reached = Hosts(hosts)
        relay = None if scenario == "unicast" else job.RelayTerms(heads=heads)
        conductor = AggregatePrecacher(JobDatabase(str(directory / "jobs.sqlite")), reached)
        work = conductor.start(
            "all", [host.name for host in hosts], [IMAGE], job.Terms(concurrency=count, relay=relay)
        )
        sent, began = links.sent_by_origin(), time.monotonic()
        leave = threading.Event()
        running = threading.Thread(target=lambda: conductor.run(work.id, leave=leave))
        running.start()
        odd = _make_trouble(reached, count) if scenario == "trouble" else set()
        moments = _wait([host for host in hosts if host.name not in odd])
        origin = (links.sent_by_origin() - sent) / size
        leave.set()
        running.join()
        cached = sorted(at - began for _last, at in moments)
        return Outcome(
            scenario,
            count,
            heads,
            ideal=size * 8 / (_LINK * 1e6),
            median=statistics.median(cached),
            last=cached[-1],
            origin=origin,
            after_last_byte=max((at - last for last, at in moments if last is not None), default=0.0),
            done=len(cached),
            load=load,
        )


def _serve(directory: pathlib.Path, size: int) -> tuple[str, str]:
    """Serve an image at the origin. Returns its URL and its digest."""
    data = os.urandom(size)
    (directory / "origin").mkdir()
    (directory / "origin" / "image").write_bytes(data)
    handler = functools.partial(_Quiet, directory=str(directory / "origin"))
    server = http.server.ThreadingHTTPServer((links.ORIGIN, 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://{links.ORIGIN}:{server.server_address[1]}/image", hashlib.sha512(data).hexdigest()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        return


def _host(stack: contextlib.ExitStack, directory: pathlib.Path, number: int, url: str, digest: str) -> Host:
    rate = f"{_LINK}mbit"
    inside = stack.enter_context(links.host_namespace(number, receives=rate, sends=rate))
    instances = directory / str(number)
    instances.mkdir()
    words = ["--instances", str(instances), "--name", links.address(number), "--url", url, "--digest", digest]
    host = Host(number, inside, words)
    stack.callback(host.end)
    return host


def _make_trouble(reached: Hosts, count: int) -> set[str]:
    """Slow one host down, kill another, and return their names."""
    while len(reached.routes) < count:
        time.sleep(0.05)
    chain = reached.chain()
    slow, killed = (reached.by_name[chain[place]] for place in (_SLOW_PLACE, _KILLED_PLACE))
    links.slow_down(slow.number, f"{_SLOW}mbit", slow.inside)
    timer = threading.Timer(_KILLED_AFTER, killed.kill)
    timer.daemon = True
    timer.start()
    return {slow.name, killed.name}


def _wait(hosts: Sequence[Host]) -> list[tuple[float | None, float]]:
    """Return when each host had its last byte, and the image in its cache."""
    found: dict[str, tuple[float | None, float]] = {}
    until = time.monotonic() + 170
    while len(found) < len(hosts) and time.monotonic() < until:
        time.sleep(0.5)
        for host in hosts:
            if host.name not in found:
                last, cached = wire.result_of(host.ask("moments"))
                if cached is not None:
                    found[host.name] = last, cached
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
