# SPDX-License-Identifier: Apache-2.0
"""Where the names of directories lead."""

from __future__ import annotations

import os
import pathlib

import pytest

from imagecache_lib.system import names


@pytest.mark.parametrize(
    "path", ["a/b", "link", "link/c", "a/../link", "a//b/", "missing/x", "a/file/x", "loop"]
)
def test_a_directory_is_where_realpath_says_it_is(tmp_path: pathlib.Path, path: str) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/file").touch()
    (tmp_path / "link").symlink_to("a/b")
    (tmp_path / "loop").symlink_to("loop")
    directory = f"{tmp_path}/{path}"
    assert names.real_directory(directory) == os.path.realpath(directory)


def test_a_removed_directory_keeps_its_path(tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    fd = os.open(directory, os.O_PATH)
    try:
        directory.rmdir()
        assert names.real_directory(f"/proc/self/fd/{fd}") == os.path.realpath(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
