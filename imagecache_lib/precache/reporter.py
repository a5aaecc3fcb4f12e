# SPDX-License-Identifier: Apache-2.0
"""Sends what changed on a host to the conductors that watch it: at once when an image ends, else regularly.

One thread for the whole agent. The work never waits for it: what cannot be sent now is sent with what changes
next, and a conductor that hears nothing asks.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.precache import client
from imagecache_lib.precache.agent import HostAgent
from imagecache_lib.system import threads

LOG = logging.getLogger(__name__)

#: Seconds between two reports while no image ends. With the time that a report travels, what the conductor
#: knows is five seconds old at most.
REPORT_SECONDS = 4.0

#: The same while other hosts depend on this one: a slow host holds up everyone behind it.
RELAY_SECONDS = 1.5

#: Seconds between two reports when images end one right after the other.
_BREATH = 0.25

#: Seconds that the end of the agent waits for a report under way: a message bus may take none.
_STOP_SECONDS = 0.5


class Sender(Protocol):
    """Brings reports to conductors."""

    def send(self, mailbox: str, told: client.HostReport) -> None:
        """Send a report, and do not wait for an answer.

        :raises ImageCacheError: the report could not be sent.
        """


class Reporter:
    """Reports for one agent.

    :param period: seconds between two reports while no image ends.
    """

    def __init__(self, agent: HostAgent, sender: Sender, *, period: float = REPORT_SECONDS) -> None:
        self._agent = agent
        self._sender = sender
        self._period = period
        self._stop = threading.Event()
        self._failing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to report, in a thread, and return at once. Does nothing if that has begun.

        :raises BackendError: no thread can be started.
        """
        if self._thread is None:
            self._thread = threads.start(self._run, name="imagecache-reports")

    def stop(self) -> None:
        """Stop reporting: what the end of the agent cancels is no result."""
        self._stop.set()
        self._agent.image_ended.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        while not self._stop.is_set():
            period = min(self._period, RELAY_SECONDS) if self._agent.is_relaying else self._period
            self._agent.image_ended.wait(period)
            self._agent.image_ended.clear()
            if self._stop.is_set():
                return
            self.report()
            self._stop.wait(_BREATH)

    def report(self) -> None:
        """Send what changed since the last report."""
        for mailbox, told in self._agent.changes():
            try:
                self._sender.send(mailbox, told)
            except errors.ImageCacheError as error:
                self._agent.unsent(told)
                if not self._failing:
                    LOG.warning("Conductors are not told what changes, they have to ask: %s", error)
                self._failing = True
            else:
                self._failing = False
