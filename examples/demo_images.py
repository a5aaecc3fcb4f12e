# SPDX-License-Identifier: Apache-2.0
"""Images for the demonstration, and the web server that has them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from demo_console import ClaimFailed

import imagecache_lib as ic
from imagecache_lib.testing import bootdisk

MIB = 2**20
RATE = 64 * MIB  # bytes a second that the server sends

_NGINX = """
daemon off; pid {home}/nginx.pid; error_log {home}/nginx.log; user {user};
events {{}}
http {{
    log_format demo '$request_method $uri $status $body_bytes_sent';
    access_log {log} demo;
    client_body_temp_path {home}/nginx-body; proxy_temp_path {home}/nginx-proxy;
    fastcgi_temp_path {home}/nginx-fastcgi; uwsgi_temp_path {home}/nginx-uwsgi;
    scgi_temp_path {home}/nginx-scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; limit_rate {rate}; }}
}}
"""


def make_image(path: pathlib.Path, data_size: int, virtual_size: int) -> ic.Digest:
    """Write a qcow2 that boots and holds so much of this system's own files. Returns its digest."""
    raw = path.with_suffix(".raw")
    bootdisk.write_boot_disk(str(raw), virtual_size // MIB)
    left = data_size
    with raw.open("r+b") as disk:
        disk.seek(MIB)
        for directory, _names, files in os.walk("/usr/lib"):
            for name in sorted(files):
                file = pathlib.Path(directory, name)
                with contextlib.suppress(OSError):
                    if left and file.is_file() and not file.is_symlink():
                        left -= disk.write(file.read_bytes()[:left])
        disk.write(os.urandom(left))  # on a system that has less of them
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))
    raw.unlink()
    with path.open("rb") as image:
        return ic.Digest("sha512", hashlib.file_digest(image, "sha512").hexdigest())


def run(*command: str) -> str:
    """Run a command and return its output."""
    return subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ).stdout


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a disk or an image measures, in bytes: of the guest's disk, of the file, and on the filesystem."""

    virtual: int
    apparent: int
    allocated: int


def sizes(path: pathlib.Path, format: str) -> Sizes:
    """Ask qemu-img and the filesystem."""
    # The outermost object's: newer QEMUs also describe the file below the format, by its own sizes.
    told = json.loads(run("qemu-img", "info", "-U", "--output=json", "-f", format, str(path)))
    return Sizes(int(told["virtual-size"]), path.stat().st_size, allocated(path))


def allocated(path: pathlib.Path) -> int:
    """Return what a file takes on its filesystem, in bytes."""
    return path.stat().st_blocks * 512


@dataclasses.dataclass(frozen=True)
class Server:
    """A running web server."""

    name: str
    url: str
    log: pathlib.Path

    def downloads(self, file: str) -> int:
        """Return how often it sent a file, by its own log."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return sum(line[:2] == ["GET", f"/{file}"] for line in lines)


@contextlib.contextmanager
def serving(home: pathlib.Path, root: pathlib.Path, name: str) -> Iterator[Server]:
    """Run nginx, or the small server beside this file, for the length of the context."""
    log = home / "access.log"
    log.touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if name == "nginx":
        command = nginx_command(home, root, port, log)
    else:
        program = pathlib.Path(__file__).with_name("range_server.py")
        command = [sys.executable, str(program), str(root), str(port), str(RATE), str(log)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 10
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise ClaimFailed(f"{name} does not start: {' '.join(command)}")
                time.sleep(0.02)
            yield Server(name, f"http://127.0.0.1:{port}", log)
        finally:
            process.terminate()


def nginx_command(home: pathlib.Path, root: pathlib.Path, port: int, log: pathlib.Path) -> list[str]:
    """Write nginx's configuration and return its command."""
    configuration = home / "nginx.conf"
    user = f"{home.owner()} {home.group()}"
    configuration.write_text(_NGINX.format(home=home, user=user, log=log, port=port, root=root, rate=RATE))
    return [nginx_program() or "nginx", "-e", str(home / "nginx.log"), "-c", str(configuration)]


def nginx_program() -> str | None:
    """Return nginx's path, which Debian keeps in sbin. None: it is not installed."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
