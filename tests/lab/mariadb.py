# SPDX-License-Identifier: Apache-2.0
"""A real MariaDB on the loopback interface."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import subprocess
from collections.abc import Iterator

from tests.lab import server
from tests.support import needs
from tests.support.ports import free_port


@dataclasses.dataclass
class MariaDb:
    """A server that can be stopped and started again. What it keeps on disk stays.

    :param home: for all it writes.
    :param port: that it listens on.
    :param options: of the server, besides.
    """

    home: pathlib.Path
    port: int
    options: tuple[str, ...] = ()
    _running: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    @property
    def url(self) -> str:
        """The URL of its database ``jobs``, for SQLAlchemy."""
        return f"mysql+pymysql://jobs:jobs@127.0.0.1:{self.port}/jobs"

    def install(self) -> None:
        """Make the tables that it keeps its own affairs in, and the user and database of the tests."""
        start = self.home / "start.sql"
        start.write_text(
            "CREATE DATABASE IF NOT EXISTS jobs CHARACTER SET utf8mb4;\n"
            "CREATE USER IF NOT EXISTS jobs@'127.0.0.1' IDENTIFIED BY 'jobs';\n"
            "GRANT ALL ON jobs.* TO jobs@'127.0.0.1';\n"
        )
        made = subprocess.run(
            [
                needs.program("mariadb-install-db"),
                "--no-defaults",
                f"--datadir={self.home / 'data'}",
                f"--user={_user()}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            ],
            check=False,
            capture_output=True,
            text=True,
            # Its temporary tables have names that another one's have in the same directory.
            env={**os.environ, "TMPDIR": str(self.home)},
        )
        if made.returncode:
            raise server.StartError(
                f"mariadb-install-db ended with {made.returncode}\n{made.stdout}{made.stderr}"
            )

    def start(self) -> None:
        command = [
            needs.program("mariadbd"),
            "--no-defaults",
            f"--user={_user()}",
            f"--datadir={self.home / 'data'}",
            f"--socket={self.home / 'socket'}",
            f"--pid-file={self.home / 'pid'}",
            f"--init-file={self.home / 'start.sql'}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=16M",
            *self.options,
        ]
        self._running.enter_context(
            server.running(
                command,
                ready=lambda: server.listens(self.port),
                log=self.home / "server.log",
                seconds=240,
                environment={"TMPDIR": str(self.home)},
            )
        )

    def stop(self) -> None:
        self._running.close()


@contextlib.contextmanager
def running_mariadb(home: pathlib.Path) -> Iterator[MariaDb]:
    """Run a MariaDB for the length of the context.

    :param home: an existing, empty directory for all it writes.
    """
    found = MariaDb(home, free_port())
    found.install()
    found.start()
    try:
        yield found
    finally:
        found.stop()


def _user() -> str:
    return "root" if os.geteuid() == 0 else os.environ.get("USER", "")
