# SPDX-License-Identifier: Apache-2.0
"""Which filesystems' names are believed without asking, and what a listing says of one."""

from __future__ import annotations

import os
import pathlib

from imagecache_lib.system.name_cache import NameCaches, is_listed


def test_a_filesystem_that_is_not_known_to_be_local_may_have_stale_names() -> None:
    caches = NameCaches()
    fd = os.open("/proc", os.O_RDONLY)
    try:
        device = os.fstat(fd).st_dev
        assert caches.may_be_stale(fd, device)
        assert caches.may_be_stale(-1, device), "it is asked once for each device"
    finally:
        os.close(fd)


def test_a_name_is_listed_for_the_file_that_has_it(tmp_path: pathlib.Path) -> None:
    path, other = tmp_path / "base", tmp_path / "other"
    path.write_bytes(b"x")
    other.write_bytes(b"y")
    assert is_listed(str(path), path.stat().st_ino)
    assert not is_listed(str(path), other.stat().st_ino)
    other.unlink()
    assert not is_listed(str(other), path.stat().st_ino)
