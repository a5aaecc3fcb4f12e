# SPDX-License-Identifier: Apache-2.0
"""A real Ceph cluster: one monitor, one OSD that keeps its data in memory, and users with keys (cephx).

Snapshots must be protected before they are cloned, as in every cluster that still lets old clients in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping

from tests.lab import server
from tests.support import needs, stopping
from tests.support.ports import free_port

POOLS = ("images", "vms")

#: Seconds for one command.
_TIMEOUT = 240

_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
public network = 127.0.0.0/8
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {home}/$name.keyring
auth allow insecure global id reclaim = true
mon allow pool size one = true
mon data avail crit = 1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
run dir = {home}
admin socket = {home}/$name.asok
log file = {home}/$name.log
[mon.a]
mon data = {home}/mon
[osd.0]
osd data = {home}/osd
"""


@dataclasses.dataclass(frozen=True)
class Ceph:
    """A running cluster with the pools ``images`` and ``vms``.

    :param conf: its configuration file, which is all that a client needs. Beside it is each user's keyring.
    :param fsid: its id.
    :param daemons: process ids of ``mon`` and ``osd``.
    """

    conf: pathlib.Path
    fsid: str
    daemons: Mapping[str, int]

    def ceph(self, *command: str) -> str:
        """Run a command as the administrator, and return what it prints."""
        return _run(self.conf, "ceph", *command)

    def rbd(self, *command: str) -> str:
        """Run a command as the administrator, and return what it prints."""
        return _run(self.conf, "rbd", *command)

    def user(self, name: str, **caps: str) -> str:
        """Make a user, or give it other rights, and return its name.

        :param name: without ``client.``.
        :param caps: what it may do, by kind of daemon: ``mon``, ``osd``.
        """
        pairs = [word for pair in caps.items() for word in pair]
        if f"client.{name}" in self.ceph("auth", "ls"):
            self.ceph("auth", "caps", f"client.{name}", *pairs)
        keyring = self.conf.parent / f"client.{name}.keyring"
        self.ceph("auth", "get-or-create", f"client.{name}", *pairs, "-o", str(keyring))
        return name

    @contextlib.contextmanager
    def stopped(self, daemon: str) -> Iterator[None]:
        """Have the monitor or the OSD answer nothing for the length of the context.

        :param daemon: ``mon`` or ``osd``.
        """
        stopping.stop(self.daemons[daemon])
        try:
            yield
        finally:
            os.kill(self.daemons[daemon], signal.SIGCONT)


def _run(conf: pathlib.Path, program: str, *command: str) -> str:
    """Run one of Ceph's programs, and return what it prints."""
    with (conf.parent / "commands.log").open("ab") as log:
        done = subprocess.run(
            [needs.program(program), "--conf", str(conf), *command],
            check=True,
            timeout=_TIMEOUT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    return done.stdout


@contextlib.contextmanager
def running_ceph(home: pathlib.Path) -> Iterator[Ceph]:
    """Run a cluster for the length of the context.

    :param home: an existing, empty directory for all it writes.
    """
    for program in ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "rbd"):
        needs.program(program)
    fsid, v2, v1 = str(uuid.uuid4()), free_port(), free_port()
    conf = home / "ceph.conf"
    conf.write_text(_CONFIGURATION.format(home=home, fsid=fsid, v2=v2, v1=v1))
    for name in ("mon", "osd"):
        (home / name).mkdir()

    def run(program: str, *command: str) -> str:
        return _run(conf, program, *command)

    def osd_is_up() -> bool:
        return bool(json.loads(run("ceph", "osd", "stat", "--format", "json"))["num_up_osds"] == 1)

    addresses = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, str(home / "monmap"))
    keys = _make_keys(conf)
    made = ("--mkfs", "-i", "a", "--monmap", str(home / "monmap"), "--keyring", str(keys))
    run("ceph-mon", *made)
    with contextlib.ExitStack() as stack:

        def start(name: str, daemon_id: str, ready: Callable[[], bool]) -> int:
            command = [needs.program(f"ceph-{name}"), "--conf", str(conf), "-f", "-i", daemon_id]
            return stack.enter_context(server.running(command, ready=ready, log=home / f"{name}.log"))

        daemons = {"mon": start("mon", "a", lambda: server.listens(v2))}
        osd_id = str(uuid.uuid4())
        run("ceph", "osd", "new", osd_id)
        rights = ("mon", "allow profile osd", "osd", "allow *")
        run("ceph", "auth", "get-or-create", "osd.0", *rights, "-o", str(home / "osd.0.keyring"))
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=localhost", "root=default")
        daemons["osd"] = start("osd", "0", osd_is_up)
        for pool in POOLS:
            run("ceph", "osd", "pool", "create", pool, "8", "8")
            run("rbd", "pool", "init", pool)
        yield Ceph(conf, fsid, daemons)


def _make_keys(conf: pathlib.Path) -> pathlib.Path:
    """Make the keys of the administrator and of the monitors, and return the keyring with both."""
    admin, keys = conf.parent / "client.admin.keyring", conf.parent / "keys"
    everything = [word for daemon in ("mon", "osd", "mgr") for word in ("--cap", daemon, "allow *")]
    for path, name in ((admin, "client.admin"), (keys, "mon.")):
        _run(conf, "ceph-authtool", "--create-keyring", str(path), "--gen-key", "-n", name, *everything)
    _run(conf, "ceph-authtool", str(keys), "--import-keyring", str(admin))
    return keys
