# SPDX-License-Identifier: Apache-2.0
"""What block devices are made of: trees of files and links as sysfs has them."""

from __future__ import annotations

import os
import pathlib

import pytest

from imagecache_lib.system import block_devices


class Sysfs:
    """Devices as sysfs shows them: a directory each, and a link to it by its number."""

    def __init__(self, top: pathlib.Path) -> None:
        self.devices = top / "devices"
        self.by_number = top / "by_number"
        self.by_number.mkdir()

    def add(self, name: str, minor: int, *, file: bytes | None = None, on: tuple[str, ...] = ()) -> None:
        directory = self.devices / name
        (directory / "slaves").mkdir(parents=True)
        for lower in on:
            (directory / "slaves" / lower).symlink_to(self.devices / lower)
        if file is not None:
            (directory / "loop").mkdir()
            (directory / "loop" / "backing_file").write_bytes(file)
        (self.by_number / f"7:{minor}").symlink_to(directory)

    def files(self, minor: int) -> tuple[bytes, ...]:
        return block_devices.files_beneath(os.makedev(7, minor), devices=str(self.by_number))


@pytest.fixture
def sysfs(tmp_path: pathlib.Path) -> Sysfs:
    return Sysfs(tmp_path)


def test_a_loop_device_lies_on_its_file(sysfs: Sysfs) -> None:
    sysfs.add("loop1", 1, file=b"/a\nb\xff\n")
    assert sysfs.files(1) == (b"/a\nb\xff",)


def test_a_mapped_device_lies_on_the_files_of_all_that_it_is_put_together_from(sysfs: Sysfs) -> None:
    sysfs.add("loop1", 1, file=b"/origin\n")
    sysfs.add("loop2", 2, file=b"/changes\n")
    sysfs.add("dm-0", 3, on=("loop1",))
    sysfs.add("dm-1", 4, on=("dm-0", "loop2", "loop1"))
    assert sorted(sysfs.files(4)) == [b"/changes", b"/origin"]


def test_a_partition_lies_on_what_the_whole_device_does(sysfs: Sysfs) -> None:
    sysfs.add("loop1", 1, file=b"/image\n")
    sysfs.add("loop1/loop1p1", 2)
    (sysfs.devices / "loop1" / "loop1p1" / "partition").write_text("1\n")
    assert sysfs.files(2) == (b"/image",)


def test_all_loop_devices_that_have_a_file_are_found(sysfs: Sysfs) -> None:
    sysfs.add("loop1", 1, file=b"/image\n")
    sysfs.add("loop2", 2)
    sysfs.add("sda", 3)
    assert block_devices.loop_files(devices=str(sysfs.devices)) == {"loop1": b"/image"}
    assert block_devices.loop_files(devices="/nonexistent") == {}


def test_a_disk_lies_on_no_file(sysfs: Sysfs) -> None:
    sysfs.add("sda", 1)
    assert sysfs.files(1) == ()


def test_a_device_that_is_not_shown_cannot_be_told(sysfs: Sysfs) -> None:
    with pytest.raises(OSError):
        sysfs.files(1)
