# SPDX-License-Identifier: Apache-2.0
"""A real Ceph cluster: one monitor, one OSD that keeps its data in memory, no authentication.

Snapshots must be protected before they are cloned, as in every cluster that still lets old clients in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import uuid
from collections.abc import Iterator

from tests.lab import server
from tests.support import needs
from tests.support.ports import free_port

POOLS = ("images", "vms")

#: Where distributions keep Python modules that have no wheel.
_TIMEOUT = 60

_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
public network = 127.0.0.0/8
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
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

    :param conf: its configuration file, which is all that a client needs.
    :param fsid: its id.
    """

    conf: pathlib.Path
    fsid: str


@contextlib.contextmanager
def running_ceph(home: pathlib.Path) -> Iterator[Ceph]:
    """Run a cluster for the length of the context.

    :param home: an existing, empty directory for all it writes.
    """
    for program in ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "rbd"):
        needs.program(program)
    fsid, v2, v1 = str(uuid.uuid4()), free_port(), free_port()
    conf = home / "ceph.conf"
    conf.write_text(_CONFIGURATION.format(home=home, fsid=fsid, v2=v2, v1=v1))
    for name in ("mon", "osd"):
        (home / name).mkdir()

    def run(*command: str) -> str:
        with (home / "commands.log").open("ab") as log:
            done = subprocess.run(
                [needs.program(command[0]), *command[1:]],
                check=True,
                timeout=_TIMEOUT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        return done.stdout

    def ceph(*command: str) -> str:
        return run("ceph", "--conf", str(conf), *command)

    def osd_is_up() -> bool:
        return bool(json.loads(ceph("osd", "stat", "--format", "json"))["num_up_osds"] == 1)

    addresses = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, str(home / "monmap"))
    run("ceph-mon", "--conf", str(conf), "--mkfs", "-i", "a", "--monmap", str(home / "monmap"))
    with contextlib.ExitStack() as stack:
        monitor = [needs.program("ceph-mon"), "--conf", str(conf), "-f", "-i", "a"]
        stack.enter_context(server.running(monitor, ready=lambda: server.listens(v2), log=home / "mon.log"))
        osd_id = str(uuid.uuid4())
        ceph("osd", "new", osd_id)
        run("ceph-osd", "--conf", str(conf), "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        ceph("osd", "crush", "add", "osd.0", "1.0", "host=localhost", "root=default")
        osd = [needs.program("ceph-osd"), "--conf", str(conf), "-f", "-i", "0"]
        stack.enter_context(server.running(osd, ready=osd_is_up, log=home / "osd.log"))
        for pool in POOLS:
            ceph("osd", "pool", "create", pool, "8", "8")
            run("rbd", "--conf", str(conf), "pool", "init", pool)
        yield Ceph(conf, fsid)
