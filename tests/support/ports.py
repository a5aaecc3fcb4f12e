# SPDX-License-Identifier: Apache-2.0
"""Ports for servers that are told theirs before they start."""

from __future__ import annotations

import contextlib
import random
import socket

#: Below what Linux gives to connections and to port 0 (net.ipv4.ip_local_port_range begins at 32768), so that
#: no other program is given the port between the choice and the server's start.
_PORTS = range(10_000, 32_768)


def free_port(*addresses: str) -> int:
    """Return a TCP port that no program listens on.

    It is chosen at random, so that tests that run at the same time choose different ones.

    :param addresses: the loopback addresses on which it is to be free; 127.0.0.1 if none is named.
    """
    chance = random.SystemRandom()
    while True:
        port = chance.choice(_PORTS)
        with contextlib.ExitStack() as probes:
            try:
                for address in addresses or ("127.0.0.1",):
                    probes.enter_context(socket.create_server((address, port)))
            except OSError:
                continue
            return port
