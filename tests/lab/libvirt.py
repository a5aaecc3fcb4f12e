# SPDX-License-Identifier: Apache-2.0
"""A real libvirtd on a private socket, whose domains run without KVM.

Starting a domain, libvirt gives its disk *and the backing files* to the user that QEMU runs as, and does not
give the backing files back: what a cache must bear.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from xml.sax import saxutils

from tests.lab import server
from tests.support import needs

_RUNTIME = "/run/libvirt"
#: Where definitions of domains are kept.
_DEFINITIONS = "/etc/libvirt/qemu"
#: Where QEMU's sockets are.
_STATE = "/var/lib/libvirt/qemu"

_CONFIGURATION = """
listen_tls = 0
listen_tcp = 0
auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_rw_perms = "0777"
unix_sock_dir = "{sockets}"
host_uuid = "{host}"
"""

# Consoles need no virtlogd, and QEMU no mount namespace of its own within ours.
_QEMU_CONFIGURATION = """
stdio_handler = "file"
namespaces = []
"""

_DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <on_reboot>destroy</on_reboot>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{disk_format}' cache='none'/>
      <source file='{disk}'/>
      <target dev='hda' bus='ide'/>
    </disk>
    <serial type='file'><source path='{serial}'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""


@dataclasses.dataclass(frozen=True)
class Libvirt:
    """A running libvirtd.

    :param uri: what clients connect to.
    :param home: a directory that QEMU's user can reach, for disks.
    :param pid: of the process whose mount namespace is its own.
    """

    uri: str
    home: pathlib.Path
    pid: int = 0

    def virsh(self, *arguments: str) -> str:
        """Run a virsh command and return what it printed.

        :raises AssertionError: it failed, with what it said.
        """
        finished = subprocess.run(
            [needs.program("virsh"), "--quiet", "--connect", self.uri, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if finished.returncode:
            raise AssertionError(f"virsh {' '.join(arguments)}: {finished.stderr.strip()}")
        return finished.stdout.strip()

    @contextlib.contextmanager
    def domain(self, name: str, disk: pathlib.Path, disk_format: str) -> Iterator[pathlib.Path]:
        """Run a transient domain for the length of the context; yield the file its serial console goes to.

        A guest that reboots ends its domain.
        """
        serial, definition = self.home / f"{name}.serial", self.home / f"{name}.xml"
        fields = {"name": name, "disk": str(disk), "disk_format": disk_format, "serial": str(serial)}
        definition.write_text(
            _DOMAIN.format(**{key: saxutils.escape(value) for key, value in fields.items()})
        )
        self.virsh("create", str(definition))
        try:
            yield serial
        finally:
            try:
                self.virsh("destroy", name)
            except AssertionError:
                # The guest may have ended it, even while libvirt was asked to.
                if name in self.virsh("list", "--name").splitlines():
                    raise


@contextlib.contextmanager
def running_libvirt(
    home: pathlib.Path, *, name: str | None = None, covers: Mapping[pathlib.Path, pathlib.Path] | None = None
) -> Iterator[Libvirt]:
    """Run a libvirtd for the length of the context.

    :param home: an existing, empty directory that every user can reach, by a short path: a socket's has at
        most 107 bytes.
    :param name: of the host that it takes this machine for, so that two of them can be two hosts.
    :param covers: directories that this host has where the machine has others: what it sees, by path.
    """
    needs.root()
    configuration = home / "libvirtd.conf"
    configuration.write_text(_CONFIGURATION.format(sockets=home, host=uuid.uuid4()))
    running = Libvirt(f"qemu+unix:///system?socket={home}/libvirt-sock", home)

    def answers() -> bool:
        if not (home / "libvirt-sock").is_socket():
            return False
        with contextlib.suppress(AssertionError):
            return bool(running.virsh("version"))
        return False

    options = ["--config", str(configuration), "--pid-file", str(home / "libvirtd.pid")]
    command = [*_namespace(home, name, covers or {}), needs.program("libvirtd"), *options]
    with _shared(home), server.running(command, ready=answers, log=home / "libvirtd.log") as pid:
        yield dataclasses.replace(running, pid=pid)


@contextlib.contextmanager
def _shared(home: pathlib.Path) -> Iterator[None]:
    """Let filesystems that are mounted below ``home`` later reach libvirtd's namespace too."""
    subprocess.run([needs.program("mount"), "--bind", "--make-shared", home, home], check=True)
    try:
        yield
    finally:
        # Whatever a guest that did not end has open there.
        subprocess.run([needs.program("umount"), "--lazy", home], check=True)


def _namespace(home: pathlib.Path, name: str | None, more: Mapping[pathlib.Path, pathlib.Path]) -> list[str]:
    """Return what to run libvirtd under: a mount namespace with settings of our own and no KVM.

    The drivers' settings are read from a compiled-in path. And a /dev/kvm that root may use and QEMU's user
    may not makes libvirt ask QEMU for its abilities again, for four seconds, whenever it looks at them.
    """
    state = home / "qemu"
    state.mkdir()
    state.chmod(0o755)
    shutil.chown(state, "libvirt-qemu")
    covers = {"/etc/libvirt/qemu.conf": home / "qemu.conf", _STATE: state}
    covers |= {str(path): seen for path, seen in more.items()}
    covers["/etc/libvirt/qemu.conf"].write_text(_QEMU_CONFIGURATION)
    if pathlib.Path("/dev/kvm").exists():
        covers["/dev/kvm"] = home / "no-kvm"
        covers["/dev/kvm"].touch(mode=0o600)
    # A second libvirtd, the system's own, has its pid files and its domains there.
    private = (
        f"mkdir -p {path} && mount -t tmpfs -o mode=755 libvirt {path}" for path in (_RUNTIME, _DEFINITIONS)
    )
    mounts = " && ".join([*private, *(f"mount --bind {cover} {path}" for path, cover in covers.items())])
    if name is not None:
        mounts = f"{mounts} && echo {name} >/proc/sys/kernel/hostname"
    unshare = [needs.program("unshare"), "--mount", "--uts", "--propagation", "slave"]
    return [*unshare, needs.program("sh"), "-c", f'{mounts} && exec "$@"', "sh"]
