# SPDX-License-Identifier: Apache-2.0
"""The ``imagecache`` command as a process of its own that starts at once.

Loading what the command imports takes a processor half a second, and tests run a thousand commands. So one
process loads everything once, and forks a child for each command, with the file descriptors, environment and
working directory that its caller gives. What differs from a command that a shell starts is only what happens
before ``main``: some tests start it so.
"""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]

#: The most bytes of one message: mostly an environment.
_MOST = 2**18


class Commands:
    """Runs commands. One at a time: it is not thread-safe."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", __name__, str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )

    def close(self) -> None:
        self._socket.close()
        self._server.wait()

    def start(
        self,
        words: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: str | os.PathLike[str],
        stdout: int,
        stderr: int,
    ) -> int:
        """Start a command that reads nothing. Returns its process's id. Call :meth:`wait` before the next."""
        asked = {"words": list(words), "environment": dict(environment), "directory": os.fspath(directory)}
        socket.send_fds(self._socket, [json.dumps(asked).encode()], [stdout, stderr])
        return self._receive()

    def wait(self) -> int:
        """Return the exit code of the command that was started, negative for a signal, once it has ended."""
        return self._receive()

    def run(
        self, words: Sequence[str], *, environment: Mapping[str, str], directory: str | os.PathLike[str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            self.start(
                words,
                environment=environment,
                directory=directory,
                stdout=stdout.fileno(),
                stderr=stderr.fileno(),
            )
            code = self.wait()
            said = []
            for stream in (stdout, stderr):
                stream.seek(0)
                said.append(stream.read().decode(errors="replace"))
        return subprocess.CompletedProcess(list(words), code, *said)

    def _receive(self) -> int:
        message = self._socket.recv(_MOST)
        assert message, "the process that forks commands has died"
        return int(message)


@functools.cache
def commands() -> Commands:
    """Return what this process's tests share."""
    made = Commands()
    atexit.register(made.close)
    return made


# -- the process that forks them ---------------------------------------------------------------------


def _serve(asking: socket.socket) -> None:
    from imagecache_lib.cli import main

    sys.argv[0] = "imagecache"  # whose history it is
    for where in main.COMMANDS.values():
        __import__(f"imagecache_lib.cli.{where.partition(':')[0]}")
    import imagecache_lib.precache.precacher
    import imagecache_lib.precache.rpc  # noqa: F401

    while True:
        message, streams, _flags, _address = socket.recv_fds(asking, _MOST, 2)
        if not message:
            return
        child = os.fork()
        if child == 0:
            asking.close()
            _run(json.loads(message), *streams)
        for stream in streams:
            os.close(stream)
        asking.send(str(child).encode())
        _pid, status = os.waitpid(child, 0)
        asking.send(str(os.waitstatus_to_exitcode(status)).encode())


def _run(asked: dict[str, Any], stdout: int, stderr: int) -> None:
    from imagecache_lib.cli import main

    code = 1
    try:
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for stream in (stdout, stderr):
            os.close(stream)
        os.chdir(asked["directory"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.stdin = io.StringIO()
        sys.stdout = os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", buffering=1)
        code = main.main(asked["words"])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
