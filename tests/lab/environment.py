# SPDX-License-Identifier: Apache-2.0
"""Virtualenvs of the servers, kept outside of the checkout, since installing one takes a while."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys


def cache_directory() -> pathlib.Path:
    """Return the directory that outlives the checkout."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(root) / "imagecache-lib"
    path.mkdir(parents=True, exist_ok=True)
    return path


def environment(name: str, requirements: pathlib.Path) -> pathlib.Path:
    """Return a virtualenv with the requirements installed, making it if need be.

    Its directory is named after the requirements and the Python, so a change of either makes a new one.
    """
    key = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    directory = cache_directory() / f"{name}-{key}"
    complete = directory / "complete"
    with open(f"{directory}.lock", "w") as lock:
        # Two test runs on one machine: the second waits and finds it done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
            subprocess.run([directory / "bin/pip", "install", "--quiet", "-r", requirements], check=True)
            complete.touch()
    return directory


def describe_library(site: pathlib.Path) -> None:
    """Write what is installed of the library into a directory for ``PYTHONPATH``: it names the backends.

    :param site: an existing directory, from which the sources are not imported.
    """
    # A build may have left a description beside the sources too, under other names.
    found = importlib.metadata.distribution("imagecache-lib")
    described = site / "imagecache_lib-0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(found.read_text("METADATA") or found.read_text("PKG-INFO") or "")
    (described / "entry_points.txt").write_text(found.read_text("entry_points.txt") or "")
