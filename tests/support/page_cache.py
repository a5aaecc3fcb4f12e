# SPDX-License-Identifier: Apache-2.0
"""What of a file is in memory only."""

from __future__ import annotations

import ctypes
import os
import unittest

#: cachestat(2), since Linux 6.5; the number is the same on all architectures.
_CACHESTAT = 451
_libc = ctypes.CDLL(None, use_errno=True)


def dirty_pages(path: str) -> int:
    """Return how many pages of a file are not on the disk yet."""
    # struct cachestat_range: offset, length (0: to the end). struct cachestat: cached, dirty, under
    # writeback, evicted, evicted a short time ago.
    everything, found = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
    fd = os.open(path, os.O_RDONLY)
    try:
        failed = _libc.syscall(ctypes.c_long(_CACHESTAT), fd, everything, found, 0)
    finally:
        os.close(fd)
    if failed:
        raise unittest.SkipTest(f"cachestat(2): {os.strerror(ctypes.get_errno())}")
    return int(found[1] + found[2])
