# SPDX-License-Identifier: Apache-2.0
"""Filesystems of a kind and size, made in a file and mounted for the length of a test."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
from collections.abc import Iterator, Sequence

from tests.support import needs

#: Smallest size that mkfs.xfs makes without special options.
XFS_SMALLEST = 300 * 2**20


@contextlib.contextmanager
def loop_mounted(home: pathlib.Path, size: int, mkfs: Sequence[str]) -> Iterator[pathlib.Path]:
    """Make a filesystem in a sparse file, mount it, and yield the mount point.

    :param home: an existing, empty directory.
    :param size: bytes.
    :param mkfs: command line without the device.
    """
    needs.root()
    image, mount_point = home / "filesystem.img", home / "mnt"
    mount_point.mkdir()
    with image.open("wb") as disk:
        disk.truncate(size)
    subprocess.run([needs.program(mkfs[0]), *mkfs[1:], image], check=True, capture_output=True)
    with _mounted(mount_point, "-o", "loop", str(image)):
        yield mount_point
    image.unlink()


@contextlib.contextmanager
def tmpfs_mounted(home: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """Mount a tmpfs of a size in bytes and yield the mount point."""
    needs.root()
    mount_point = home / "mnt"
    mount_point.mkdir()
    with _mounted(mount_point, "-t", "tmpfs", "-o", f"size={size}", "lab"):
        yield mount_point


@contextlib.contextmanager
def loop_attached(image: pathlib.Path, *options: str) -> Iterator[str]:
    """Attach a file, which has at least one sector, to a loop device, and yield the path of that."""
    needs.root()
    command = [needs.program("losetup"), "--find", "--show", *options, str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run([needs.program("losetup"), "--detach", device], check=True)


@contextlib.contextmanager
def _mounted(mount_point: pathlib.Path, *arguments: str) -> Iterator[None]:
    subprocess.run([needs.program("mount"), *arguments, mount_point], check=True)
    try:
        yield
    finally:
        # Not lazily: a test that leaves a file of it open should hear of it.
        subprocess.run([needs.program("umount"), mount_point], check=True)
