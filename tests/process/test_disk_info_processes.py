# SPDX-License-Identifier: Apache-2.0
"""Several processes that make disks in one instance directory at once."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pathlib
from multiprocessing.synchronize import Barrier
from typing import Any

from imagecache_lib import CacheConfig, System, errors, model
from imagecache_lib.backends.file import FileBackend
from imagecache_lib.backends.qcow2 import Qcow2Backend
from imagecache_lib.backends.raw import RawBackend
from imagecache_lib.testing.backend_contract import commit

MIB = 2**20
PROCESSES = 8
DISKS = 5
MANY = 200


def make_base(root: pathlib.Path) -> pathlib.Path:
    for name in ("locks", "_base", "instance"):
        (root / name).mkdir()
    path = root / "_base" / ("a" * 40)
    path.write_bytes(os.urandom(MIB))
    return path


def create(
    root: pathlib.Path,
    kind: type[FileBackend],
    base_path: pathlib.Path,
    target: str,
    *,
    locking: bool = True,
) -> None:
    backend = kind.from_config(CacheConfig(instances_path=str(root)), System(name="here", locking=locking))
    fd = os.open(base_path, os.O_RDONLY)
    base = model.BaseImage("id", base_path.name, str(base_path), "raw", MIB, fd=fd)
    try:
        commit(backend.prepare(base, target, None))
    finally:
        os.close(fd)


def make_several(root: pathlib.Path, base_path: pathlib.Path, start: Barrier, number: int) -> None:
    kind = (RawBackend, Qcow2Backend)[number % 2]
    start.wait()
    for disk in range(DISKS):
        create(root, kind, base_path, str(root / "instance" / f"{kind.name}-{number}-{disk}"))


def make_many_without_locks(root: pathlib.Path, base_path: pathlib.Path, start: Barrier, number: int) -> None:
    kind = (RawBackend, Qcow2Backend)[number % 2]
    start.wait()
    for disk in range(MANY // PROCESSES):
        create(root, kind, base_path, str(root / "instance" / f"{kind.name}-{number}-{disk}"), locking=False)


def make_the_same(root: pathlib.Path, base_path: pathlib.Path, start: Barrier, number: int) -> None:
    kind = (RawBackend, Qcow2Backend)[number % 2]
    for turn in range(DISKS):
        start.wait()
        try:
            create(root, kind, base_path, str(root / "instance" / f"disk{turn}"))
        except errors.DiskExistsError:
            continue


def run(target: Any, root: pathlib.Path) -> dict[str, str]:
    base_path = make_base(root)
    spawning = multiprocessing.get_context("spawn")
    start = spawning.Barrier(PROCESSES)
    processes = [
        spawning.Process(target=target, args=(root, base_path, start, number)) for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    pinned: dict[str, str] = json.loads((root / "instance" / "disk.info").read_text())
    return pinned


def test_no_disks_format_is_lost(tmp_path: pathlib.Path) -> None:
    pinned = run(make_several, tmp_path)
    made = {str(path) for path in (tmp_path / "instance").iterdir() if path.name != "disk.info"}
    assert len(made) == PROCESSES * DISKS
    assert pinned == {path: os.path.basename(path).partition("-")[0] for path in made}


def test_without_locks_no_disks_format_is_lost(tmp_path: pathlib.Path) -> None:
    pinned = run(make_many_without_locks, tmp_path)
    made = {str(path) for path in (tmp_path / "instance").iterdir() if path.name != "disk.info"}
    assert len(made) == MANY
    assert pinned == {path: os.path.basename(path).partition("-")[0] for path in made}
    backend = Qcow2Backend.from_config(CacheConfig(instances_path=str(tmp_path)), System(name="here"))
    assert {path: backend.inspect(path).format for path in made} == pinned


def test_without_locks_a_disk_that_lost_its_name_to_another_takes_no_format_away(
    tmp_path: pathlib.Path,
) -> None:
    base_path = make_base(tmp_path)
    target = str(tmp_path / "instance" / "disk")
    create(tmp_path, Qcow2Backend, base_path, target, locking=False)
    with contextlib.suppress(errors.DiskExistsError):
        create(tmp_path, RawBackend, base_path, target, locking=False)
    assert json.loads((tmp_path / "instance" / "disk.info").read_text()) == {target: "qcow2"}


def test_who_wins_a_name_has_its_format_pinned(tmp_path: pathlib.Path) -> None:
    pinned = run(make_the_same, tmp_path)
    assert len(pinned) == DISKS
    for path, format in pinned.items():
        with open(path, "rb") as disk:
            assert format == ("qcow2" if disk.read(4) == b"QFI\xfb" else "raw")
