# SPDX-License-Identifier: Apache-2.0
"""A whole Nova of one host: API, scheduler, conductor, placement and nova-compute, over a real libvirt.

Around it are a real Glance, MariaDB and RabbitMQ. In the place of Keystone is a paste filter, in the place of
Neutron one that has no networks. Guests run without KVM, and have no network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import requests

import imagecache_lib
from tests.lab import bindings, environment, neutron, nova_programs, server
from tests.lab.glance import Glance
from tests.lab.libvirt import Libvirt
from tests.lab.mariadb import MariaDb
from tests.lab.rabbit import Rabbit
from tests.support import needs
from tests.support.ports import free_port

HERE = pathlib.Path(__file__).parent
CHECKOUT = pathlib.Path(imagecache_lib.__file__).parent.parent
#: The driver of the adapter, and Nova's own.
OURS = "imagecachelib.LibvirtDriver"
NOVAS = "libvirt.LibvirtDriver"
HOST = "lab-host"
ADDRESS = "127.0.0.1"
REGION = "lab"

#: How long a service may take to start.
SECONDS = 240.0

_CONFIGURATION = """
[DEFAULT]
host = {host}
my_ip = {address}
state_path = {home}/state
instances_path = {instances}
compute_driver = {driver}
transport_url = {rabbit}
log_dir = {home}/logs
debug = false
use_stderr = false
# It says when a service takes calls.
default_log_levels = nova.service=DEBUG
allow_resize_to_same_host = true
enable_new_services = true
reserved_host_memory_mb = 0
reserved_host_disk_mb = 0
cpu_allocation_ratio = 64
resume_guests_state_on_host_boot = false
shelved_offload_time = 0
# The guests of the tests do not hear that they are to shut down.
shutdown_timeout = 1
# Nothing is in flight when a service is ended.
manager_shutdown_timeout = 1
graceful_shutdown_timeout = 2
service_down_time = 300
# The periodic tasks begin with the service, and not at any time within its first minute.
periodic_fuzzy_delay = 0
concurrency_backend = threading
[placement]
auth_type = admin_token
endpoint = {placement}
token = admin
valid_interfaces = public
[neutron]
auth_type = admin_token
endpoint = {neutron}
endpoint_override = {neutron}
token = admin
[glance]
region_name = {region}
[oslo_concurrency]
lock_path = {home}/lock
[oslo_messaging_notifications]
driver = log
[notifications]
notification_format = versioned
[oslo_policy]
enforce_scope = false
[scheduler]
workers = 1
[conductor]
workers = 1
[quota]
instances = -1
cores = -1
ram = -1
[vnc]
enabled = false
[libvirt]
connection_uri = {libvirt}
virt_type = qemu
cpu_mode = none
images_type = qcow2
live_migration_inbound_addr = {address}
live_migration_uri = qemu+unix:///system?socket={home}/hosts/%s/libvirt/libvirt-sock
[nova_sys_admin]
helper_command = {programs}/privsep-helper --config-file {home}/nova.conf
[os_brick]
lock_path = {home}/lock
"""

# nova-compute has none of these: it reaches the database through the conductor.
_DATABASES = """
[api_database]
connection = {database}/nova_api
[database]
connection = {database}/nova
"""

_PASTE = """
[composite:osapi_compute]
use = call:nova.api.openstack.urlmap:urlmap_factory
/: versions
/v2.1: version
/v2.1/+: compute
[composite:compute]
use = call:nova.api.auth:pipeline_factory_v21
keystone = compute_req_id faultwrap request_log sizelimit identity context compute_app
[pipeline:versions]
pipeline = faultwrap versions_app
[pipeline:version]
pipeline = compute_req_id faultwrap version_app
[app:compute_app]
paste.app_factory = nova.api.openstack.compute:APIRouterV21.factory
[app:versions_app]
paste.app_factory = nova.api.openstack.compute.versions:Versions.factory
[app:version_app]
paste.app_factory = nova.api.openstack.compute.versions:VersionsV2.factory
[filter:request_log]
paste.filter_factory = nova.api.openstack.requestlog:RequestLog.factory
[filter:compute_req_id]
paste.filter_factory = nova.api.compute_req_id:ComputeReqIdMiddleware.factory
[filter:faultwrap]
paste.filter_factory = nova.api.openstack:FaultWrapper.factory
[filter:sizelimit]
paste.filter_factory = oslo_middleware:RequestBodySizeLimiter.factory
[filter:identity]
paste.filter_factory = lab_identity:LabIdentity.factory
[filter:context]
paste.filter_factory = nova.api.auth:NovaKeystoneContext.factory
"""

_PLACEMENT = """
[DEFAULT]
log_file = {home}/logs/placement.log
use_stderr = false
[api]
auth_strategy = noauth2
[placement_database]
connection = {database}/placement
sync_on_startup = true
[oslo_policy]
enforce_scope = false
"""


@dataclasses.dataclass
class NovaService:
    """A Nova that runs; its nova-compute can be stopped, and started with other options.

    :param url: of its API, with its version.
    :param home: for its configuration, logs and state.
    :param instances: ``instances_path``.
    :param glance: where its images are.
    :param variables: environment of its processes.
    :param programs: where its console scripts are.
    """

    url: str
    home: pathlib.Path
    instances: pathlib.Path
    glance: Glance
    variables: Mapping[str, str]
    programs: pathlib.Path
    _compute: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    _options: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    _starts: int = 0

    def have_compute(self, driver: str = OURS, **sections: Mapping[str, object]) -> None:
        """Have a nova-compute, and wait until it has reported itself. One with other options is ended.

        :param driver: ``compute_driver``.
        :param sections: of nova.conf, by name, with options that it is to have.
        """
        options = {"DEFAULT": {"compute_driver": driver}, **sections}
        if options != self._options:
            self.stop_compute()
            self._start_compute(options)
            self._options = options

    def _start_compute(self, options: Mapping[str, Mapping[str, object]]) -> None:
        self._starts += 1
        own = self.home / f"compute-{self._starts}.conf"
        own.write_text(
            "".join(
                f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
                for name, values in options.items()
            )
        )
        log = self.home / "logs/nova-compute.log"
        before = log.stat().st_size if log.exists() else 0
        command = [
            str(self.programs / "nova-compute"),
            *("--config-file", str(self.home / "nova.conf"), "--config-file", str(own)),
        ]

        def ready() -> bool:
            # It has looked after its guests, and takes calls.
            told = log.read_bytes()[before:].decode(errors="replace") if log.exists() else ""
            return "Join ServiceGroup" in told

        self._compute.enter_context(
            server.running(
                command,
                ready=ready,
                log=self.home / "logs/nova-compute.out",
                seconds=SECONDS,
                environment=self.variables,
            )
        )
        if self._starts == 1:
            self.discover_hosts()

    def discover_hosts(self) -> None:
        """Let the scheduler know new hosts, for which it would look in a minute."""
        configuration = [f"--config-file={self.home}/{name}.conf" for name in ("nova", "databases")]
        command = [str(self.programs / "nova-manage"), *configuration, "cell_v2", "discover_hosts"]
        _run(command, self.home, self.variables)

    def stop_compute(self) -> None:
        """End nova-compute. Its guests run on."""
        self._compute.close()

    def log(self, name: str = "nova-compute") -> str:
        return (self.home / f"logs/{name}.log").read_text(errors="replace")


@contextlib.contextmanager
def running_nova(
    home: pathlib.Path, *, libvirt: Libvirt, glance: Glance, rabbit: Rabbit, mariadb: MariaDb
) -> Iterator[NovaService]:
    """Run all of Nova but nova-compute for the length of the context.

    :param home: an existing, empty directory for all that it writes.
    :param libvirt: whose home has the instances, since QEMU's user reaches it.
    """
    found = environment.environment("nova-service", HERE / "nova-service-requirements.txt")
    programs = found / "bin"
    instances = libvirt.home / "instances"
    instances.mkdir()
    instances.chmod(0o755)
    for name in ("state", "lock", "logs", "bindings", "site", "bin", "hosts"):
        (home / name).mkdir()
    nova_programs.write(home / "bin", home / "hosts")
    _make_databases(mariadb)
    bindings.link(home / "bindings", "python3-libvirt", ["libvirt", "libvirtmod"])
    install(found, home / "site")
    ports = {name: free_port() for name in ("api", "placement")}
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(neutron.running_neutron())
        fields = {
            "home": home,
            "host": HOST,
            "address": ADDRESS,
            "instances": instances,
            "driver": OURS,
            "rabbit": rabbit.url,
            "database": mariadb.url.rpartition("/")[0],
            "placement": f"http://127.0.0.1:{ports['placement']}",
            "neutron": network,
            "libvirt": libvirt.uri,
            "programs": programs,
            "region": REGION,
        }
        (home / "nova.conf").write_text(_CONFIGURATION.format(**fields))
        (home / "databases.conf").write_text(_DATABASES.format(**fields))
        (home / "placement.conf").write_text(_PLACEMENT.format(**fields))
        (home / "api-paste.ini").write_text(_PASTE)
        (home / "catalog.json").write_text(
            json.dumps([_service("image", glance.url), _service("network", network)])
        )
        path = [home / "site", home / "bindings", HERE / "nova_plugin", CHECKOUT]
        variables = {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PATH": f"{home}/bin:{os.environ['PATH']}:/usr/sbin:/sbin",
            "OS_NOVA_CONFIG_DIR": str(home),
            "OS_NOVA_CONFIG_FILES": "api-paste.ini;nova.conf;databases.conf",
            "OS_PLACEMENT_CONFIG_DIR": str(home),
            "LAB_SERVICE_CATALOG": str(home / "catalog.json"),
        }
        _run(
            [
                programs / "python",
                HERE / "nova_plugin/lab_databases.py",
                home,
                f"{fields['database']}/nova_cell0",
            ],
            home,
            variables,
        )
        for name, port, module in (
            ("placement", ports["placement"], "placement.wsgi.api:application"),
            ("api", ports["api"], "nova.wsgi.osapi_compute:application"),
        ):
            stack.enter_context(_wsgi(home, programs, variables, name, port, module))
        for name in ("nova-conductor", "nova-scheduler"):
            log = home / f"logs/{name}.log"
            stack.enter_context(
                server.running(
                    [
                        str(programs / name),
                        *("--config-file", str(home / "nova.conf")),
                        *("--config-file", str(home / "databases.conf")),
                    ],
                    ready=functools.partial(_says, log, "Starting"),
                    log=home / f"logs/{name}.out",
                    seconds=SECONDS,
                    environment=variables,
                )
            )
        url = f"http://127.0.0.1:{ports['api']}/v2.1"
        running = NovaService(url, home, instances, glance, variables, programs)
        stack.callback(running.stop_compute)
        yield running


def install(where: pathlib.Path, site: pathlib.Path) -> None:
    """Make a package ``nova`` with the adapter in it, as pip makes it in a virtualenv of its own.

    :param where: the virtualenv that has Nova, and stays without the adapter.
    :param site: an existing, empty directory.
    """
    (package,) = where.glob("lib/python3*/site-packages/nova")
    shutil.copytree(
        package,
        site / "nova",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("tests"),
    )
    environment.describe_library(site)
    adapter = "nova/virt/imagecachelib"
    shutil.copytree(CHECKOUT / "integrations/nova" / adapter, site / adapter)


def _says(log: pathlib.Path, text: str) -> bool:
    """Return whether a log has a text by now."""
    return log.exists() and text in log.read_text(errors="replace")


def _make_databases(mariadb: MariaDb) -> None:
    names = ("nova", "nova_api", "nova_cell0", "placement")
    statements = "".join(
        f"CREATE DATABASE {name} CHARACTER SET utf8mb4; GRANT ALL ON {name}.* TO jobs@'127.0.0.1';"
        for name in names
    )
    client = [needs.program("mariadb"), "--no-defaults", "--user=root", f"--socket={mariadb.home}/socket"]
    subprocess.run([*client, "--execute", statements], check=True)


def _service(kind: str, url: str) -> dict[str, Any]:
    """Return an entry of a service catalogue."""
    endpoint = {"region": REGION, "publicURL": url, "internalURL": url, "adminURL": url}
    return {"type": kind, "name": kind, "endpoints": [endpoint]}


def _run(command: Sequence[str | pathlib.Path], home: pathlib.Path, variables: Mapping[str, str]) -> None:
    done = subprocess.run(
        command,
        env={**os.environ, **variables},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def _wsgi(
    home: pathlib.Path,
    programs: pathlib.Path,
    variables: Mapping[str, str],
    name: str,
    port: int,
    module: str,
) -> Iterator[None]:
    def answers() -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"http://127.0.0.1:{port}/", timeout=60).status_code < 400
        return False

    command = [
        str(programs / "uwsgi"),
        *("--http-socket", f"127.0.0.1:{port}", "--module", module),
        *("--lazy-apps", "--enable-threads", "--master", "--processes", "1", "--threads", "4"),
        *("--die-on-term", "--buffer-size", "65535", "--need-app", "--wsgi-env-behavior", "holy"),
        # It closes each connection after its answer, and clients that are not told find theirs reset.
        *("--add-header", "Connection: close"),
    ]
    with server.running(
        command,
        ready=answers,
        log=home / f"logs/{name}.out",
        seconds=SECONDS,
        environment=variables,
        directory=home,
    ):
        yield
