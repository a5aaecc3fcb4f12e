# SPDX-License-Identifier: Apache-2.0
"""What a test needs of its machine: programs, rights, places.

What is lacking fails the test where ``CI`` is set, since there nothing may be lacking, and skips it with the
reason elsewhere. Works under pytest and under unittest. ``bindep.txt`` names the packages of all programs;
``make`` installs those of the suite that it runs.
"""

from __future__ import annotations

import os
import shutil
import sys
import unittest
from typing import NoReturn

_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def lack(what: str) -> NoReturn:
    """End the test for want of something.

    :param what: what is lacking, as a clause such as ``nginx is not installed``.
    :raises AssertionError: in CI.
    :raises unittest.SkipTest: elsewhere.
    """
    if os.environ.get("CI"):
        raise AssertionError(f"{what}, and in CI nothing is skipped for want of something")
    raise unittest.SkipTest(what)


def program(name: str) -> str:
    """Return the path of a program, which Debian may keep in sbin."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
    if path is None:
        lack(f"{name} is not installed")
    return path


def root() -> None:
    """Go on only as root: to mount, to give files away, to trace."""
    if os.geteuid() != 0:
        lack("only root can do this")


def other_filesystem(path: str, than: str) -> None:
    """Go on only where ``path`` is a writable directory on another filesystem than ``than`` is on."""
    if not os.access(path, os.W_OK) or os.stat(path).st_dev == os.stat(than).st_dev:
        lack(f"{path} is no other filesystem that can be written")


def no_tracer() -> None:
    """Go on only where no tracer, such as coverage's, runs in this process.

    A tracer takes locks of its own between any two lines. One interrupted there keeps them for ever.

    :raises unittest.SkipTest: there is one, in CI as well: the other runs there have none.
    """
    if sys.gettrace() is not None:
        raise unittest.SkipTest("a tracer's own locks would be interrupted")
