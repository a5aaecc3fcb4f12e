# SPDX-License-Identifier: Apache-2.0
"""Descriptors that are open as an interrupt comes."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal

import pytest

from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.locks import HeldDescriptor
from tests.support import leftovers

#: Seconds between two interrupts: a few times of what one opening and closing takes.
_PERIOD = 0.0001

_INTERRUPTS = 500


class _Interrupt(BaseException):
    pass


# One may come as an object goes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", [Descriptor, HeldDescriptor])
def test_an_interrupt_at_any_moment_leaves_no_file_open(
    tmp_path: pathlib.Path, kind: type[Descriptor | HeldDescriptor]
) -> None:
    armed = False

    def interrupt(_signal: int, _frame: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise _Interrupt

    def work() -> None:
        nonlocal armed
        armed = True
        while armed:
            kind(path, os.O_RDONLY).close()

    path = str(tmp_path / "file")
    kind(path, os.O_RDWR | os.O_CREAT).close()
    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, _PERIOD, _PERIOD)
    try:
        for _ in range(_INTERRUPTS):
            with contextlib.suppress(_Interrupt):
                work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert leftovers.open_below(tmp_path) == []
