# SPDX-License-Identifier: Apache-2.0
"""What a conductor costs: jobs of many hosts against fake agents, which are done as soon as they are asked.

    python -m benchmarks.conductor [--hosts 1000 10000] [--images 10] [--concurrency 100]

Each size runs in a process of its own. A call takes five milliseconds, of waiting; hosts do no work, so all
that is left is the conductor's own: its threads, its memory, its database.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence

from imagecache_lib.precache import client, job
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.precacher import AggregatePrecacher

_CALL_SECONDS = 0.005
_SIZE = 2**30


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one job took.

    :param seconds: from the call of ``run`` to its return.
    :param cpu: seconds of this process meanwhile, user and system.
    :param megabytes: the most memory that the process had resident.
    :param written: bytes that were sent to disks, in MB.
    :param threads: the most at a time.
    :param false: results other than those that the agents gave, missing ones included.
    """

    hosts: int
    images: int
    seconds: float
    cpu: float
    megabytes: float
    written: float
    threads: int
    false: int


class _Agents(client.HostClient):
    """Hosts that have everything at once."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[str, ...]] = {}
        self.threads = 0

    def survey(self, host: str, image_ids: Sequence[str]) -> client.Survey:
        self._wait()
        return client.Survey((), dict.fromkeys(image_ids, _SIZE), 2**40)

    def begin(self, host: str, task: client.HostTask) -> None:
        self._wait()
        self._begun[host] = task.image_ids

    def poll(self, host: str, job_id: str) -> client.TaskReport:
        self._wait()
        cached = job.Cell(job.Result.CACHED, "", _SIZE, _SIZE)
        return client.TaskReport(dict.fromkeys(self._begun[host], cached))

    def cancel(self, host: str, job_id: str) -> None:
        self._wait()

    def _wait(self) -> None:
        self.threads = max(self.threads, threading.active_count())
        time.sleep(_CALL_SECONDS)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conductor")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--directory", default="/var/tmp", help="where the job database is kept")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        figures = _measure(options.hosts[0], options.images, options.concurrency, options.directory)
        print(json.dumps(dataclasses.asdict(figures)))
        return 0
    print(f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(f"{'hosts':>6} {'images':>6} {'seconds':>8} {'CPU s':>6} {'MB':>6} {'written MB':>10} ", end="")
    print(f"{'threads':>7} {'false':>5}")
    for hosts in options.hosts:
        found = _in_a_process_of_its_own(hosts, options)
        print(f"{hosts:>6} {found.images:>6} {found.seconds:>8.2f} {found.cpu:>6.2f} ", end="")
        print(f"{found.megabytes:>6.0f} {found.written:>10.1f} {found.threads:>7} {found.false:>5}")
    return 0


def _in_a_process_of_its_own(hosts: int, options: argparse.Namespace) -> Figures:
    command = [sys.executable, "-m", "benchmarks.conductor", "--inside", "--hosts", str(hosts)]
    command += ["--images", str(options.images), "--concurrency", str(options.concurrency)]
    command += ["--directory", options.directory]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Figures(**json.loads(done.stdout))


def _measure(hosts: int, images: int, concurrency: int, directory: str) -> Figures:
    names = [f"compute-{number:05d}.example.net" for number in range(hosts)]
    image_ids = [str(uuid.UUID(int=number + 1)) for number in range(images)]
    agents = _Agents()
    with tempfile.TemporaryDirectory(prefix="imagecache-jobs-", dir=directory) as home:
        database = JobDatabase(os.path.join(home, "jobs.sqlite"))
        conductor = AggregatePrecacher(database, agents)
        work = conductor.start("all", names, image_ids, job.Terms(concurrency=concurrency))
        written, cpu, began = _written(), _cpu(), time.monotonic()
        conductor.run(work.id)
        seconds, used = time.monotonic() - began, _cpu() - cpu
        ended = JobDatabase(os.path.join(home, "jobs.sqlite")).get(work.id)
        good = ended.count()[job.Result.CACHED]
        return Figures(
            hosts=hosts,
            images=images,
            seconds=seconds,
            cpu=used,
            megabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            written=(_written() - written) / 1e6,
            threads=agents.threads,
            false=hosts * images - good,
        )


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _written() -> int:
    with open("/proc/self/io", encoding="ascii") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("write_bytes"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
