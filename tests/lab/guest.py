# SPDX-License-Identifier: Apache-2.0
"""Boot a disk in QEMU, without KVM, and hear what its serial console says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from tests.support import needs


def boot(command: Sequence[str], *, seconds: float = 240.0) -> str:
    """Run QEMU until the guest resets or powers off, and return what it printed on the serial console.

    :param command: QEMU's command line, with ``-no-reboot`` and ``-serial stdio``.
    :raises AssertionError: QEMU failed, with what it said.
    :raises subprocess.TimeoutExpired: the guest did not end in time.
    """
    needs.program(os.fspath(command[0]))
    finished = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    if finished.returncode:
        raise AssertionError(f"{command[0]} exited {finished.returncode}: {finished.stderr}")
    return finished.stdout
