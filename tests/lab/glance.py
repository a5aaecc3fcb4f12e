# SPDX-License-Identifier: Apache-2.0
"""A real Glance behind uWSGI: sqlite, images in files; tenants by token, or by a real Keystone.

uWSGI's ``--http-socket`` closes a connection after its answer without saying so; a client that keeps it alive
finds it reset. That is how Glance runs in production too, so the tests meet it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import uuid
from collections.abc import Iterator
from typing import IO, Any

import requests

from tests.lab import bindings, environment, server
from tests.lab import keystone as keystone_lab
from tests.lab.ceph import Ceph
from tests.lab.keystone import Keystone
from tests.support.ports import free_port

HERE = pathlib.Path(__file__).parent
ADMIN = "admin:admin-project:admin"
#: An ordinary user; the images that tests make belong to this project unless they say otherwise.
MEMBER = "user:project:member"
#: A user of another project.
STRANGER = "stranger:elsewhere:member"

_TIMEOUT = 240

_CONFIGURATION = """
[DEFAULT]
log_file = {home}/glance-api.log
use_stderr = false
worker_self_reference_url = {url}
enabled_backends = disk:file,second:file,web:http{more}
hashing_algorithm = sha512
do_secure_hash = false
[database]
connection = sqlite:///{home}/glance.sqlite
[glance_store]
default_backend = disk
[disk]
filesystem_store_datadir = {home}/images
filesystem_store_chunk_size = 1048576
[second]
filesystem_store_datadir = {home}/second
[import_filtering_opts]
allowed_hosts = [127.0.0.1]
allowed_ports = []
[os_glance_staging_store]
filesystem_store_datadir = {home}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {home}/tasks
[oslo_concurrency]
lock_path = {home}/lock
[oslo_policy]
enforce_new_defaults = false
enforce_scope = false
[paste_deploy]
config_file = {home}/paste.ini
"""

_CEPH = """
[DEFAULT]
show_multiple_locations = true
[ceph]
rbd_store_ceph_conf = {conf}
rbd_store_pool = images
rbd_store_user = {user}
rados_connect_timeout = 10
"""

_PIPELINE = """
[composite:glance-api]
paste.composite_factory = glance.api:root_app_factory
/: api
/healthcheck: healthcheck
[pipeline:api]
pipeline = versionnegotiation {login} rootapp
[composite:rootapp]
paste.composite_factory = glance.api:root_app_factory
/: apiversions
/v2: apiv2app
[app:apiversions]
paste.app_factory = glance.api.versions:create_resource
[app:apiv2app]
paste.app_factory = glance.api.v2.router:API.factory
[app:healthcheck]
paste.app_factory = oslo_middleware:Healthcheck.app_factory
[filter:versionnegotiation]
paste.filter_factory = glance.api.middleware.version_negotiation:VersionNegotiationFilter.factory
[filter:lab-auth]
paste.filter_factory = lab_auth:LabAuth.factory
[filter:authtoken]
paste.filter_factory = keystonemiddleware.auth_token:filter_factory
delay_auth_decision = true
[filter:context]
paste.filter_factory = glance.api.middleware.context:ContextMiddleware.factory
"""

_KEYSTONE = """
[keystone_authtoken]
www_authenticate_uri = {url}
auth_url = {url}
auth_type = password
username = admin
password = {password}
project_name = admin
user_domain_id = default
project_domain_id = default
interface = public
"""


@dataclasses.dataclass(frozen=True)
class LoggedRequest:
    """One request as Glance received it.

    :param range: the Range header.
    :param token: the X-Auth-Token header.
    """

    method: str
    path: str
    range: str | None
    token: str | None


@dataclasses.dataclass(frozen=True)
class Glance:
    """A running Glance.

    :param url: its endpoint, without ``/v2``.
    :param home: its directory.
    """

    url: str
    home: pathlib.Path

    def call(
        self,
        method: str,
        path: str,
        *,
        token: str = MEMBER,
        body: bytes | IO[bytes] | None = None,
        json_body: object = None,
        headers: dict[str, str] | None = None,
    ) -> requests.Response:
        """Make one request of the v2 API, over a connection of its own, and read the answer whole."""
        return requests.request(
            method,
            f"{self.url}/v2{path}",
            data=body,
            json=json_body,
            headers={"X-Auth-Token": token, "Connection": "close", **(headers or {})},
            timeout=_TIMEOUT,
        )

    def create(
        self, *, disk_format: str = "raw", token: str = MEMBER, visibility: str = "private", **properties: Any
    ) -> str:
        """Create an image without data (status ``queued``) and return its id."""
        answer = self.call(
            "POST",
            "/images",
            token=token,
            json_body={
                "name": f"image-{uuid.uuid4().hex[:8]}",
                "disk_format": disk_format,
                "container_format": "bare",
                "visibility": visibility,
                **properties,
            },
        )
        answer.raise_for_status()
        return str(answer.json()["id"])

    def upload(
        self,
        data: bytes | pathlib.Path,
        *,
        disk_format: str = "raw",
        token: str = MEMBER,
        visibility: str = "private",
        store: str | None = None,
        **properties: Any,
    ) -> str:
        """Create an image with this data and return its id; it is ``active`` then.

        :param data: the bytes, or the file that has them.
        :param store: which of Glance's stores gets it, or None for the default.
        """
        image_id = self.create(disk_format=disk_format, token=token, visibility=visibility, **properties)
        with contextlib.ExitStack() as stack:
            body = data if isinstance(data, bytes) else stack.enter_context(data.open("rb"))
            answer = self.call(
                "PUT",
                f"/images/{image_id}/file",
                token=token,
                body=body,
                headers={
                    "Content-Type": "application/octet-stream",
                    **({"X-Image-Meta-Store": store} if store else {}),
                },
            )
        answer.raise_for_status()
        status = self.metadata(image_id, token=token)["status"]
        if status != "active":
            raise AssertionError(f"image {image_id} is {status} after its upload")
        return image_id

    def register(self, url: str, digest: str, *, token: str = MEMBER) -> str:
        """Create an image whose data lie on a web server and return its id, once it is ``active``.

        :param digest: its sha512 as the user states it: Glance does not read the data.
        """
        image_id = self.create(token=token)
        stated = {"os_hash_algo": "sha512", "os_hash_value": digest}
        answer = self.call(
            "POST",
            f"/images/{image_id}/locations",
            token=token,
            json_body={"url": url, "validation_data": stated},
        )
        if not answer.ok:
            raise AssertionError(f"the location is refused: {answer.text}")

        def done() -> bool:
            image = self.metadata(image_id, token=token)
            return image["status"] == "active" and "os_glance_import_task" not in image

        server.wait_until(done, "the location's task", seconds=_TIMEOUT)
        return image_id

    def metadata(self, image_id: str, *, token: str = MEMBER) -> dict[str, Any]:
        answer = self.call("GET", f"/images/{image_id}", token=token)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def delete(self, image_id: str, *, token: str = MEMBER) -> None:
        self.call("DELETE", f"/images/{image_id}", token=token).raise_for_status()

    def stored_file(self, image_id: str) -> pathlib.Path:
        """Return the file in which Glance keeps the data, for tests that damage it."""
        return self.home / "images" / image_id

    def requests(self) -> list[LoggedRequest]:
        """Return every request since the start, in the order of arrival."""
        lines = (self.home / "requests.log").read_text().splitlines()
        return [LoggedRequest(**json.loads(line)) for line in lines]

    def downloads(self, image_id: str) -> list[LoggedRequest]:
        """Return the requests for the image's data."""
        path = f"/v2/images/{image_id}/file"
        return [request for request in self.requests() if request.method == "GET" and request.path == path]


