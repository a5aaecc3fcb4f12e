# SPDX-License-Identifier: Apache-2.0
"""A disk that changes what was written, under a page cache that does not know. As root."""

from __future__ import annotations

import mmap
import os
import pathlib
from collections.abc import Iterator

import pytest

import imagecache_lib as ic
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource
from tests.lab import filesystems
from tests.support.cache_case import ID

MIB = 2**20
CONTENT = os.urandom(5 * MIB)


@pytest.fixture(params=["mkfs.ext4 -q -b 4096", "mkfs.ext4 -q -b 1024", "mkfs.xfs -q"])
def disk(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The mount point of a filesystem whose device is the file ``filesystem.img`` beside it."""
    with filesystems.loop_mounted(tmp_path, filesystems.XFS_SMALLEST, request.param.split()) as mount_point:
        yield mount_point


def manager(instances: pathlib.Path) -> ic.ImageCacheManager:
    config = ic.CacheConfig(instances_path=str(instances), scrub_rate=0)
    return ic.ImageCacheManager(config, FakeSource({ID: CONTENT}))


def rot(device: pathlib.Path, at: int) -> None:
    """Flip a bit of the content where it lies on the device, past the filesystem."""
    with device.open("r+b") as file, mmap.mmap(file.fileno(), 0) as blocks:
        found = blocks.find(CONTENT[at : at + 64])
        assert found >= 0
        blocks[found] ^= 1


def test_it_is_found_while_everybody_else_still_reads_the_right_bytes_from_memory(
    disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    cache = manager(disk)
    cache.cache_image(ID)
    base = disk / "_base" / layout.base_name(ID)
    assert base.read_bytes() == CONTENT
    (found,) = cache.scrub().bases
    assert found.verdict is ic.Verdict.SOUND
    rot(tmp_path / "filesystem.img", 3 * MIB)
    assert base.read_bytes() == CONTENT
    (found,) = cache.scrub().bases
    assert found.verdict is ic.Verdict.DAMAGED
    assert found.detail == f"1 of its granules of 64.0 KiB are wrong, the first at byte {3 * MIB}"
    assert not base.exists()
    assert cache.cache_image(ID) is ic.CacheResult.CACHED


def test_without_direct_reads_it_still_reads(tmp_path: pathlib.Path) -> None:
    with filesystems.tmpfs_mounted(tmp_path, 64 * MIB) as instances:
        cache = manager(instances)
        cache.cache_image(ID)
        (found,) = cache.scrub().bases
        assert found.verdict is ic.Verdict.SOUND
        with (instances / "_base" / layout.base_name(ID)).open("r+b") as file:
            file.write(b"something else")
        (found,) = cache.scrub().bases
        assert found.verdict is ic.Verdict.DAMAGED
