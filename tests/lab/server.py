# SPDX-License-Identifier: Apache-2.0
"""Start a server process, wait until it answers, end it by its pid."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.support import needs

_POLL_SECONDS = 0.02
_STOP_SECONDS = 20.0


class StartError(Exception):
    """A server ended, or did not answer in time; its log is in the message."""


def listens(port: int) -> bool:
    """Whether something accepts connections on that loopback port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def wait_until(
    condition: Callable[[], bool], what: str, *, seconds: float, every: float = _POLL_SECONDS
) -> None:
    """Ask until it holds.

    :param every: seconds between two times, since an answer may cost as much as what is waited for.
    :raises TimeoutError: it did not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)


@contextlib.contextmanager
def running(
    command: Sequence[str],
    *,
    ready: Callable[[], bool],
    log: pathlib.Path,
    seconds: float = 240.0,
    environment: Mapping[str, str] | None = None,
    directory: pathlib.Path | None = None,
    stop: signal.Signals = signal.SIGTERM,
) -> Iterator[int]:
    """Run a server for the length of the context; yield its pid.

    It gets a session of its own, so that its workers end with it, and ends when this process does, however
    that comes about.

    :param ready: asked until it says that the server answers.
    :param log: receives what it prints.
    :param seconds: how long it may take to become ready.
    :param stop: the signal that ends it.
    :raises StartError: it ended or did not become ready.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [needs.program("setpriv"), "--pdeathsig", "TERM", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        try:
            wait_until(lambda: process.poll() is not None or ready(), command[0], seconds=seconds)
        except TimeoutError as error:
            raise StartError(f"{error}\n{_end_of(log)}") from None
        if process.poll() is not None:
            raise StartError(f"{command[0]} ended with {process.returncode}\n{_end_of(log)}")
        yield process.pid
    finally:
        _stop(process, stop)


def _stop(process: subprocess.Popen[bytes], told: signal.Signals) -> None:
    process.send_signal(told)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Workers that outlived it, in the session that began with it and nobody else joined.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end_of(log: pathlib.Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
