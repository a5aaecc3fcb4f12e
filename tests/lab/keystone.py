# SPDX-License-Identifier: Apache-2.0
"""A real Keystone behind uWSGI: sqlite, Fernet tokens, one region, an administrator."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import os
import pathlib
import sqlite3
import subprocess
from collections.abc import Iterator
from typing import Any

import requests

from tests.lab import environment, server
from tests.support.ports import free_port

HERE = pathlib.Path(__file__).parent
PASSWORD = "an-administrator-s-secret"
REGION = "lab"
_TIMEOUT = 60

_CONFIGURATION = """
[DEFAULT]
log_file = {home}/keystone.log
use_stderr = false
[database]
connection = sqlite:///{home}/keystone.sqlite
[fernet_tokens]
key_repository = {home}/fernet
[credential]
key_repository = {home}/credential
[fernet_receipts]
key_repository = {home}/receipts
[identity]
# The least that bcrypt takes: these passwords keep nobody out.
password_hash_rounds = 4
[oslo_concurrency]
lock_path = {home}/lock
"""


@dataclasses.dataclass(frozen=True)
class Keystone:
    """A running Keystone.

    :param url: of its API, with the version.
    :param token: the administrator's, of the project ``admin``.
    """

    url: str
    token: str

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Make one request as the administrator, and return what it answers."""
        answer = requests.request(
            method,
            f"{self.url}{path}",
            json=body,
            headers={"X-Auth-Token": self.token, "Connection": "close"},
            timeout=_TIMEOUT,
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json() if answer.content else {}
        return found

    def add_service(self, kind: str, url: str) -> None:
        """Put a service into the catalog, with a public endpoint."""
        service = self.call("POST", "/services", {"service": {"type": kind, "name": f"lab-{kind}"}})
        endpoint = {"service_id": service["service"]["id"], "interface": "public", "url": url}
        self.call("POST", "/endpoints", {"endpoint": {**endpoint, "region_id": REGION}})

    def add_user(self, name: str, password: str, *, project: str, role: str = "member") -> str:
        """Make a project and a user of it, both in the domain ``default``. Returns the project's id."""
        made = self.call("POST", "/projects", {"project": {"name": project, "domain_id": "default"}})
        user = {"name": name, "password": password, "domain_id": "default"}
        user_id = self.call("POST", "/users", {"user": user})["user"]["id"]
        (found,) = self.call("GET", f"/roles?name={role}")["roles"]
        project_id = str(made["project"]["id"])
        self.call("PUT", f"/projects/{project_id}/users/{user_id}/roles/{found['id']}")
        return project_id


@contextlib.contextmanager
def running_keystone(home: pathlib.Path) -> Iterator[Keystone]:
    """Run a Keystone for the length of the context.

    :param home: an existing, empty directory for all it writes.
    """
    programs = environment.environment("keystone", HERE / "keystone-requirements.txt") / "bin"
    port = free_port()
    url = f"http://127.0.0.1:{port}/v3"
    (home / "lock").mkdir()
    for name in ("fernet", "credential", "receipts"):
        # What keystone-manage fernet_setup and its like make, in less time.
        (home / name).mkdir(mode=0o700)
        (home / name / "0").write_bytes(base64.urlsafe_b64encode(os.urandom(32)))
    with contextlib.closing(sqlite3.connect(home / "keystone.sqlite")) as database:
        # A reader that is not done, such as another thread's last request, would hold up a commit.
        database.execute("PRAGMA journal_mode=WAL")
    configuration = home / "keystone.conf"
    configuration.write_text(_CONFIGURATION.format(home=home))
    bootstrap = ["--bootstrap-password", PASSWORD, "--bootstrap-region-id", REGION]
    bootstrap += ["--bootstrap-public-url", url]
    with (home / "keystone-manage.log").open("wb") as log:
        for command in (["db_sync"], ["bootstrap", *bootstrap]):
            subprocess.run(
                [programs / "keystone-manage", "--config-file", configuration, *command],
                check=True,
                stdout=log,
                stderr=log,
            )

    def answers() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(url, timeout=_TIMEOUT).status_code == 200
        return False

    command = [
        str(programs / "uwsgi"),
        "--http-socket",
        f"127.0.0.1:{port}",
        "--module",
        "keystone.wsgi.api:application",
        "--lazy-apps",
        "--enable-threads",
        "--master",
        "--processes",
        "1",
        "--threads",
        "4",
        "--die-on-term",
        "--buffer-size",
        "65535",
        "--add-header",
        "Connection: close",
    ]
    with server.running(
        command,
        ready=answers,
        log=home / "uwsgi.log",
        directory=home,
        environment={"OS_KEYSTONE_CONFIG_DIR": str(home)},
    ):
        yield Keystone(url, login(url, "admin", PASSWORD, project="admin"))


def login(url: str, name: str, password: str, *, project: str) -> str:
    """Return a token of a user, for a project, both of the domain ``default``."""
    user = {"name": name, "password": password, "domain": {"id": "default"}}
    identity = {"methods": ["password"], "password": {"user": user}}
    scope = {"project": {"name": project, "domain": {"id": "default"}}}
    answer = requests.post(
        f"{url}/auth/tokens", json={"auth": {"identity": identity, "scope": scope}}, timeout=_TIMEOUT
    )
    answer.raise_for_status()
    return str(answer.headers["X-Subject-Token"])
