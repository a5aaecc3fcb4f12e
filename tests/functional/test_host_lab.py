# SPDX-License-Identifier: Apache-2.0
"""What the lab's guests and filesystems really do, and that the lab works."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import subprocess

import pytest

from imagecache_lib.testing import bootdisk
from tests.lab import guest, server
from tests.lab import libvirt as libvirt_lab

FICLONE = 0x40049409
MIB = 2**20


def reflink(source: pathlib.Path, copy: pathlib.Path) -> None:
    with open(source, "rb") as readable, open(copy, "wb") as writable:
        fcntl.ioctl(writable, FICLONE, readable.fileno())


def test_a_guest_boots_from_an_overlay_and_writes_to_it_only(tmp_path: pathlib.Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    bootdisk.write_boot_disk(str(base))
    before = base.read_bytes()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay], check=True)
    for boot in range(2):
        assert f"HELLO BOOT {boot}" in guest.boot(bootdisk.boot_command(str(overlay), "qcow2"))
    assert base.read_bytes() == before


def test_a_guest_that_fails_says_why(tmp_path: pathlib.Path) -> None:
    (tmp_path / "garbage").write_bytes(b"no qcow2")
    with pytest.raises(AssertionError, match="not in qcow2 format"):
        guest.boot(bootdisk.boot_command(str(tmp_path / "garbage"), "qcow2"))


def test_libvirt_takes_the_base_of_a_domains_disk_and_keeps_it(libvirt: libvirt_lab.Libvirt) -> None:
    base, overlay = libvirt.home / "base", libvirt.home / "overlay"
    bootdisk.write_boot_disk(str(base))
    before = base.read_bytes()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay], check=True)
    with libvirt.domain("lab", overlay, "qcow2") as serial:
        server.wait_until(lambda: b"HELLO BOOT 0" in serial.read_bytes(), "the guest speaks", seconds=240)
    assert base.owner() == "libvirt-qemu"
    assert base.read_bytes() == before


def test_xfs_shares_the_blocks_of_a_copy(xfs: pathlib.Path) -> None:
    (xfs / "a").write_bytes(os.urandom(64 * MIB))
    os.sync()
    before = os.statvfs(xfs).f_bavail
    reflink(xfs / "a", xfs / "b")
    os.sync()
    assert (before - os.statvfs(xfs).f_bavail) * os.statvfs(xfs).f_bsize < 8 * MIB


def test_a_small_ext4_fills_up(small_ext4: pathlib.Path) -> None:
    with pytest.raises(OSError) as caught, open(small_ext4 / "a", "wb") as big:
        for _ in range(80):
            big.write(bytes(MIB))
    assert caught.value.errno == errno.ENOSPC


def test_tmpfs_cannot_reflink(tmpfs: pathlib.Path) -> None:
    (tmpfs / "a").write_bytes(b"data")
    with pytest.raises(OSError) as caught:
        reflink(tmpfs / "a", tmpfs / "b")
    assert caught.value.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV)
