# SPDX-License-Identifier: Apache-2.0
"""Two hosts whose kernels still find what the other renamed away, and whose locks do not reach each other."""

from __future__ import annotations

import contextlib
import multiprocessing
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.store import layout
from imagecache_lib.system import durable
from imagecache_lib.testing.sources import FakeSource
from tests.lab import stale_names
from tests.support import campaign, files, stress
from tests.support.cache_case import ID, Running, Stop, raw_image

SEED = campaign.SEED


def _manager(
    mount: pathlib.Path, name: str, observers: tuple[events.Observer, ...] = ()
) -> ic.ImageCacheManager:
    # Each host has disks of its own, which the other cannot see.
    private = mount.parent / f"private-{name}"
    private.mkdir(exist_ok=True)
    config = ic.CacheConfig(
        instances_path=str(mount), disk_roots=(str(private),), num_retries=0, lock_timeout=1.0
    )
    host = ic.System(name=name)
    return ic.ImageCacheManager(config, FakeSource({ID: raw_image()}), host=host, observers=observers)


@pytest.mark.parametrize("seconds", [0, 1, 30])
def test_a_spawn_notices_that_its_base_was_evicted_though_the_kernel_has_the_name(
    tmp_path: pathlib.Path, seconds: float
) -> None:
    with stale_names.mounted(tmp_path, 2, seconds=seconds) as (one, two):
        _manager(two, "two").cache_image(ID)
        _manager(one, "one").list_hosts()
        served = tmp_path / "served" / "_base"
        name = layout.base_name(ID)
        files.age(served / name, served / ".imagecache" / "records" / f"{name}.json", seconds=5 * 86400)
        stop = Stop()

        def observe(event: events.Event) -> None:
            # The spawn has the base open, and no disk yet.
            if isinstance(event, events.Hit):
                stop()

        directory = tmp_path / "private-two" / "instance"
        directory.mkdir()
        target = str(directory / "disk")
        spawn = Running(lambda: _manager(two, "two", (observe,)).create_disk(ID, target))
        stop.wait()
        try:
            with contextlib.suppress(errors.BackendError):  # in the trash, where it waits for the other host
                _manager(one, "one").evict_image(ID)
            _manager(two, "two").verify_base_images([])
            _manager(one, "one").verify_base_images([])
        finally:
            stop.go_on()
        assert spawn.result().target == target
        assert (served / name).exists(), "the base of the disk is gone"
        assert (served / name).read_bytes() == raw_image()


def test_a_spawn_waits_until_its_kernel_forgets_a_base_that_another_host_evicted(
    tmp_path: pathlib.Path,
) -> None:
    with stale_names.mounted(tmp_path, 2, seconds=12) as (one, two):
        here = _manager(two, "two")
        here.cache_image(ID)
        _manager(one, "one").list_hosts()
        served = tmp_path / "served" / "_base"
        with contextlib.suppress(errors.BackendError):  # in the trash, where it waits for the other host
            _manager(one, "one").evict_image(ID)
        assert not (served / layout.base_name(ID)).exists()
        assert (two / "_base" / layout.base_name(ID)).exists(), "the kernel has forgotten it already"
        directory = tmp_path / "private-two" / "instance"
        directory.mkdir()
        here.create_disk(ID, str(directory / "disk"))
        assert (served / layout.base_name(ID)).read_bytes() == raw_image()


def _replace(path: str, turns: int) -> None:
    for turn in range(turns):
        durable.write_file(path, b"x" * (1000 + turn % 500), sync=False)


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_small_file_that_is_being_replaced_is_never_missing(tmp_path: pathlib.Path, seconds: float) -> None:
    with stale_names.mounted(tmp_path, 1, seconds=seconds) as (mount,):
        path = str(mount / "note")
        _replace(path, 1)
        # It leaves nothing open behind, so that the directory can be unmounted.
        writer = multiprocessing.get_context("forkserver").Process(target=_replace, args=(path, 1000))
        writer.start()
        looks = 0
        while writer.is_alive():
            data = durable.read_file(path)
            assert data is not None, "it was not there"
            assert set(data) == set(b"x"), "it was torn"
            looks += 1
        writer.join()
        assert writer.exitcode == 0
        assert looks > 100


@pytest.mark.campaign
@pytest.mark.parametrize("seconds", campaign.pick(sample=[1.0], whole=[0.0, 1.0, 30.0]))
def test_hosts_with_stale_names_lose_nothing(
    tmp_path: pathlib.Path, seconds: float, record_property: Callable[[str, Any], None]
) -> None:
    with stale_names.mounted(tmp_path, 2, seconds=seconds) as mounts:
        kills = stress.run(mounts, seconds=campaign.seconds(sample=6.0), seed=SEED)
    print(f"names trusted for {seconds} s: {kills} processes killed, seed {SEED}")  # noqa: T201
    record_property("kills", kills)
