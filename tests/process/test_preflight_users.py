# SPDX-License-Identifier: Apache-2.0
"""Preflight says before the first spawn that QEMU's user cannot reach what the cache makes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests.support import needs

#: Prints what preflight finds, as severities and texts.
PROGRAM = """
import json, sys
import imagecache_lib as ic
from imagecache_lib.testing.sources import FakeSource
manager = ic.ImageCacheManager(ic.CacheConfig(instances_path=sys.argv[1]), FakeSource({}))
print(json.dumps([[found.severity.name, found.text] for found in manager.preflight()]))
"""


@pytest.fixture
def instances() -> Iterator[pathlib.Path]:
    # Not below pytest's own directory, which is closed to others.
    with tempfile.TemporaryDirectory(prefix="imagecache-") as directory:
        path = pathlib.Path(directory).resolve() / "instances"
        path.mkdir(mode=0o755)
        yield path


def findings(instances: pathlib.Path, user: str) -> list[list[str]]:
    """Examine a host that has this user, whether or not this machine has it."""
    needs.root()
    accounts = instances.parent / "passwd"
    accounts.write_text(f"root:x:0:0::/:/bin/sh\n{user}:x:64055:64055::/:/usr/sbin/nologin\n")
    command: list[str | pathlib.Path] = [
        needs.program("unshare"), "--mount", "--propagation", "private", "--",
        "sh", "-c", 'mount --bind "$1" /etc/passwd && shift && exec "$@"', "sh", accounts,
        sys.executable, "-c", PROGRAM, instances,
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    found: list[list[str]] = json.loads(said.stdout)
    return found


@pytest.mark.parametrize("user", ["libvirt-qemu", "qemu"])
def test_a_directory_that_the_qemu_user_cannot_enter_is_a_finding(instances: pathlib.Path, user: str) -> None:
    closed = instances.parent
    closed.chmod(0o700)
    assert any(
        severity == "WARNING" and f"{closed} cannot be entered by {user}" in text
        for severity, text in findings(instances, user)
    )
    closed.chmod(0o711)
    assert not [text for _severity, text in findings(instances, user) if "cannot be entered" in text]


def test_a_base_that_the_qemu_user_cannot_read_is_a_finding(instances: pathlib.Path) -> None:
    instances.parent.chmod(0o711)
    base = instances / "_base" / ("0" * 40)
    base.parent.mkdir(mode=0o755)
    base.write_bytes(b"x")
    base.chmod(0o600)
    assert [text for _severity, text in findings(instances, "qemu") if "cannot be read" in text]
    base.chmod(0o644)
    assert not [text for _severity, text in findings(instances, "qemu") if "cannot be read" in text]
