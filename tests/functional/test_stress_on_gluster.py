# SPDX-License-Identifier: Apache-2.0
"""Two hosts on a real network filesystem, each with its own view and its own caches of it."""

from __future__ import annotations

import contextlib
import pathlib

import pytest

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource
from tests.lab import gluster
from tests.support import campaign, stress
from tests.support.cache_case import ID, raw_image


@pytest.mark.campaign
@pytest.mark.parametrize("seed", campaign.pick(sample=range(1, 3), whole=range(1, 11)))
def test_nothing_in_use_is_lost_and_nothing_leaks(tmp_path: pathlib.Path, seed: int) -> None:
    seconds = campaign.seconds(sample=10.0)
    with gluster.mounted_twice(tmp_path) as (one, two):
        assert stress.run([one, two], seconds=seconds, seed=seed)


def test_a_spawn_waits_until_its_client_forgets_a_base_that_another_host_evicted(
    tmp_path: pathlib.Path,
) -> None:
    with gluster.mounted_twice(tmp_path) as (one, two):
        name = layout.base_name(ID)

        def manager(mount: pathlib.Path, host: str) -> ic.ImageCacheManager:
            source = FakeSource({ID: raw_image()})
            return ic.ImageCacheManager(
                ic.CacheConfig(instances_path=str(mount)), source, host=ic.System(name=host)
            )

        here, there = manager(one, "one"), manager(two, "two")
        here.cache_image(ID)
        there.list_hosts()
        with contextlib.suppress(errors.BackendError):  # in the trash, where it waits for the other host
            there.evict_image(ID)
        assert (one / "_base" / name).exists(), "the client has forgotten it already"
        (one / "instance").mkdir()
        here.create_disk(ID, str(one / "instance" / "disk"))
        assert (two / "_base" / name).read_bytes() == raw_image()
