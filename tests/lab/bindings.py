# SPDX-License-Identifier: Apache-2.0
"""Python modules that only a distribution has, for a virtualenv that does not see the system's packages."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterable

from tests.support import needs

_SYSTEM_PACKAGES = (
    pathlib.Path("/usr/lib/python3/dist-packages"),
    pathlib.Path(f"/usr/lib64/python3.{sys.version_info.minor}/site-packages"),
)


def load(home: pathlib.Path, package: str, modules: Iterable[str]) -> None:
    """Make modules importable here, and nothing else that the distribution has; see :func:`link`."""
    link(home, package, modules)
    sys.path.append(str(home))


def link(home: pathlib.Path, package: str, modules: Iterable[str]) -> None:
    """Make a directory for a ``PYTHONPATH`` with modules, and nothing else that the distribution has.

    :param home: an existing, empty directory.
    :param package: Debian's, which has them.
    :param modules: in Python, or compiled for this Python.
    """
    for module in modules:
        compiled = f"{module}.cpython-{sys.version_info.major}{sys.version_info.minor}-*.so"
        found = [
            path
            for directory in _SYSTEM_PACKAGES
            for pattern in (f"{module}.py", compiled)
            for path in directory.glob(pattern)
        ]
        if not found:
            needs.lack(f"{package} is not installed for this Python")
        (home / found[0].name).symlink_to(found[0])