@contextlib.contextmanager
def running_glance(
    home: pathlib.Path, *, tells: bool = False, ceph: Ceph | None = None, keystone: Keystone | None = None
) -> Iterator[Glance]:
    """Run a Glance for the length of the context.

    :param home: an existing, empty directory for all it writes.
    :param tells: it says that it closes a connection: for clients of others, whose retries are not ours to
        test.
    :param ceph: a cluster for one more store, ``ceph``. What lies there is told with its location.
    :param keystone: who is asked what a token means. Without it the token says that itself, and requests are
        logged.
    """
    programs = environment.environment("glance", HERE / "glance-requirements.txt") / "bin"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    for name in ("images", "second", "staging", "tasks", "lock"):
        (home / name).mkdir()
    (home / "requests.log").touch()
    configuration = home / "glance-api.conf"
    store = _store_in(ceph, home / "bindings") if ceph else ""
    more = ",ceph:rbd" if ceph else ""
    identity = "" if keystone is None else _KEYSTONE.format(url=keystone.url, password=keystone_lab.PASSWORD)
    configuration.write_text(_CONFIGURATION.format(home=home, url=url, more=more) + store + identity)
    login = "lab-auth" if keystone is None else "authtoken context"
    (home / "paste.ini").write_text(_PIPELINE.format(login=login))
    with (home / "db_sync.log").open("wb") as log:
        subprocess.run(
            [programs / "glance-manage", "--config-file", configuration, "db_sync"],
            check=True,
            stdout=log,
            stderr=log,
        )

    def healthy() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{url}/healthcheck", timeout=_TIMEOUT).status_code == 200
        return False

    command = [
        str(programs / "uwsgi"),
        "--http-socket",
        f"127.0.0.1:{port}",
        "--module",
        "glance.wsgi.api:application",
        "--lazy-apps",
        "--enable-threads",
        "--master",
        "--processes",
        "1",
        "--threads",
        "8",
        "--die-on-term",
        "--http-chunked-input",
        "--buffer-size",
        "65535",
        "--wsgi-env-behavior",
        "holy",
        *(("--add-header", "Connection: close") if tells else ()),
    ]
    with server.running(
        command,
        ready=healthy,
        log=home / "uwsgi.log",
        directory=home,
        environment={
            "OS_GLANCE_CONFIG_DIR": str(home),
            "PYTHONPATH": os.pathsep.join(map(str, (HERE / "glance_plugin", home / "bindings"))),
            "LAB_REQUEST_LOG": str(home / "requests.log"),
        },
    ):
        yield Glance(url, home)


def _store_in(ceph: Ceph, modules: pathlib.Path) -> str:
    """Let Glance use a cluster, as a user of its own pool only; return what its configuration lacks.

    :param modules: a directory to be made for the Python modules that Glance needs for it.
    """
    modules.mkdir()
    for module in ("rados", "rbd"):
        bindings.link(modules, f"python3-{module}", [module])
    user = ceph.user("glance", mon="profile rbd", osd="profile rbd pool=images")
    return _CEPH.format(conf=ceph.conf, user=user)
