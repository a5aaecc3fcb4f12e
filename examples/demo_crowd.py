# SPDX-License-Identifier: Apache-2.0
"""The crowd of the demonstration: processes and threads that ask for disks of one image at once."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from typing import Any

import imagecache_lib as ic
from imagecache_lib import events


@dataclasses.dataclass(frozen=True)
class Made:
    """A disk is ready, or could not be made.

    :param seconds: since all were told to start.
    """

    disk: ic.Disk | None
    seconds: float
    error: str = ""


@dataclasses.dataclass
class Round:
    """What a crowd that asked at once got."""

    made: list[Made]
    seen: collections.Counter[type[events.Event]]

    @property
    def times(self) -> list[float]:
        return sorted(each.seconds for each in self.made)


def ask(
    config: ic.CacheConfig,
    source: ic.HttpSource,
    image_id: str,
    targets: list[str],
    disk_size: int,
    start: Any,
    tell: Any,
) -> None:
    """One process of the crowd: a manager of its own, and a thread for each disk."""
    manager = ic.ImageCacheManager(config, source, observers=[tell.put])

    def make(target: str) -> None:
        start.wait()
        began = time.monotonic()
        try:
            disk = manager.create_disk(image_id, target, size=disk_size)
            tell.put(Made(disk, time.monotonic() - began))
        except ic.ImageCacheError as error:
            tell.put(Made(None, time.monotonic() - began, str(error)))

    threads = [threading.Thread(target=make, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
