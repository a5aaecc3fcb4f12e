# SPDX-License-Identifier: Apache-2.0
"""Many processes and threads that want one image at once, and processes that fork, stop or are killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.store import layout
from imagecache_lib.system.host import System
from imagecache_lib.testing.bad_server import BadServer, Seen
from imagecache_lib.testing.sources import FakeSource
from tests.support import files
from tests.support.cache_case import ID, raw_image

NAME = layout.base_name(ID)
DATA = raw_image(1, 8 * 2**20)
MANY = 32

#: A driver in a process of its own, which kills or stops itself at a point of the protocol.
_DRIVER = """
import json, os, signal, sys, threading
import imagecache_lib as ic
from imagecache_lib.system.host import System
from imagecache_lib.sources.http import HttpImage, HttpSource

options = json.loads(sys.argv[1])

def trace(point):
    if point == options.get("kill_at"):
        os.kill(os.getpid(), signal.SIGKILL)
    if point == options.get("stop_at"):
        del options["stop_at"]
        # Sent to the process, it may be another thread that takes it, and this one goes on for a while.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

image = HttpImage(options["url"], "raw", ic.Digest("sha512", options["sha512"]))
config = ic.CacheConfig(instances_path=options["instances"], num_retries=0)
manager = ic.ImageCacheManager(
    config, HttpSource({options["image"]: image}), backend=options["backend"], host=System(trace=trace)
)
def spawn(number):
    directory = os.path.join(options["instances"], f"{options['name']}-{number}")
    os.makedirs(directory, exist_ok=True)
    manager.create_disk(options["image"], os.path.join(directory, "disk"), size=16 * 2**20)

