# SPDX-License-Identifier: Apache-2.0
"""A second compute host on one machine: a libvirtd and a nova-compute that see directories of their own.

Nova's hosts have their instances at the same path. Here the second host's processes are in a mount namespace
in which that path shows another directory, and what Nova asks another host by ssh is done in its namespace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator

from tests.lab import libvirt as libvirt_lab
from tests.lab import nova_service, server
from tests.support import needs

NAME = "second-host"
_ADDRESS = "127.0.0.2"


@dataclasses.dataclass(frozen=True)
class SecondHost:
    """The second host.

    :param instances: what lies at ``instances_path`` there.
    :param libvirt: its libvirtd.
    """

    instances: pathlib.Path
    libvirt: libvirt_lab.Libvirt
    _compute: contextlib.ExitStack

    def fail(self) -> None:
        """End its nova-compute, and its guests as a power cut ends them."""
        self._compute.close()
        for name in self.libvirt.virsh("list", "--name").split():
            self.libvirt.virsh("destroy", name)


@contextlib.contextmanager
def second_host(
    nova: nova_service.NovaService, first: libvirt_lab.Libvirt, home: pathlib.Path
) -> Iterator[SecondHost]:
    """Run a second compute host for the length of the context.

    :param first: the first host's libvirtd.
    :param home: an existing, empty directory that every user can reach.
    """
    instances, state = home / "instances", home / "state"
    for path in (instances, state):
        path.mkdir()
        path.chmod(0o755)
    covers = {nova.instances: instances}
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as compute:
        libvirt = stack.enter_context(libvirt_lab.running_libvirt(home, name=NAME, covers=covers))
        hosts = nova.home / "hosts"
        for names, found, process in (
            ((nova_service.HOST, nova_service.ADDRESS), first, os.getpid()),
            ((NAME, _ADDRESS), libvirt, libvirt.pid),
        ):
            for name in names:
                (hosts / name).mkdir()
                (hosts / name / "process").write_text(str(process))
                (hosts / name / "libvirt").symlink_to(found.home)
                stack.callback(shutil.rmtree, hosts / name)
        running = SecondHost(instances, libvirt, compute)
        compute.enter_context(_nova_compute(nova, libvirt, home))
        yield running


@contextlib.contextmanager
def _nova_compute(
    nova: nova_service.NovaService, libvirt: libvirt_lab.Libvirt, home: pathlib.Path
) -> Iterator[None]:
    own = home / "nova.conf"
    own.write_text(
        f"[DEFAULT]\nhost = {NAME}\nmy_ip = {_ADDRESS}\nstate_path = {home}/state\nlog_dir = {home}\n"
        f"[oslo_concurrency]\nlock_path = {home}/state/lock\n[os_brick]\nlock_path = {home}/state/lock\n"
        f"[libvirt]\nconnection_uri = {libvirt.uri}\nlive_migration_inbound_addr = {_ADDRESS}\n"
    )
    log = home / "nova-compute.log"
    files = [f"--config-file={path}" for path in (nova.home / "nova.conf", own)]
    inside = [needs.program("nsenter"), "--mount", "--target", str(libvirt.pid)]
    with server.running(
        [*inside, str(nova.programs / "nova-compute"), *files],
        ready=lambda: log.exists() and "Join ServiceGroup" in log.read_text(errors="replace"),
        log=home / "nova-compute.out",
        seconds=nova_service.SECONDS,
        environment=nova.variables,
    ):
        nova.discover_hosts()
        yield
