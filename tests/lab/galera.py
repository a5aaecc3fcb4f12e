# SPDX-License-Identifier: Apache-2.0
"""Two nodes of a Galera cluster on the loopback interface: MariaDB servers, each of which takes writes."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

import sqlalchemy as sa

from tests.lab import server
from tests.lab.mariadb import MariaDb
from tests.support import needs
from tests.support.ports import free_port

LOG = logging.getLogger(__name__)

_PROVIDER = "/usr/lib/galera/libgalera_smm.so"

#: A node's place in the cluster, what it keeps for others, and what it says.
_OF_ONE_NODE = ("galera.cache", "gvwstate.dat", "socket", "pid", "server.log")


def _node(home: pathlib.Path, group: int, peer: int | None) -> MariaDb:
    """Return a node.

    :param group: loopback port on which it talks to the other.
    :param peer: that of the other node, or None for the node that makes the cluster.
    """
    talks = f"gmcast.listen_addr=tcp://127.0.0.1:{group};ist.recv_addr=127.0.0.1:{free_port()}"
    # On a busy machine the nodes may not hear of each other for longer than the five seconds that are usual.
    patience = "evs.suspect_timeout=PT60S;evs.inactive_timeout=PT90S;gmcast.peer_timeout=PT60S"
    provider = f"{talks};gcache.size=16M;pc.wait_prim_timeout=PT120S;{patience}"
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
    group = free_port()
    (home / "first").mkdir()
    first = _node(home / "first", group, None)
    first.install()
    first.start()  # which makes the database and user of the tests
    # A node that is ended before it has joined writes down no state, so that all would be copied by rsync.
    _wait_for(first, nodes=1)
    first.stop()
    begun = home / "begun"
    shutil.copytree(home / "first", begun, ignore=shutil.ignore_patterns(*_OF_ONE_NODE))
    # rsync's server gives up the rights of root.
    for each in (home, begun, begun / "data"):
        each.chmod(0o777)
    first.start()
    _wait_for(first, nodes=1)
    second = _joined(home / "second", begun, group)
    for node in (first, second):
        _wait_for(node, nodes=2)
    try:
        yield first, second
    finally:
        second.stop()
        first.stop()


def _joined(home: pathlib.Path, begun: pathlib.Path, peer: int) -> MariaDb:
    """Start the second node, and start it once more if a port was taken meanwhile or it could not join.

    :param begun: the directory of a node that was part of the cluster.
    """
    for left in reversed(range(3)):
        shutil.copytree(begun, home)
        node = _node(home, free_port(), peer)
        try:
            node.start()
        except server.StartError as error:
            if not left:
                raise
            LOG.warning("The second node did not join: %s", error)
            shutil.rmtree(home)
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
