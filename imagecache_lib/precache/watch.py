# SPDX-License-Identifier: Apache-2.0
"""How far the images are that this host's cache fetches now."""

from __future__ import annotations

import collections
import threading

from imagecache_lib import events


class Watch:
    """An observer that knows how far images are. Pass it to the manager and to the agent."""

    _MOST = 1000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: collections.OrderedDict[str, tuple[int, int | None]] = collections.OrderedDict()

    def __call__(self, event: events.Event) -> None:
        if event.image_id is None:
            return
        match event:
            case events.Progress(received=received, total=total):
                self._keep(event.image_id, received, total)
            case events.Fetched(received=received):
                self._keep(event.image_id, received, received)

    def _keep(self, image_id: str, received: int, total: int | None) -> None:
        with self._lock:
            self._seen[image_id] = (received, total)
            self._seen.move_to_end(image_id)
            while len(self._seen) > self._MOST:
                self._seen.popitem(last=False)

    def forget(self, image_id: str) -> None:
        """Begin anew with an image."""
        with self._lock:
            self._seen.pop(image_id, None)

    def progress(self, image_id: str) -> tuple[int, int | None]:
        """Return the bytes of an image that came, and its size in bytes or None while that is not known."""
        with self._lock:
            return self._seen.get(image_id, (0, None))
