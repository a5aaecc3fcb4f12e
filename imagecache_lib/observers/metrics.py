# SPDX-License-Identifier: Apache-2.0
"""Metrics for Prometheus (the extra ``prometheus``): an observer that counts.

A driver that serves metrics itself gives its registry. One that does not writes a file for node_exporter's
textfile collector instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import prometheus_client

from imagecache_lib import errors, events

_PREFIX = "imagecache"

#: Fetching an image takes from a moment to an hour.
_FETCH_BUCKETS = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


class MetricsObserver:
    """Counts events. Safe to share between threads; all managers of a process may share one.

    :param registry: the registry that gets the metrics, or None for the process's own. A registry takes each
        name once.
    :param clock: returns epoch seconds.
    """

    def __init__(
        self,
        registry: prometheus_client.CollectorRegistry | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = registry or prometheus_client.REGISTRY
        self._clock = clock
        self._counters = {
            kind: self._counter(*kind.counter) for kind in events.KINDS if kind.counter is not None
        }
        self._received = self._counter("fetched_bytes", "Bytes that came over the wire")
        self._reclaimed = self._counter("evicted_bytes", "Bytes on disk that eviction gave back")
        self._fetch = prometheus_client.Histogram(
            f"{_PREFIX}_fetch_seconds",
            "From the first request for an image to its last byte on disk",
            buckets=_FETCH_BUCKETS,
            registry=self.registry,
        )
        self._bases = self._gauge("bases", "Base images after the last pass")
        self._allocated = self._gauge("bases_bytes", "Bytes on disk of all base images after the last pass")
        self._problems = self._gauge("problems", "What needs an operator, after the last pass")
        self._passed = self._gauge("last_pass_timestamp_seconds", "When the last pass ended")

    def __call__(self, event: events.Event) -> None:
        counter = self._counters.get(type(event))
        if counter is not None:
            counter.inc()
        match event:
            case events.Fetched(received=received, seconds=seconds):
                self._received.inc(received)
                self._fetch.observe(seconds)
            case events.Evicted(allocated=allocated):
                self._reclaimed.inc(allocated)
            case events.PassFinished(kept=kept, allocated=allocated, problems=problems):
                self._bases.set(kept)
                self._allocated.set(allocated)
                self._problems.set(len(problems))
                self._passed.set(self._clock())

    def write_textfile(self, path: str | os.PathLike[str]) -> None:
        """Write all metrics of the registry into a file, which is replaced in one step.

        :param path: path of a file in the directory of node_exporter's textfile collector; its name must
            end in ``.prom``.
        :raises ConfigError: the file cannot be written.
        """
        try:
            prometheus_client.write_to_textfile(os.fspath(path), self.registry)
        except OSError as error:
            raise errors.ConfigError(
                f"the metrics cannot be written: {error.strerror}",
                path=os.fspath(path),
                next_step="check the directory and its owner",
            ) from error

    def _counter(self, name: str, text: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"{_PREFIX}_{name}", text, registry=self.registry)

    def _gauge(self, name: str, text: str) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(f"{_PREFIX}_{name}", text, registry=self.registry)
