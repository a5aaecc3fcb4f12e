# SPDX-License-Identifier: Apache-2.0
"""A real systemd that applies a unit's restrictions to its command, as process 1 of namespaces of its own.

It is given a directory of units and nothing else of the machine's, and a cgroup of its own. It ends with the
unit that it was started for, and everything in it ends with it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

import pytest

from tests.support import needs

_SYSTEMD = "/lib/systemd/systemd"
#: A name and a number that no machine has.
USER, UID = "nova", 64123
_ACCOUNT = f"{USER}:x:{UID}:{UID}::/var/lib/nova:/usr/sbin/nologin\n"
_GROUP = f"{USER}:x:{UID}:\n"

#: Who calls it has moved into a cgroup that is to be systemd's root. The interpreter may be in root's home.
_PREPARE = """
set -e
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/group" /etc/group
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
interpreter=$2 checkout=$3
for each in "$interpreter" "$checkout"; do mkdir -p "$1/kept$each"; mount --bind "$each" "$1/kept$each"; done
mount -t tmpfs -o mode=755 tmpfs /root
for each in "$interpreter" "$checkout"; do
    mkdir -p "$each"
    mount --bind "$1/kept$each" "$each"
done
mount -t tmpfs -o mode=755 tmpfs /var/lib
mkdir -p /var/lib/nova/instances
mount --bind "$1/instances" /var/lib/nova/instances
mount -t cgroup2 cgroup2 /sys/fs/cgroup
shift 3
exec env -i PATH="$PATH" container=other "$@"
"""


def run_unit(name: str, units: Mapping[str, str], *, home: pathlib.Path, seconds: float = 300) -> str:
    """Run a unit of ``Type=oneshot`` to its end, and return what it said.

    :param units: their texts by name. The named one is wanted; drop-ins are ``NAME.d/FILE.conf``.
    :param home: a directory that everybody may enter; its ``instances`` is seen as the service's own.
    :raises AssertionError: the unit failed, with what it and systemd said.
    """
    needs.root()
    if not os.path.exists(_SYSTEMD):
        needs.lack("systemd is not installed")
    directory = home / "units"
    output = home / "said"
    output.unlink(missing_ok=True)
    own = "[Unit]\nDefaultDependencies=no\nSuccessAction=exit-force\nFailureAction=exit-force\n"
    own += f"[Service]\nStandardOutput=append:{output}\nStandardError=append:{output}\n"
    goal = f"[Unit]\nDefaultDependencies=no\nWants={name}\n"
    for file, text in {**units, f"{name}.d/lab.conf": own, "lab.target": goal}.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text(text)
    for file, line in (("passwd", _ACCOUNT), ("group", _GROUP)):
        (home / file).write_text(pathlib.Path("/etc", file).read_text() + line)
    words = [f"SYSTEMD_UNIT_PATH={directory}", _SYSTEMD, "--system", "--unit=lab.target"]
    words += ["--log-target=console", "--log-level=info", "--show-status=0"]
    with _cgroup() as enter:
        finished = subprocess.run(
            [
                "sh",
                "-c",
                enter,
                "sh",
                *_namespaces(),
                "bash",
                "-c",
                _PREPARE,
                "bash",
                home,
                *_needed(),
                *words,
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    said = output.read_text() if output.exists() else ""
    assert finished.returncode == 0, (
        f"{name}: {finished.returncode}\n{said}\n{finished.stdout}\n{finished.stderr}"
    )
    return said


def _needed() -> tuple[str, str]:
    return sys.base_prefix, str(pathlib.Path(__file__).parents[2])


def _namespaces() -> list[str]:
    made = ["--mount", "--propagation", "private", "--pid", "--ipc", "--uts", "--cgroup", "--fork"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *made, "--kill-child=KILL"]


@contextlib.contextmanager
def _cgroup() -> Iterator[str]:
    """Make a cgroup for the length of the context; yield a script that enters it and runs its arguments."""
    mounts = [line.split() for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]
    found = [fields[4] for fields in mounts if fields[fields.index("-") + 1] == "cgroup2"]
    if not found:
        needs.lack("there is no cgroup2 filesystem")
    own = tempfile.mkdtemp(prefix="imagecache-lab-", dir=found[0])
    try:
        yield f'echo $$ > {own}/cgroup.procs && exec "$@"'
    finally:
        for directory, _names, _files in os.walk(own, topdown=False):
            os.rmdir(directory)


@pytest.fixture
def host() -> Iterator[pathlib.Path]:
    """A directory for :func:`run_unit`, outside of those that only their user may enter."""
    with tempfile.TemporaryDirectory(prefix="imagecache-", dir="/var/tmp") as name:
        home = pathlib.Path(name)
        home.chmod(0o755)
        (home / "instances").mkdir()
        os.chown(home / "instances", UID, UID)
        yield home
