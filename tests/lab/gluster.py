# SPDX-License-Identifier: Apache-2.0
"""A real network filesystem: one GlusterFS brick on this machine, mounted twice, as two hosts would."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator

from tests.lab import server
from tests.support import needs
from tests.support.ports import free_port

#: Without its management daemon, which refuses loopback addresses: the brick and the clients read these.
_BRICK = """
volume posix
  type storage/posix
  option directory {brick}
end-volume
volume locks
  type features/locks
  subvolumes posix
end-volume
volume brick
  type performance/io-threads
  subvolumes locks
end-volume
volume server
  type protocol/server
  option transport-type tcp
  option transport.socket.bind-address 127.0.0.1
  option transport.socket.listen-port {port}
  option auth.addr.brick.allow 127.0.0.1
  subvolumes brick
end-volume
"""

_CLIENT = """
volume client
  type protocol/client
  option transport-type tcp
  option remote-host 127.0.0.1
  option remote-port {port}
  option remote-subvolume brick
end-volume
volume write-behind
  type performance/write-behind
  subvolumes client
end-volume
"""


@contextlib.contextmanager
def mounted_twice(home: pathlib.Path) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Run a brick, and yield its two mount points. Attributes are cached for a second, as by default.

    :param home: an existing, empty directory for all it writes.
    """
    needs.root()
    port, brick = free_port(), home / "brick"
    brick.mkdir()
    (home / "brick.vol").write_text(_BRICK.format(brick=brick, port=port))
    (home / "client.vol").write_text(_CLIENT.format(port=port))
    mounts = home / "one", home / "two"
    command = [
        needs.program("glusterfsd"),
        "-N",
        "-f",
        str(home / "brick.vol"),
        "-l",
        str(home / "brick.log"),
    ]
    with contextlib.ExitStack() as stack:
        log = home / "output.log"
        stack.enter_context(server.running(command, ready=lambda: server.listens(port), log=log))
        for mount in mounts:
            stack.enter_context(_mounted(mount, home))
        yield mounts


@contextlib.contextmanager
def _mounted(mount: pathlib.Path, home: pathlib.Path) -> Iterator[None]:
    mount.mkdir()
    client = needs.program("glusterfs")
    command = [client, "-N", "-f", str(home / "client.vol"), "-l", f"{mount}.log", str(mount)]
    with server.running(command, ready=lambda: os.path.ismount(mount), log=home / "output.log"):
        try:
            yield
        finally:
            subprocess.run([needs.program("umount"), mount], check=True)
