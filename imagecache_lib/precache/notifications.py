# SPDX-License-Identifier: Apache-2.0
"""``aggregate.cache_images.start``, ``.progress`` and ``.end`` on the message bus, as Nova sends them.

The payload has the fields of Nova's ``AggregatePayload`` and ``AggregateCachePayload``. What a job does
not know of an aggregate, its number and uuid, is None; what Nova lacks is ``job_id``.
"""

from __future__ import annotations

from typing import Any

import oslo_messaging

from imagecache_lib.precache import job
from imagecache_lib.precache.job_events import JobEvent

_EVENT_TYPE = "aggregate.cache_images"


class JobNotifier:
    """An observer of :class:`~imagecache_lib.precache.precacher.AggregatePrecacher`. Safe to share.

    A bus that fails raises here, which the precacher logs; the job goes on.

    :param notifier: such as :func:`imagecache_lib.observers.notifications.notifier` makes.
    """

    def __init__(self, notifier: oslo_messaging.Notifier) -> None:
        self._notifier = notifier

    def __call__(self, event: JobEvent) -> None:
        payload = _progress(event) if event.kind == "progress" else _whole(event.job)
        self._notifier.info({}, f"{_EVENT_TYPE}.{event.kind}", payload)


def _whole(work: job.Job) -> dict[str, Any]:
    return {
        **_common(work),
        "hosts": list(work.hosts),
        "metadata": {},
        "image_ids": list(work.image_ids),
    }


def _progress(event: JobEvent) -> dict[str, Any]:
    assert event.host is not None
    cells = event.job.cells[event.host]
    # As Nova counts: what was there already is as good as cached; unsupported is neither cached nor failed.
    there = (job.Result.CACHED, job.Result.EXISTING)
    return {
        **_common(event.job),
        "host": event.host,
        "images_cached": [image_id for image_id, cell in cells.items() if cell.result in there],
        "images_failed": [
            image_id for image_id, cell in cells.items() if cell.result is not None and cell.result.is_failure
        ],
        "index": event.index,
        "total": len(event.job.hosts),
    }


def _common(work: job.Job) -> dict[str, Any]:
    return {"id": None, "uuid": None, "name": work.aggregate, "job_id": work.id}
