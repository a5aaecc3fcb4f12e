# SPDX-License-Identifier: Apache-2.0
"""Two images of one content on a filesystem that shares extents: one download, and one copy on disk."""

from __future__ import annotations

import os
import pathlib

import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource

MIB = 2**20


def test_the_second_takes_no_space_and_its_checksums_are_there(xfs: pathlib.Path) -> None:
    content = os.urandom(64 * MIB)
    source = FakeSource({"one": content, "other": content})
    happened: list[events.Event] = []
    cache = ic.ImageCacheManager(ic.CacheConfig(instances_path=str(xfs)), source, observers=[happened.append])
    cache.cache_image("one")
    before = cache.get_space().free
    cache.cache_image("other")
    assert before - cache.get_space().free < MIB
    assert source.opens == 1
    assert [event.shared for event in happened if isinstance(event, events.Copied)] == [True]
    assert (xfs / "_base" / layout.base_name("other")).read_bytes() == content
    assert [base.verdict for base in cache.scrub(rate=0).bases] == [ic.Verdict.SOUND] * 2
    cache.evict_image("one")
    assert (xfs / "_base" / layout.base_name("other")).read_bytes() == content
