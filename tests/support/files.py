# SPDX-License-Identifier: Apache-2.0
"""Files made to look old, and overlays made as other programs make them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import time


def age(*paths: str | os.PathLike[str], seconds: float) -> None:
    """Let files look as if they had not been touched for so many seconds."""
    then = time.time() - seconds
    for path in paths:
        os.utime(path, (then, then), follow_symlinks=False)


def age_tree(directory: str | os.PathLike[str], *, seconds: float, directories: bool = False) -> None:
    """Let every file below a directory look as if it had not been touched for so many seconds.

    :param directories: let the directories look so too. A file that vanishes meanwhile is passed over.
    """
    for parent, _directories, names in os.walk(directory):
        for name in (".", *names) if directories else names:
            with contextlib.suppress(FileNotFoundError):
                age(os.path.join(parent, name), seconds=seconds)


def make_deep(top: pathlib.Path, length: int) -> None:
    """Make a directory, and others in it, until the path of the last one has more than so many bytes."""
    top.mkdir()
    name = "d" * 250
    above = os.open(top, os.O_RDONLY)
    try:
        for _ in range(length // len(name) + 1):
            os.mkdir(name, dir_fd=above)
            inner = os.open(name, os.O_RDONLY, dir_fd=above)
            os.close(above)
            above = inner
    finally:
        os.close(above)


def overlay(
    path: str | os.PathLike[str],
    backing: str | os.PathLike[str],
    *,
    format: str = "qcow2",
    backing_format: str = "raw",
    size: str = "1M",
) -> None:
    """Make an overlay with qemu-img. Its backing file is not opened, and need not exist.

    :param path: where; its directory is made if it is not there.
    :param format: of the overlay, by QEMU's name.
    :param size: virtual size, as qemu-img reads it.
    """
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    command = [
        "qemu-img",
        "create",
        "-q",
        "-u",
        "-f",
        format,
        "-F",
        backing_format,
        "-b",
        backing,
        path,
        size,
    ]
    subprocess.run(command, check=True)
