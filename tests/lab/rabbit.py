# SPDX-License-Identifier: Apache-2.0
"""A real RabbitMQ on the loopback interface, with a name, a port mapper and directories of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping

from tests.lab import server
from tests.support import needs
from tests.support.ports import free_port

_PROGRAM = "/usr/lib/rabbitmq/bin/rabbitmq-server"
_CONTROL = "/usr/lib/rabbitmq/bin/rabbitmqctl"

_CONFIGURATION = """
listeners.tcp.default = 127.0.0.1:{port}
loopback_users.guest = true
disk_free_limit.absolute = 50MB
"""


@dataclasses.dataclass
class Rabbit:
    """A broker that can be stopped and started again. What it keeps on disk stays.

    :param home: for all it writes.
    :param port: that it listens on.
    """

    home: pathlib.Path
    port: int
    environment: Mapping[str, str]
    _running: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    @property
    def url(self) -> str:
        """The transport URL for oslo.messaging."""
        return f"rabbit://guest:guest@127.0.0.1:{self.port}/"

    def start(self) -> None:
        self._running.enter_context(
            server.running(
                [_PROGRAM],
                ready=lambda: server.listens(self.port) and (self.home / "rabbit.pid").exists(),
                log=self.home / "server.log",
                seconds=240,
                environment=self.environment,
                directory=self.home,
            )
        )

    @contextlib.contextmanager
    def alarm(self, lacking: str = "memory") -> Iterator[None]:
        """Have the broker believe that it has no memory, or disk, left: it takes no messages meanwhile."""
        setting, far_off, usual = {
            "memory": ("set_vm_memory_high_watermark", "0.00001", "0.4"),
            "disk": ("set_disk_free_limit", "1000000GB", "50MB"),
        }[lacking]
        self.control(setting, far_off)
        try:
            yield
        finally:
            self.control(setting, usual)

    def remake_vhost(self, meanwhile: Callable[[], None]) -> None:
        """Delete the virtual host with all its queues and connections, and make it again.

        :param meanwhile: called while there is none.
        """
        self.control("delete_vhost", "/")
        try:
            meanwhile()
        finally:
            self.control("add_vhost", "/")
            self.control("set_permissions", "-p", "/", "guest", ".*", ".*", ".*")

    def control(self, *words: str) -> str:
        """Run rabbitmqctl on it, and return what that prints."""
        done = subprocess.run(
            [_CONTROL, "-n", self.environment["RABBITMQ_NODENAME"], *words],
            env={**os.environ, **self.environment},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout

    def stop(self) -> None:
        # The Erlang machine is a child of the shell script, which does not pass a SIGTERM on.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int((self.home / "rabbit.pid").read_text()), signal.SIGTERM)
            server.wait_until(lambda: not server.listens(self.port), "RabbitMQ ends", seconds=240)
        self._running.close()
        (self.home / "rabbit.pid").unlink(missing_ok=True)


@contextlib.contextmanager
def running_rabbit(home: pathlib.Path) -> Iterator[Rabbit]:
    """Run a RabbitMQ for the length of the context.

    :param home: an existing, empty directory for all it writes.
    """
    if not os.access(_PROGRAM, os.X_OK):
        needs.lack("rabbitmq-server is not installed")
    epmd, port, mapper, peers = needs.program("epmd"), *(free_port() for _ in range(3))
    (home / "plugins").write_text("[].\n")
    (home / "rabbitmq.conf").write_text(_CONFIGURATION.format(port=port))
    environment = {
        "RABBITMQ_NODENAME": f"lab{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(peers),
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_PID_FILE": str(home / "rabbit.pid"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq"),
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "HOME": str(home),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(mapper),
        # Idle schedulers spin by default, which the tests' own processes would pay for.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
            "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +S 1:1"
        ),
    }
    command = [epmd, "-address", "127.0.0.1", "-port", str(mapper)]
    with server.running(command, ready=lambda: server.listens(mapper), log=home / "epmd.log"):
        rabbit = Rabbit(home, port, environment)
        rabbit.start()
        try:
            yield rabbit
        finally:
            rabbit.stop()
