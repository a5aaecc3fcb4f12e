# SPDX-License-Identifier: Apache-2.0
"""A filesystem of disks, beside the cache's own, whose server ceases to answer while the pass reads it.

The server is a process that is stopped at an instant of the reading. Needs root and FUSE.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator

import pytest

import imagecache_lib as ic
from imagecache_lib.store import layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.identity import identity_now
from imagecache_lib.store.named_roots import NamedRoots
from imagecache_lib.store.seen import LastScan
from imagecache_lib.system.trace import TracePoint
from imagecache_lib.testing.sources import FakeSource
from imagecache_lib.upkeep import references
from imagecache_lib.upkeep.follow import NO_ANSWER, Follower
from imagecache_lib.upkeep.references import References
from tests.lab import stale_names
from tests.support import files, needs, stopping

ID = "11111111-aaaa-4bbb-8ccc-0123456789ab"
NAME = layout.base_name(ID)

EMPTY = LastScan()

#: How long a reading may take that gives up the server, in seconds. It asks for half a second at most thrice.
_PATIENCE = 60


class Served:
    """A cache, and a disk root that a process serves in which instances have their disks."""

    def __init__(self, directory: pathlib.Path, mount: pathlib.Path, server: int) -> None:
        root = mount / "root"
        self._server = server
        instances = directory / "instances"
        instances.mkdir()
        self._config = ic.CacheConfig(
            instances_path=str(instances), disk_roots=(str(instances), str(root)), passed_over_directories=()
        )
        manager = ic.ImageCacheManager(self._config, FakeSource({ID: b"x" * 65536}), observers=())
        manager.cache_image(ID)
        for directory in (root / "one", root / "two", mount / "outside"):
            files.overlay(directory / "disk", instances / "_base" / NAME)
            (directory / f".disk.{'ab' * 16}.new").touch()
        (instances / "linked").symlink_to(mount / "outside")
        self.disks = {str(path / "disk") for path in (root / "one", root / "two", instances / "linked")}
        (instances / "other").mkdir()
        (instances / "other" / "disk").symlink_to(root / "one" / "disk")

    def read(self, instant: int | None, last: LastScan = EMPTY) -> tuple[References, int]:
        """Read all references, and return them and how many trace points were reached.

        :param instant: at which of these the server stops, or None for none.
        """
        reached = 0

        def stop(_at: TracePoint) -> None:
            nonlocal reached
            if reached == instant:
                stopping.stop(self._server)
            reached += 1

        cache = CacheStore(self._config, ic.System(name="here", trace=stop))
        # A machine that is busy must not be taken for a server that is gone.
        follower = Follower(_PATIENCE) if instant is None else Follower(0.2, roots_limit=0.5)
        in_vain = threading.Timer(_PATIENCE, os.kill, (self._server, signal.SIGCONT))
        in_vain.start()
        try:
            report = [ic.Instance("one", "here")]
            found = references.collect(cache, [NAME], report, last, follower=follower, now=0)
            assert in_vain.is_alive(), f"it waited for the server that stopped at trace point {instant}"
        finally:
            in_vain.cancel()
            os.kill(self._server, signal.SIGCONT)
        return found, reached


@contextlib.contextmanager
def mounted(directory: pathlib.Path) -> Iterator[tuple[pathlib.Path, int]]:
    """Mount a filesystem. Yields where, and the id of the process that serves it, which may be stopped."""
    with stale_names.mounted(directory, 1, seconds=0) as (mount,):
        (server,) = stale_names.servers_of(mount)
        try:
            yield mount, server
        finally:
            os.kill(server, signal.SIGCONT)


def silent_readings(cache: CacheStore, server: int) -> Iterator[References]:
    """Stop a server, and read twice all the same."""
    stopping.stop(server)
    follower = Follower(0.2, roots_limit=0.5)
    for _reading in range(2):
        yield references.collect(cache, [NAME], (), EMPTY, follower=follower, now=time.time())


@pytest.fixture
def served(tmp_path: pathlib.Path) -> Iterator[Served]:
    needs.root()
    with mounted(tmp_path) as (mount, server):
        yield Served(tmp_path, mount, server)


def test_a_server_that_stops_while_disks_are_read_holds_up_no_reading_and_hides_no_disk(
    served: Served,
) -> None:
    all_of_it, count = served.read(None)
    assert served.disks <= set(all_of_it.seen.disks)
    assert not all_of_it.problems
    silent = 0
    for instant in range(count):
        found, _reached = served.read(instant, all_of_it.seen)
        told = [each for each in found.problems if NO_ANSWER in each]
        silent += bool(told)
        assert NAME in found.users, f"stopped at {instant}: {found.problems}"
        assert served.disks <= set(found.seen.disks), f"stopped at {instant}"
    assert silent > count / 2  # at the last ones all is read
    after, _reached = served.read(None, all_of_it.seen)
    assert (set(after.seen.disks), after.problems) == (set(all_of_it.seen.disks), ())


def test_a_silent_root_that_another_process_names_keeps_everything_and_hides_no_other(
    tmp_path: pathlib.Path,
) -> None:
    needs.root()
    instances = tmp_path / "instances"
    instances.mkdir()
    config = ic.CacheConfig(instances_path=str(instances))
    ic.ImageCacheManager(config, FakeSource({ID: b"x" * 65536}), observers=()).cache_image(ID)
    cache = CacheStore(config, ic.System(name="here"))
    live = [tmp_path / f"live-{number}" for number in range(4)]
    with mounted(tmp_path) as (mount, server):
        for root in (mount, *live):
            files.overlay(root / "disk", instances / "_base" / NAME)
            NamedRoots((str(root),), cache.host, usual=False).note(cache.layout, cache.host_id, {}, {})
        for found in silent_readings(cache, server):
            assert found.unknown is not None and str(mount) in found.unknown
            assert {str(root / "disk") for root in live} <= set(found.seen.disks)


def test_a_volume_that_does_not_answer_keeps_everything_until_it_does(tmp_path: pathlib.Path) -> None:
    """A process made a disk in it, behind a link, that no pass has seen."""
    needs.root()
    instances = tmp_path / "instances"
    instances.mkdir()
    cache = CacheStore(ic.CacheConfig(instances_path=str(instances)), ic.System(name="here"))
    cache.start()
    with mounted(tmp_path) as (mount, server):
        volumes = {str(mount): identity_now(str(mount), None)}
        NamedRoots((), cache.host, usual=True).note(cache.layout, cache.host_id, {}, volumes)
        for found in silent_readings(cache, server):
            assert found.unknown is not None and str(mount) in found.unknown
        os.kill(server, signal.SIGCONT)
        found = references.collect(cache, [NAME], (), EMPTY, follower=Follower(), now=time.time())
        assert (found.unknown, len(found.notes_seen)) == (None, 1)


@pytest.mark.parametrize("link", ["to the root", "below the root"])
def test_a_volume_that_does_not_answer_behind_a_link_holds_up_no_reading(
    tmp_path: pathlib.Path, link: str
) -> None:
    """The kernel lists where it is mounted without links, and its directory is on the cache's filesystem."""
    needs.root()
    real = tmp_path / "real"
    real.mkdir()
    instances = tmp_path / "instances"
    if link == "to the root":
        instances.symlink_to(real)
    else:
        instances.mkdir()
        (instances / "linked").symlink_to(real)
    cache = CacheStore(ic.CacheConfig(instances_path=str(instances)), ic.System(name="here"))
    cache.start()
    with mounted(real) as (_mount, server):
        in_vain = threading.Timer(_PATIENCE, os.kill, (server, signal.SIGCONT))
        in_vain.start()
        try:
            for found in silent_readings(cache, server):
                assert found.unknown is not None and f"cannot be read ({NO_ANSWER})" in found.unknown
            assert in_vain.is_alive()
        finally:
            in_vain.cancel()


def test_a_silent_root_holds_up_no_disk_below_another(tmp_path: pathlib.Path) -> None:
    """Which directory a disk root is, is asked of the one above the disk."""
    needs.root()
    instances = tmp_path / "instances"
    (instances / "vm").mkdir(parents=True)
    with mounted(tmp_path) as (mount, server), contextlib.ExitStack() as stack:
        config = ic.CacheConfig(instances_path=str(instances), disk_roots=(str(mount), str(instances)))
        manager = ic.ImageCacheManager(config, FakeSource({ID: b"x" * 65536}), observers=())
        manager.cache_image(ID)
        stopping.stop(server)
        in_vain = threading.Timer(_PATIENCE, os.kill, (server, signal.SIGCONT))
        in_vain.start()
        stack.callback(in_vain.cancel)
        manager.create_disk(ID, str(instances / "vm" / "disk"))
        with manager.fetch_or_reuse(ID):
            pass
        assert in_vain.is_alive(), "it waited for the server that stopped"
