# SPDX-License-Identifier: Apache-2.0
"""Hosts behind links of their own: network namespaces without names, which go with their last process.

The origin's namespace is the program's own, which therefore runs under ``unshare --net``. A bridge joins it
with one namespace for each host, and token buckets limit what each may send and receive. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator

from tests.lab import server
from tests.support import needs

ORIGIN = "10.77.0.254"
_BRIDGE = "br0"
#: A bucket takes some frames at once: a smaller one never reaches the rate, a larger one exceeds it at first.
_BUCKET = ("burst", "256kb", "latency", "50ms")


def run(*command: str) -> None:
    """Run a command to its end."""
    subprocess.run([needs.program(command[0]), *command[1:]], check=True)


def _limit(device: str, rate: str, *inside: str, change: bool = False) -> None:
    words = ("qdisc", "change" if change else "add", "dev", device, "root", "tbf", "rate", rate)
    run(*inside, "tc", *words, *_BUCKET)


def address(number: int) -> str:
    """Return the address of a host."""
    return f"10.77.0.{number}"


def bring_up_origin(sends: str) -> None:
    """Make the bridge, and give the origin an address on it.

    :param sends: what the origin sends in all, such as ``1gbit``.
    """
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", _BRIDGE, "type", "bridge")
    run("ip", "addr", "add", f"{ORIGIN}/24", "dev", _BRIDGE)
    run("ip", "link", "set", _BRIDGE, "up")
    _limit(_BRIDGE, sends)


def sent_by_origin() -> int:
    """Return how many bytes the origin has sent."""
    command = [needs.program("ip"), "-s", "-j", "link", "show", _BRIDGE]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(json.loads(found)[0]["stats64"]["tx"]["bytes"])


@contextlib.contextmanager
def host_namespace(number: int, *, receives: str, sends: str | None = None) -> Iterator[tuple[str, ...]]:
    """Yield the command prefix that runs something on a host of its own.

    :param receives: the most that it receives, such as ``200mbit``.
    :param sends: the most that it sends, or None for no limit.
    """
    holder = subprocess.Popen(
        [
            needs.program("setpriv"),
            "--pdeathsig",
            "TERM",
            needs.program("unshare"),
            "--net",
            "sleep",
            "infinity",
        ]
    )
    inside = ("nsenter", "--target", str(holder.pid), "--net", "--")
    own = os.readlink("/proc/self/ns/net")
    server.wait_until(
        lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != own, "the namespace is there", seconds=120
    )
    try:
        port = f"p{number}"
        run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        run("ip", "link", "set", port, "master", _BRIDGE, "up")
        _limit(port, receives)
        for words in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{address(number)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            run(*inside, "ip", *words)
        if sends is not None:
            _limit("eth0", sends, *inside)
        yield (needs.program("nsenter"), *inside[1:])
    finally:
        holder.terminate()
        holder.wait()


def slow_down(number: int, rate: str, inside: tuple[str, ...]) -> None:
    """Limit what a host receives and sends to another rate.

    :param inside: as :func:`host_namespace` yielded it.
    """
    _limit(f"p{number}", rate, change=True)
    _limit("eth0", rate, "nsenter", *inside[1:], change=True)
