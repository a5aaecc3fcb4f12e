# SPDX-License-Identifier: Apache-2.0
"""A host's part in a chain: receives images from other hosts, and keeps them for those behind it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection

from imagecache_lib import errors, manager
from imagecache_lib.precache.tasks import Attempt
from imagecache_lib.sources.parents import Parents
from imagecache_lib.sources.relay import RelaySource
from imagecache_lib.sources.route import Route
from imagecache_lib.store.spool import Spool, Spools
from imagecache_lib.system.waiter import Waiter

LOG = logging.getLogger(__name__)

#: Seconds for which an image is kept for other hosts after it was read last, should no conductor end that.
KEPT_SECONDS = 600.0


class PassingOn:
    """What an agent needs to relay. Safe to share between threads.

    :param cache: the host's image cache.
    :param spools: what is kept, as the server of this host reads it.
    :param parents: how this host reaches others.
    """

    def __init__(self, cache: manager.ImageCacheManager, spools: Spools, parents: Parents) -> None:
        self._cache = cache
        self._spools = spools
        self._parents = parents
        self._lock = threading.Lock()
        #: By job, the images that it needs here.
        self._needed: dict[str, set[str]] = {}

    def expect(self, job_id: str, image_ids: Collection[str]) -> None:
        """Let other hosts wait for images that a task will bring."""
        with self._lock:
            self._needed.setdefault(job_id, set()).update(image_ids)
        self._spools.expect(image_ids)

    def source(self, route: Route, attempt: Attempt, deadline: float | None) -> RelaySource:
        """Return where an image comes from along a route.

        :param deadline: epoch seconds until which it is waited for, or None for no deadline.
        """
        asked = attempt.asked
        waiter = Waiter(self._cache.host, attempt.image_id, deadline, attempt.cancelled)
        return RelaySource(
            self._cache.source, route, self._parents, self._spools, waiter, rate=asked.rate or None
        )

    def received(self, image_id: str) -> tuple[int, int | None]:
        """Return the bytes of an image that came, and its size in bytes or None while that is not known."""
        spool = self._spools.find(image_id)
        return (0, None) if spool is None else (spool.have, spool.size)

    def allocated(self, image_id: str) -> int:
        """Return the bytes that an image takes on disk to be passed on, beside its base."""
        spool = self._spools.find(image_id)
        with contextlib.suppress(errors.ImageCacheError):
            return 0 if spool is None else spool.allocated
        return 0

    def ended(self, image_id: str, *, proved: bool) -> None:
        """Let hosts wait no longer for an image that ended here.

        :param proved: its digest was compared, and is right.
        """
        spool = self._spools.find(image_id)
        if spool is not None and proved:
            spool.prove()
        self._spools.settle(image_id)
        with self._lock:
            is_needed = any(image_id in images for images in self._needed.values())
        if not is_needed:
            self._spools.release([image_id])  # its job was cancelled meanwhile

    def release(self, job_id: str) -> None:
        """Remove what is kept for a job's hosts, unless another job needs it."""
        with self._lock:
            images = self._needed.pop(job_id, set())
            images -= set().union(*self._needed.values())
        self._spools.release(images)

    def sweep(self, running: Collection[str]) -> None:
        """Remove what no host has read for long.

        :param running: ids of the jobs that have unfinished tasks here.
        """
        now = self._cache.host.monotonic()
        with self._lock:
            jobs = {job_id: set(images) for job_id, images in self._needed.items() if job_id not in running}
        for job_id, images in jobs.items():
            found = [spool for image_id in images if (spool := self._spools.find(image_id)) is not None]
            if all(_is_idle(spool, now) for spool in found):
                LOG.info("No host has read the images of job %s for long, they are not kept", job_id)
                self.release(job_id)

    def close(self) -> None:
        """Remove everything that is kept."""
        self._spools.close()


def _is_idle(spool: Spool, now: float) -> bool:
    return not spool.readers and now - spool.read_at > KEPT_SECONDS
