# SPDX-License-Identifier: Apache-2.0
"""A real PostgreSQL on the loopback interface. It refuses to run as root, and gets a user of its own then."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import pwd
import signal
import subprocess
from collections.abc import Iterator, Sequence

from tests.lab import server
from tests.support import needs
from tests.support.ports import free_port

_USER = "postgres"


@dataclasses.dataclass
class PostgreSql:
    """A server that can be stopped and started again. What it keeps on disk stays.

    :param home: for all it writes.
    :param port: that it listens on.
    :param programs: the directory of its programs.
    """

    home: pathlib.Path
    port: int
    programs: pathlib.Path
    _running: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    @property
    def url(self) -> str:
        """The URL of its database, for SQLAlchemy."""
        return f"postgresql+psycopg://{_USER}@127.0.0.1:{self.port}/postgres"

    def install(self) -> None:
        """Make the directory of its data."""
        if os.geteuid() == 0:
            found = pwd.getpwnam(_USER)
            os.chown(self.home, found.pw_uid, found.pw_gid)
        subprocess.run(
            self._as_user(
                str(self.programs / "initdb"), "-D", str(self.home / "data"), "-U", _USER, "-A", "trust"
            ),
            check=True,
            capture_output=True,
        )

    def start(self) -> None:
        command = self._as_user(
            str(self.programs / "postgres"),
            "-D",
            str(self.home / "data"),
            "-p",
            str(self.port),
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            f"unix_socket_directories={self.home}",
        )
        self._running.enter_context(
            server.running(
                command,
                ready=self._answers,
                log=self.home / "server.log",
                seconds=240,
                # It does not wait for clients to go: one that is killed instead keeps its shared memory.
                stop=signal.SIGINT,
            )
        )

    def stop(self) -> None:
        self._running.close()

    def _answers(self) -> bool:
        asked = [str(self.programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(asked, check=False).returncode == 0

    def _as_user(self, *command: str) -> Sequence[str]:
        if os.geteuid() != 0:
            return command
        return [
            needs.program("setpriv"),
            f"--reuid={_USER}",
            f"--regid={_USER}",
            "--clear-groups",
            "--",
            *command,
        ]


@contextlib.contextmanager
def running_postgresql(home: pathlib.Path) -> Iterator[PostgreSql]:
    """Run a PostgreSQL for the length of the context.

    :param home: an existing, empty directory for all it writes, which its user may enter.
    """
    found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    programs = found[-1].parent if found else pathlib.Path(needs.program("postgres")).parent
    running = PostgreSql(home, free_port(), programs)
    running.install()
    running.start()
    try:
        yield running
    finally:
        running.stop()
