# SPDX-License-Identifier: Apache-2.0
"""What is mounted below a directory, from the kernel's list alone."""

from __future__ import annotations

import pathlib

from imagecache_lib.system import mounts

LIST = rb"""22 1 254:1 / / rw,relatime - ext4 /dev/root rw
30 22 0:27 / /var/lib/instances rw - nfs server:/export rw
31 30 0:28 / /var/lib/instances/one rw - nfs server:/one rw
32 30 0:29 / /var/lib/instances/a\040space\134 rw - nfs server:/two rw
33 22 0:30 / /var/lib/instances-old/two rw - nfs server:/three rw
torn
"""


def test_mounts_below_a_directory_are_found_whatever_they_are_called(tmp_path: pathlib.Path) -> None:
    listing = tmp_path / "mountinfo"
    listing.write_bytes(LIST)
    points = mounts.points(mountinfo=str(listing))
    found = set(mounts.below("/instances", "/var/lib/instances", points))
    assert found == {"/instances/one", "/instances/a space\\"}
    assert set(mounts.below("/", "/", points)) == {*points} - {"/"}


def test_without_a_list_there_are_none(tmp_path: pathlib.Path) -> None:
    assert mounts.points(mountinfo=str(tmp_path / "none")) == ()


def test_a_path_leads_to_the_filesystem_that_links_and_names_say(tmp_path: pathlib.Path) -> None:
    home = str(tmp_path)
    mounted = ("/", f"{home}/dead", f"{home}/dead/inner", f"{home}/deadlier")
    (tmp_path / "link").symlink_to("dead/x")
    (tmp_path / "again").symlink_to(f"{home}/link/../inner")
    (tmp_path / "round").symlink_to("round")
    for path, expected in (
        ("x", "/"),
        ("dead", "dead"),
        ("dead/../x", "dead"),
        ("deader/x", "/"),
        ("dead/inner/x", "dead/inner"),
        ("deadlier/x", "deadlier"),
        ("link/y", "dead"),
        ("again", "dead/inner"),
        ("./..//" + tmp_path.name + "/link", "dead"),
        ("round/x", "/"),
        ("x\0", "/"),
    ):
        where = expected if expected == "/" else f"{home}/{expected}"
        assert mounts.of(f"{home}/{path}", mounted) == where, path
