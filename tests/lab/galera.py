# SPDX-License-Identifier: Apache-2.0
"""Two nodes of a Galera cluster on the loopback interface: MariaDB servers, each of which takes writes."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

import sqlalchemy as sa

from tests.lab import server
from tests.lab.mariadb import MariaDb
from tests.support import needs
from tests.support.ports import free_port

_PROVIDER = "/usr/lib/galera/libgalera_smm.so"


def _node(home: pathlib.Path, group: int, peer: int | None) -> MariaDb:
    """Return a node.

    :param group: loopback port on which it talks to the other.
    :param peer: that of the other node, or None for the node that makes the cluster.
    """
    talks = f"gmcast.listen_addr=tcp://127.0.0.1:{group};ist.recv_addr=127.0.0.1:{free_port()}"
    provider = f"{talks};gcache.size=16M"
    options = [
        "--wsrep-on=ON",
        f"--wsrep-provider={_PROVIDER}",
        "--binlog-format=ROW",
        "--innodb-autoinc-lock-mode=2",
        f"--wsrep-cluster-address=gcomm://{'' if peer is None else f'127.0.0.1:{peer}'}",
        "--wsrep-cluster-name=jobs",
        f"--wsrep-node-name={home.name}",
        f"--wsrep-node-address=127.0.0.1:{group}",
        f"--wsrep-provider-options={provider}",
        # Both begin with the same data: only what happened since is brought over.
        "--wsrep-sst-method=rsync",
    ]
    return MariaDb(home, free_port(), (*options, *(["--wsrep-new-cluster"] if peer is None else [])))


@contextlib.contextmanager
def running_galera(home: pathlib.Path) -> Iterator[tuple[MariaDb, MariaDb]]:
    """Run two nodes for the length of the context.

    :param home: an existing, empty directory for all they write.
    """
    if not os.path.exists(_PROVIDER):
        needs.lack("galera-4 is not installed")
    needs.program("rsync")
    homes = [home / name for name in ("first", "second")]
    for each in homes:
        each.mkdir()
    group = free_port()
    first = _node(homes[0], group, None)
    first.install()
    first.start()  # which makes the database and user of the tests
    # A node that is ended before it has joined writes down no state, so that all would be copied by rsync.
    _wait_for(first, nodes=1)
    first.stop()
    for name in ("data", "start.sql"):
        source = homes[0] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, homes[1] / name)
    # The first node's place in the cluster, and what it keeps for others.
    for own in ("galera.cache", "gvwstate.dat"):
        (homes[1] / "data" / own).unlink(missing_ok=True)
    # rsync's server gives up the rights of root.
    for each in (home, homes[1], homes[1] / "data"):
        each.chmod(0o777)
    first.start()
    second = _joined(homes[1], group)
    for node in (first, second):
        _wait_for(node, nodes=2)
    try:
        yield first, second
    finally:
        second.stop()
        first.stop()


def _joined(home: pathlib.Path, peer: int) -> MariaDb:
    """Start the second node, which takes its ports only when it has read what it has."""
    for left in reversed(range(3)):
        node = _node(home, free_port(), peer)
        try:
            node.start()
        except server.StartError:
            if not left:
                raise
        else:
            return node
    raise AssertionError("the last try returns or raises")


def _wait_for(node: MariaDb, *, nodes: int) -> None:
    server.wait_until(lambda: _is_ready(node, nodes), f"the cluster has {nodes} nodes", seconds=240)


def _is_ready(node: MariaDb, nodes: int) -> bool:
    """Whether a node is one of so many and takes statements: it accepts connections before it has joined."""
    engine = sa.create_engine(node.url, poolclass=sa.NullPool)
    with contextlib.suppress(sa.exc.DBAPIError), engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        status = connection.exec_driver_sql("SHOW STATUS LIKE 'wsrep_cluster_size'").one()
        return bool(status[1] == str(nodes))
    return False