threads = [threading.Thread(target=spawn, args=(number,)) for number in range(options["threads"])]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.fixture
def instances(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "instances"
    path.mkdir()
    return path


@pytest.fixture
def server() -> Iterator[BadServer]:
    with BadServer() as running:
        running.put("/image", DATA)
        yield running


def driver(
    instances: pathlib.Path,
    server: BadServer,
    name: str,
    *,
    threads: int = 1,
    backend: str = "qcow2",
    **more: Any,
) -> subprocess.Popen[str]:
    options = {
        "instances": str(instances),
        "url": f"{server.url}/image",
        "image": ID,
        "sha512": hashlib.sha512(DATA).hexdigest(),
        "name": name,
        "threads": threads,
        "backend": backend,
        **more,
    }
    return subprocess.Popen(
        [sys.executable, "-c", _DRIVER, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_stop(child: subprocess.Popen[str]) -> None:
    """Return once a driver is stopped at its point, with all of its threads."""
    ended = os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert ended is not None and ended.si_code == os.CLD_STOPPED, ended


def finish(child: subprocess.Popen[str]) -> str:
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert "Traceback" not in err, err
    return out


def manager_for(
    instances: pathlib.Path,
    *,
    observers: Sequence[events.Observer] = (),
    source: ImageSource | None = None,
    **options: Any,
) -> ic.ImageCacheManager:
    config = ic.CacheConfig(instances_path=str(instances), num_retries=0, **options)
    return ic.ImageCacheManager(config, source or FakeSource({ID: DATA}), observers=observers)


def check_disks(disks: Sequence[pathlib.Path]) -> None:
    """Each is sound and holds the image, as qemu-img sees it."""
    reference = disks[0].parent.parent / "reference"
    reference.write_bytes(DATA + bytes(16 * 2**20 - len(DATA)))
    for disk in disks:
        format = json.loads((disk.parent / "disk.info").read_bytes())[str(disk)]
        if format == "qcow2":
            subprocess.run(["qemu-img", "check", "-q", disk], check=True)
        compare = ["qemu-img", "compare", "-q", "-f", format, "-F", "raw", disk, reference]
        subprocess.run(compare, check=True)
    reference.unlink()


def downloads(server: BadServer) -> list[Seen]:
    return [seen for seen in server.requests("GET") if seen.path == "/image"]


def stages_in(instances: pathlib.Path) -> list[str]:
    return sorted(os.listdir(instances / "_base" / ".imagecache" / "stage"))


def spawn(instances: pathlib.Path, url: str, number: int, start: Barrier) -> None:
    image = HttpImage(url, "raw", ic.Digest("sha512", hashlib.sha512(DATA).hexdigest()))
    config = ic.CacheConfig(instances_path=str(instances), num_retries=0)
    backend = ("qcow2", "raw")[number % 2]
    manager = ic.ImageCacheManager(config, HttpSource({ID: image}), backend=backend)
    directory = instances / f"process-{number}"
    directory.mkdir()
    start.wait(300)
    manager.create_disk(ID, str(directory / "disk"), size=16 * 2**20)


def test_processes_that_want_one_cold_image_at_once_download_it_once(
    instances: pathlib.Path, server: BadServer
) -> None:
    # Each is forked from a server that has imported everything and opened nothing: 32 start in a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    start = context.Barrier(MANY)
    children = [
        context.Process(target=spawn, args=(instances, f"{server.url}/image", number, start))
        for number in range(MANY)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0] * MANY
    assert len(downloads(server)) == 1
    disks = sorted(instances.glob("process-*/disk"))
    assert len(disks) == MANY
    check_disks(disks)
    assert stages_in(instances) == []


def test_threads_that_want_one_cold_image_at_once_download_it_once(
    instances: pathlib.Path, server: BadServer
) -> None:
    finish(driver(instances, server, "thread", threads=MANY))
    assert len(downloads(server)) == 1
    disks = sorted(instances.glob("thread-*/disk"))
    assert len(disks) == MANY
    check_disks(disks)


def test_a_stopped_holder_of_the_lock_does_not_stop_the_others(
    instances: pathlib.Path, server: BadServer
) -> None:
    holder = driver(instances, server, "stopped", stop_at="ingest:reserved")
    try:
        await_stop(holder)
        (instances / "other").mkdir()
        disk = manager_for(instances, lock_timeout=0.5).create_disk(
            ID, str(instances / "other" / "disk"), size=16 * 2**20
        )
        check_disks([pathlib.Path(disk.target)])
        inode = (instances / "_base" / NAME).stat().st_ino
    finally:
        holder.send_signal(signal.SIGCONT)
    # The other one was first. The holder throws its own away and uses that.
    finish(holder)
    assert (instances / "_base" / NAME).stat().st_ino == inode
    check_disks(sorted(instances.glob("*/disk")))
    assert stages_in(instances) == []


@pytest.mark.parametrize("point", ["ingest:reserved", "publish:begin"])
def test_a_fetch_that_was_stopped_for_a_day_holds_no_space_and_begins_anew(
    instances: pathlib.Path, server: BadServer, point: str
) -> None:
    holder = driver(instances, server, "stopped", stop_at=point)
    manager = manager_for(instances, lock_timeout=0.5)
    try:
        await_stop(holder)
        (stage,) = [each for each in stages_in(instances) if len(each) == 32]
        path = instances / "_base" / ".imagecache" / "stage" / stage
        files.age(path, seconds=86400 - 600)
        manager.verify_base_images([])
        assert path.exists()
        files.age(path, seconds=86400 + 600)
        manager.verify_base_images([])
        assert not path.exists()
        assert manager.get_space().reserved == 0
    finally:
        holder.send_signal(signal.SIGCONT)
    finish(holder)
    check_disks(sorted(instances.glob("*/disk")))
    assert stages_in(instances) == []


def test_a_child_forked_while_fetching_keeps_no_lock_and_no_stage_alive(instances: pathlib.Path) -> None:
    points: dict[str, int] = {}
    fetched = threading.Event()

    def trace(point: str) -> None:
        if point == "ingest:reserved" and not points:
            reader, points["writer"] = os.pipe()
            points["child"] = os.fork()
            if points["child"] == 0:
                os.close(points["writer"])
                os.read(reader, 1)
                os._exit(0)
            os.close(reader)
            fetched.set()

    config = ic.CacheConfig(instances_path=str(instances), lock_timeout=5)
    manager = ic.ImageCacheManager(config, FakeSource({ID: DATA}), host=System(trace=trace))
    try:
        assert manager.cache_image(ID) is ic.CacheResult.CACHED
        assert fetched.is_set()
        manager_for(instances).evict_image(ID)  # needs the exclusive lock, and does not wait for it
        assert not (instances / "_base" / NAME).exists()
    finally:
        os.close(points["writer"])
        os.waitpid(points["child"], 0)


#: Where a driver is killed, and whether the base has its name by then.
POINTS = {
    "ingest:reserved": False,
    "transfer.chunk": False,
    "stage:sync": False,
    "ingest:sealed": False,
    "publish:link": False,
    "publish:linked": True,
    "publish:synced": True,
    "publish:recorded": True,
    "disk:made": True,
    "disk:confirmed": True,
    "disk:placed": True,
}


KILLS = [*((point, "qcow2") for point in POINTS), ("disk:made", "raw"), ("disk:placed", "raw")]


@pytest.mark.parametrize(("point", "backend"), KILLS)
def test_a_driver_killed_anywhere_leaves_what_the_next_one_repairs(
    instances: pathlib.Path, server: BadServer, point: str, backend: str
) -> None:
    child = driver(instances, server, "killed", kill_at=point, backend=backend)
    child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL
    base = instances / "_base" / NAME
    assert base.exists() == POINTS[point]
    # Published means whole, whatever else is missing.
    assert not base.exists() or base.read_bytes() == DATA

    happened: list[events.Event] = []
    source = FakeSource({ID: DATA})
    manager = manager_for(instances, observers=(happened.append,), source=source)
    target = instances / "killed-0" / "disk"
    manager.create_disk(ID, str(target), size=16 * 2**20, if_exists="reuse")
    check_disks([target])
    if POINTS[point]:
        # Not fetched again, not adopted: the evidence of its making is all there.
        assert (source.opens, source.describes) == (0, 0)
        with manager.fetch_or_reuse(ID) as lease:
            assert lease.digest == ic.Digest("sha512", hashlib.sha512(DATA).hexdigest())
    assert not [event for event in happened if isinstance(event, events.Adopted)]

    # And no space is lost, once what is left is old enough that it cannot be somebody's.
    files.age_tree(instances, seconds=2 * 3600)
    instance = ic.Instance("killed-0", "here", images=(ID,))
    report = manager.verify_base_images([instance])
    assert [entry.name for entry in report.bases if not entry.evicted] == [NAME]
    assert stages_in(instances) == []
    assert sorted(os.listdir(instances / "killed-0")) == ["disk", "disk.info"]
    assert base.stat().st_nlink == 1
    records = os.listdir(instances / "_base" / ".imagecache" / "records")
    assert sorted(records) == [f"{NAME}.json", f"{NAME}.sums"]
    assert not [name for name in os.listdir(instances / "_base" / ".imagecache") if name.endswith(".new")]
