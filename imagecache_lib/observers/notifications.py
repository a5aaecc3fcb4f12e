# SPDX-License-Identifier: Apache-2.0
"""Notifications on the message bus (the extra ``messaging``): an observer that tells what changed.

Event types are ``imagecache.<what>``, such as ``imagecache.fetched``. The payload has the event's fields and
the host's name.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import oslo_messaging

from imagecache_lib import events
from imagecache_lib.system import threads

LOG = logging.getLogger(__name__)

#: oslo.messaging's priorities, by the level of an event. Hits, misses and progress, below, are metrics.
_PRIORITIES = {logging.INFO: "info", logging.WARNING: "warn", logging.ERROR: "error"}

#: Where a capital letter begins another word of a class's name.
_WORD = re.compile(r"(?<!^)(?=[A-Z])")


class NotificationObserver:
    """Sends events through an oslo.messaging notifier. Safe to share between threads.

    A bus that does not answer costs one WARNING, until it answers again, and no spawn.

    :param notifier: best made by :func:`notifier`.
    :param host: the host's name, for the payload.
    """

    def __init__(self, notifier: oslo_messaging.Notifier, *, host: str) -> None:
        self._notifier = notifier
        self._host = host
        self._lock = threads.lock()
        self._failing = False

    def __call__(self, event: events.Event) -> None:
        priority = _PRIORITIES.get(event.level)
        if priority is None:
            return
        what = _WORD.sub("_", type(event).__name__).lower()
        payload: dict[str, Any] = {"host": self._host, **dataclasses.asdict(event)}
        try:
            getattr(self._notifier, priority)({}, f"imagecache.{what}", payload)
        except Exception as error:
            # The driver decides which errors it raises: kombu's, amqp's, confluent_kafka's.
            self._note_failure(error)
        else:
            with self._lock:
                self._failing = False

    def _note_failure(self, error: Exception) -> None:
        with self._lock:
            known, self._failing = self._failing, True
        level = logging.DEBUG if known else logging.WARNING
        LOG.log(level, "Notifications are not sent until the message bus answers again: %s", error)


def notifier(
    transport: oslo_messaging.Transport, *, host: str, driver: str | None = None
) -> oslo_messaging.Notifier:
    """Return a notifier that sends as this host.

    :param transport: from :func:`oslo_messaging.get_notification_transport`. Its configuration says to which
        topics.
    :param driver: name of an oslo.messaging driver, such as ``messagingv2``, or None for the configuration's.
    """
    # Without a retry: observers run in the thread that spawns.
    return oslo_messaging.Notifier(transport, publisher_id=f"imagecache.{host}", driver=driver, retry=0)
