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


def covered(number: int) -> SeenDisk:
    """Return a disk that has the path of one of :func:`scan`'s, in another directory."""
    above = SeenDirectory("/roots/one", Identity(1, 2, 4))
    directory = SeenDirectory("/roots/one/uuid", Identity(number, 2, 0, Boundary.MOUNT), above)
    return SeenDisk("/roots/one/uuid/disk", (f"{number:040}",), directory, 5, 6, "uuid")


def names_at(seen: LastScan, path: str) -> list[tuple[str, ...]]:
    return sorted(disk.names for disk in seen.all_disks() if disk.path == path)


def test_all_disks_that_had_one_path_are_remembered_and_told_to_the_release_before(where: Layout) -> None:
    disks = (covered(7), covered(8))
    seen = scan(covered=disks)
    last_scan.save_last_scan(where, HOST, LastScan(), seen)
    found = load(where)
    assert [dataclasses.asdict(disk) for disk in found.covered] == [
        dataclasses.asdict(disk) for disk in disks
    ]
    assert dataclasses.asdict(found.disks[disks[0].path]) == dataclasses.asdict(seen.disks[disks[0].path])
    names = {name for disk in (*disks, seen.disks[disks[0].path]) for name in disk.names}
    assert set(last_scan.load_readings(where, HOST)[disks[0].path]) == names
    last_scan.save_last_scan(where, HOST, found, scan())
    assert not load(where).covered


def test_what_two_processes_saw_at_one_path_at_the_same_time_is_remembered_of_both(where: Layout) -> None:
    last_scan.save_last_scan(where, HOST, LastScan(), LastScan())
    before = load(where)
    elsewhere = covered(7)
    last_scan.save_last_scan(
        where, HOST, before, LastScan({elsewhere.path: elsewhere}, covered=(covered(8),))
    )
    last_scan.save_last_scan(where, HOST, before, scan())
    ours = scan().disks[elsewhere.path]
    assert names_at(load(where), elsewhere.path) == sorted([ours.names, elsewhere.names, covered(8).names])


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
