# SPDX-License-Identifier: Apache-2.0
"""The priority of a thread that has all the time in the world, for the processor and for the disk."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading

#: ioprio_set(2): its number by machine, "this thread", and the class that only gets an idle disk.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_THIS_THREAD = 1
_IDLE = 3 << 13
_NICE = 10
_libc = ctypes.CDLL(None, use_errno=True)


def be_modest() -> None:
    """Let this thread read only while no other one wants the disk, as far as that is possible."""
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        _libc.syscall(ctypes.c_long(number), _THIS_THREAD, 0, _IDLE)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
