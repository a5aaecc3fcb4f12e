# SPDX-License-Identifier: Apache-2.0
"""What a pass saw is written down again exactly if it saw something else than what is written."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import pytest

from imagecache_lib import model
from imagecache_lib.store import last_scan
from imagecache_lib.store.layout import Layout
from imagecache_lib.store.seen import Boundary, Identity, LastScan, SeenDirectory, SeenDisk

HOST = "0" * 32


def scan(
    *,
    inode: int = 5,
    born: int = 6,
    instance: str | None = "uuid",
    names: tuple[str, ...] = ("a" * 40,),
    directory: Identity = Identity(1, 3, 4, Boundary.NONE, 9),  # noqa: B008  it is frozen
    top: Identity = Identity(1, 2, 4),  # noqa: B008
    where: str = "/roots/one/uuid",
    more: tuple[str, ...] = (),
    **fields: Any,
) -> LastScan:
    above = SeenDirectory("/roots/one", top)
    seen = SeenDirectory(where, directory, above)
    disks = {
        f"{where}/{name}": SeenDisk(f"{where}/{name}", names, seen, inode, born, instance)
        for name in ("disk", "disk.swap", *more)
    }
    disks["/roots/one/lying"] = SeenDisk("/roots/one/lying", names, above, 8)
    report = (model.Instance("uuid", "here", ("image",), ("name",), 64, (model.Ephemeral(2),)),)
    values = {"roots": {"/roots/one": top}, "lost": {"/roots": 7}, "report": report, **fields}
    return LastScan(disks, **values)


OTHERS: dict[str, dict[str, Any]] = {
    "another file": {"inode": 50},
    "a file born later": {"born": 60},
    "another instance's disk": {"instance": None},
    "a disk on another base": {"names": ("b" * 40,)},
    "another directory of the name": {"directory": Identity(1, 30, 4, Boundary.NONE, 9)},
    "a directory that is mounted": {"directory": Identity(1, 3, 4, Boundary.MOUNT, 9)},
    "another directory above": {"top": Identity(1, 20, 4)},
    "another place": {"where": "/roots/one/moved"},
    "one disk more": {"more": ("disk.eph0",)},
    "another root": {"roots": {}},
    "a lost file": {"lost": {"/roots": 70}},
    "no report": {"report": None},
    "an empty report": {"report": ()},
    "another report": {"report": (model.Instance("uuid", "there", ("image",), ("name",)),)},
}


@pytest.fixture
def where(tmp_path: pathlib.Path) -> Layout:
    layout = Layout(str(tmp_path), str(tmp_path))
    os.makedirs(layout.hosts)
    return layout


def load(where: Layout) -> LastScan:
    return last_scan.load_last_scan(where, HOST, {})


def save(where: Layout, seen: LastScan) -> bool:
    """Write down what was seen. Returns whether the file was written anew."""
    path = where.last_scan(HOST)
    before = os.stat(path).st_ino
    with open(path, "rb"):  # so that no new file gets its inode
        last_scan.save_last_scan(where, HOST, load(where), seen)
        return os.stat(path).st_ino != before


def test_what_was_seen_before_is_not_written_anew(where: Layout) -> None:
    last_scan.save_last_scan(where, HOST, LastScan(), scan())
    assert not save(where, scan())
    assert not save(where, load(where))


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_other_than_before_is_written(where: Layout, what: str) -> None:
    last_scan.save_last_scan(where, HOST, LastScan(), scan())
    other = scan(**OTHERS[what])
    assert save(where, other)
    assert not save(where, other)
    assert dataclasses.asdict(load(where))["roots"] == dataclasses.asdict(other)["roots"]


class TornAtFirst(last_scan.Parsed):
    """Reads what was only half there at the first look, as where another process is replacing it."""

    def __init__(self) -> None:
        super().__init__()
        self._looks = 0

    def parse(self, data: bytes) -> LastScan | None:
        self._looks += 1
        return super().parse(data) if self._looks > 1 else None


def test_what_is_torn_for_a_moment_costs_no_disk_the_identity_of_its_directory(where: Layout) -> None:
    last_scan.save_last_scan(where, HOST, LastScan(), scan())
    found = last_scan.load_last_scan(where, HOST, {}, parsed=TornAtFirst())
    assert dict(found.disks) != {}
    assert all(disk.directory.identity is not None for disk in found.disks.values())
    assert found.report_unknown is None


@pytest.mark.parametrize("kind", ["directory", "pipe", "link"])
def test_what_is_no_file_is_told(where: Layout, kind: str) -> None:
    path = pathlib.Path(where.last_scan(HOST))
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("x")
    assert str(path) in str(load(where).unreadable)
