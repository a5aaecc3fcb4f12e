# SPDX-License-Identifier: Apache-2.0
"""A TCP relay in front of a server, which breaks connections where a test says: the network between.

Networks and load balancers break transfers at any byte; a server on loopback never does by itself.
"""

from __future__ import annotations

import collections
import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

_CHUNK = 64 * 1024

#: Seconds between two looks whether answers that are held may go on, or nobody waits for them any more.
_LOOK_SECONDS = 0.02


def _readable(sides: Sequence[socket.socket], seconds: float | None = None) -> list[socket.socket]:
    """Return which of the sockets have data, or an end. Unlike select(), it takes any descriptor."""
    with selectors.DefaultSelector() as selector:
        for side in sides:
            selector.register(side, selectors.EVENT_READ)
        ready = {key.fileobj for key, _events in selector.select(seconds)}
    return [side for side in sides if side in ready]


class Hold:
    """Answers that stop midway, on each connection, until they are let go. Of :meth:`Relay.held_after`."""

    def __init__(self, after: int) -> None:
        self._after = after
        self._lock = threading.Lock()
        self._passed: collections.Counter[socket.socket] = collections.Counter()
        self._held: set[socket.socket] = set()
        self._released = threading.Event()

    @property
    def count(self) -> int:
        """How many connections are held now."""
        with self._lock:
            return len(self._held)

    def let_go(self) -> None:
        """Let all answers go on, now and from now on."""
        self._released.set()

    def admit(self, client: socket.socket, size: int) -> bool:
        """Wait until so many bytes more may pass to a client. Returns False if it went away meanwhile."""
        with self._lock:
            self._passed[client] += size
            if self._passed[client] <= self._after:
                return True
            self._held.add(client)
        try:
            while not self._released.wait(_LOOK_SECONDS):
                if _readable([client], 0) and not client.recv(1, socket.MSG_PEEK):
                    return False
            return True
        finally:
            with self._lock:
                self._held.discard(client)


class Relay:
    """Relays every connection to one upstream. Use :func:`running_relay`."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._cuts: list[int] = []
        self._resets_reused = False
        self._reset_count = 0
        self._open: set[socket.socket] = set()
        self._hold: Hold | None = None
        self._is_severed = False
        self._passed = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        """The loopback port that it listens on."""
        return int(self._listener.getsockname()[1])

    @property
    def resets(self) -> int:
        """How many connections were reset."""
        with self._lock:
            return self._reset_count

    @property
    def passed(self) -> int:
        """How many bytes of answers it passed on."""
        with self._lock:
            return self._passed

    @contextlib.contextmanager
    def held_after(self, count: int) -> Iterator[Hold]:
        """Hold the answers on each connection after that many bytes, until the body ends or lets them go."""
        hold = Hold(count)
        with self._lock:
            self._hold = hold
        try:
            yield hold
        finally:
            with self._lock:
                self._hold = None
            hold.let_go()

    def cut_after(self, *counts: int) -> None:
        """Reset one connection for each count, in turn, after that many bytes of answers."""
        with self._lock:
            self._cuts = list(counts)

    def reset_reused(self) -> None:
        """From now on, reset a connection on which a second request arrives, as uWSGI does now and then."""
        with self._lock:
            self._resets_reused = True

    def sever(self) -> None:
        """Break all connections, and those that are tried from now on: the network between is gone."""
        with self._lock:
            self._is_severed = True
        self._break_all()

    def mend(self) -> None:
        """Relay connections again."""
        with self._lock:
            self._is_severed = False

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def close(self) -> None:
        # A thread that blocks in accept() is not woken by close(), but by shutdown().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._break_all()

    def _break_all(self) -> None:
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server:
            with self._lock:
                if self._is_severed:
                    return
                self._open |= {client, server}
                cut = self._cuts.pop(0) if self._cuts else None
            try:
                self._pass_on(client, server, cut)
            except OSError:
                pass  # either side went away: so does the relayed connection
            finally:
                with self._lock:
                    self._open -= {client, server}

    def _pass_on(self, client: socket.socket, server: socket.socket, left: int | None) -> None:
        answering = False
        sides = [client, server]
        while True:
            readable = _readable(sides)
            if client in readable:
                data = client.recv(_CHUNK)
                if not data:
                    return
                with self._lock:
                    reset_reused = self._resets_reused
                if answering and reset_reused:
                    return self._reset(client)
                server.sendall(data)
            if server in readable:
                data = server.recv(_CHUNK)
                if not data:
                    # The client does not learn it before it tries to use the connection again.
                    with self._lock:
                        if not self._resets_reused:
                            return
                    sides = [client]
                    continue
                answering = True
                if left is not None:
                    data = data[:left]
                    left -= len(data)
                with self._lock:
                    hold = self._hold
                if hold is not None and not hold.admit(client, len(data)):
                    return
                client.sendall(data)
                with self._lock:
                    self._passed += len(data)
                if left == 0:
                    return self._reset(client)

    def _reset(self, client: socket.socket) -> None:
        with self._lock:
            self._reset_count += 1
        # Linger of zero: close() sends RST instead of FIN.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def running_relay(upstream_url: str) -> Iterator[Relay]:
    """Run a relay to an ``http://host:port`` for the length of the context."""
    host, _, port = upstream_url.removeprefix("http://").partition(":")
    relay = Relay((host, int(port)))
    thread = threading.Thread(target=relay.serve, daemon=True)
    thread.start()
    try:
        yield relay
    finally:
        relay.close()
        thread.join(10)
