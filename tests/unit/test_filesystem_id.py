# SPDX-License-Identifier: Apache-2.0
"""The numbers that tell filesystems apart."""

from __future__ import annotations

import os
import pathlib

from imagecache_lib.system.filesystem_id import FilesystemIds


def test_a_filesystem_that_fails_to_say_its_number_gets_no_other_one(tmp_path: pathlib.Path) -> None:
    ids = FilesystemIds()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        device = os.fstat(fd).st_dev
        fsid = os.fstatvfs(fd).f_fsid
        # fstatvfs(3) of a descriptor that is not open fails, as that of a server that does not answer does.
        assert ids.of(-1, device) == 0
        assert ids.of(fd, device) == fsid or not fsid
    finally:
        os.close(fd)
