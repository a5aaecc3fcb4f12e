# SPDX-License-Identifier: Apache-2.0
"""Pre-caching a fleet: real agents behind links of their own, a real RabbitMQ, a real Glance.

    python -m benchmarks.fleet [--hosts 1 2 4 8] [--megabytes 256]

Everything lives in network namespaces without names, which go with their last process: the origin, with
Glance, RabbitMQ and the conductor, and one for each host, joined by a bridge. Token buckets limit what the
origin sends in all and what each host receives. Needs root. Servers listen on the origin's loopback, and
relays carry the hosts' connections there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

from tests.lab import glance as glance_lab
from tests.lab import links, server
from tests.lab import rabbit as rabbit_lab
from tests.support import needs

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_ORIGIN_RATE = "1gbit"
_HOST_RATE = "200mbit"
_COMMAND = (sys.executable, "-W", "ignore", "-m", "imagecache_lib.cli.main")
_CHUNK = 2**18


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--megabytes", type=int, default=256, help="of the image, which is raw")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    needs.root()
    if not options.inside:
        # The origin's namespace is this program's own.
        again = [
            needs.program("unshare"),
            "--net",
            "--",
            sys.executable,
            "-m",
            "benchmarks.fleet",
            "--inside",
        ]
        return subprocess.run([*again, *arguments], cwd=_ROOT, check=False).returncode
    with tempfile.TemporaryDirectory(prefix="imagecache-fleet-", dir="/var/tmp") as home:
        rows = _measure(pathlib.Path(home), options.hosts, options.megabytes * 2**20)
    print(f"One raw image of {options.megabytes} MiB; origin {_ORIGIN_RATE}, each host {_HOST_RATE}.")
    print(f"{'hosts':>5} {'at a time':>9} {'seconds':>8} {'MB/s':>7} {'downloads':>9}")
    for hosts, concurrency, seconds, downloads in rows:
        rate = hosts * options.megabytes * 2**20 / seconds / 1e6
        print(f"{hosts:>5} {concurrency:>9} {seconds:>8.1f} {rate:>7.1f} {downloads:>9}")
    return 0


def _measure(home: pathlib.Path, counts: Sequence[int], size: int) -> list[tuple[int, int, float, int]]:
    rows = []
    with contextlib.ExitStack() as stack:
        links.bring_up_origin(_ORIGIN_RATE)
        for name in ("glance", "rabbit"):
            (home / name).mkdir()
        glance = stack.enter_context(glance_lab.running_glance(home / "glance"))
        rabbit = stack.enter_context(rabbit_lab.running_rabbit(home / "rabbit"))
        glance_port = _relayed(int(glance.url.rpartition(":")[2]))
        rabbit_port = _relayed(rabbit.port)
        fleet = _Fleet(home, glance_port, rabbit_port, rabbit.url)
        names = [f"host-{number}" for number in range(1, max(counts) + 1)]
        for number, name in enumerate(names, start=1):
            stack.enter_context(fleet.agent(name, number))
        # The last is what a conductor does that asks one host after the other.
        plans = [(count, count) for count in counts] + [(sorted(counts)[len(counts) // 2], 1)]
        for count, concurrency in plans:
            image = glance.upload(os.urandom(size))
            seconds = fleet.precache(names[:count], image, concurrency)
            rows.append((count, concurrency, seconds, len(glance.downloads(image))))
            for name in names:
                fleet.clear(name)
            glance.delete(image)
    return rows


# -- the network ---------------------------------------------------------------------------------------------


def _relayed(port: int) -> int:
    """Carry connections from the bridge to a port on loopback; return the port they come to."""
    listener = socket.create_server((links.ORIGIN, 0), backlog=128)

    def accept() -> None:
        while True:
            outer, _address = listener.accept()
            inner = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=_carry, args=(outer, inner), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def _carry(one: socket.socket, other: socket.socket) -> None:
    with one, other, contextlib.suppress(OSError):
        while True:
            for source in select.select([one, other], [], [])[0]:
                data = source.recv(_CHUNK)
                if not data:
                    return
                (other if source is one else one).sendall(data)


# -- the fleet -----------------------------------------------------------------------------------------------


class _Fleet:
    def __init__(self, home: pathlib.Path, glance_port: int, rabbit_port: int, local_url: str) -> None:
        self._home = home
        self._glance = f"http://{links.ORIGIN}:{glance_port}"
        self._local_url = local_url
        self._url = f"rabbit://guest:guest@{links.ORIGIN}:{rabbit_port}/"

    def _environment(self, url: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
        return {
            **kept,
            "HOME": str(self._home),
            "OS_DEFAULT__TRANSPORT_URL": url,
            "OS_TOKEN": glance_lab.MEMBER,
        }

    @contextlib.contextmanager
    def agent(self, name: str, number: int) -> Iterator[None]:
        instances = self._home / name / "instances"
        instances.mkdir(parents=True)
        configuration = self._home / name / "imagecache.conf"
        configuration.write_text(
            f"[DEFAULT]\nhost = {name}\ninstances_path = {instances}\n[image_cache]\nmanager_interval = -1\n"
        )
        log = self._home / name / "agent.log"
        log.touch()
        with (
            links.host_namespace(number, receives=_HOST_RATE) as inside,
            server.running(
                [
                    *inside,
                    *_COMMAND,
                    "--config-file",
                    str(configuration),
                    "agent",
                    "--glance-endpoint",
                    self._glance,
                ],
                ready=lambda: b"is ready" in log.read_bytes(),
                log=log,
                environment=self._environment(self._url),
            ),
        ):
            yield

    def precache(self, names: Sequence[str], image: str, concurrency: int) -> float:
        """Return the seconds from the command to its end, of which its start takes part."""
        hosts = [word for name in names for word in ("--host", name)]
        began = time.monotonic()
        done = subprocess.run(
            [*_COMMAND, "precache", "start", image, *hosts, "--concurrency", str(concurrency), "-f", "json"],
            env=self._environment(self._local_url),
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=200,
        )
        seconds = time.monotonic() - began
        results = [row["result"] for row in json.loads(done.stdout)]
        if results != ["cached"] * len(names):
            raise AssertionError(results)
        return seconds

    def clear(self, name: str) -> None:
        instances = self._home / name / "instances"
        for path in (instances / "_base").glob("*"):
            if path.is_file():
                path.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
