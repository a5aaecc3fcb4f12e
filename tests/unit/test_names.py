# SPDX-License-Identifier: Apache-2.0
"""Where the names of directories lead."""

from __future__ import annotations

import os
import pathlib

import pytest

from imagecache_lib.system import durable, names
from tests.support import needs


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


def test_a_file_is_missing_where_a_local_filesystem_finds_none(tmp_path: pathlib.Path) -> None:
    with open("/proc/self/status"):
        assert names.may_be_there("/proc/self/status"), "of an unknown type, and listed"
    assert not names.may_be_there("/proc/self/no-such-file")
    assert not names.may_be_there(f"{tmp_path}/no-such-directory/file")


def test_a_directory_that_must_not_be_listed_has_missing_files_too(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.root()
    tmp_path.chmod(0o711)
    # The directories above are root's alone.
    monkeypatch.chdir(tmp_path)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            os.listdir(".")
        assert durable.read_file("./file") is None
    finally:
        os.seteuid(0)
