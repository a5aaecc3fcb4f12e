# SPDX-License-Identifier: Apache-2.0
"""Metrics for Prometheus (the extra ``prometheus``): an observer that counts.

A driver that serves metrics itself gives its registry. One that does not writes a file for node_exporter's
textfile collector instead, or lets the agent serve them.
"""

from __future__ import annotations

import importlib.metadata
import math
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
    :param clock: epoch seconds.
    :param counting: False for a process that soon ends, whose counters would begin at 0 each time: only
        gauges.
    :param filesystem: a path whose filesystem is looked at each time that the metrics are read; or None for
        its size and free bytes as they were at the last survey.
    """

    def __init__(
        self,
        registry: prometheus_client.CollectorRegistry | None = None,
        *,
        clock: Callable[[], float] = time.time,
        counting: bool = True,
        filesystem: str | None = None,
    ) -> None:
        self.registry = registry or prometheus_client.REGISTRY
        self._clock = clock
        self._counting = prometheus_client.CollectorRegistry() if not counting else self.registry
        self._counters = {
            kind: self._counter(*kind.counter) for kind in events.KINDS if kind.counter is not None
        }
        self._received = self._counter("fetched_bytes", "Bytes that came over the wire")
        self._reclaimed = self._counter("evicted_bytes", "Bytes on disk that eviction gave back")
        self._fetch = prometheus_client.Histogram(
            f"{_PREFIX}_fetch_seconds",
            "From the first request for an image to its last byte on disk",
            buckets=_FETCH_BUCKETS,
            registry=self._counting,
        )
        self._bases = self._gauge("bases", "Base images after the last pass")
        self._allocated = self._gauge("bases_bytes", "Bytes on disk of all base images after the last pass")
        self._problems = self._gauge("problems", "What needs an operator, after the last pass")
        self._passed = self._gauge("last_pass_timestamp_seconds", "When the last pass ended")
        self._filesystem = filesystem
        self._size = self._gauge("filesystem_size_bytes", "Size of the cache's filesystem")
        self._free = self._gauge("filesystem_free_bytes", "What the service may still allocate of it")
        if filesystem is not None:
            self._size.set_function(lambda: _filesystem(filesystem)[0])
            self._free.set_function(lambda: _filesystem(filesystem)[1])
        self._reserved = self._gauge("reserved_bytes", "Promised to images in flight, and not allocated yet")
        self._bytes = self._gauge("bytes", "Bytes on disk by what keeps them", "state")
        self._images = self._gauge("images", "Base images by what keeps them", "state")
        self._damaged = self._gauge("damaged_bases", "Base images in the cache that a scrub found damaged")
        self._scrubbed = self._gauge(
            "last_scrub_timestamp_seconds", "When a scrub of the whole cache last ended"
        )
        # Every reason from the start: a series that begins at 1 has no increase.
        self._evicted = self._counter("evicted", "Base images removed, by why", "reason")
        for reason in (*dict.fromkeys(word for _part, word in _REASONS), _UNFIT):
            self._evicted.labels(reason)
        self._failed = self._counter("fetch_errors", "Base images that could not be had, by why", "reason")
        for kind in events.FetchFailed.KINDS:
            self._failed.labels(kind)
        build = self._gauge("build_info", "Always 1; which release this is", "version")
        build.labels(importlib.metadata.version("imagecache-lib")).set(1)

    def __call__(self, event: events.Event) -> None:
        counter = self._counters.get(type(event))
        if counter is not None:
            counter.inc()
        match event:
            case events.Fetched(received=received, seconds=seconds):
                self._received.inc(received)
                self._fetch.observe(seconds)
            case events.Evicted(allocated=allocated, reason=reason):
                self._reclaimed.inc(allocated)
                self._evicted.labels(_why_evicted(reason)).inc()
            case events.FetchFailed(kind=kind):
                self._failed.labels(kind).inc()
            case events.PassFinished(kept=kept, allocated=allocated, problems=problems):
                self._bases.set(kept)
                self._allocated.set(allocated)
                self._problems.set(len(problems))
                self._passed.set(self._clock())
            case events.Surveyed():
                self._see(event)

    def _see(self, seen: events.Surveyed) -> None:
        """Set the gauges of what is known now."""
        if self._filesystem is None:
            self._size.set(seen.size)
            self._free.set(seen.free)
        self._reserved.set(seen.reserved)
        for state, allocated in seen.allocated.items():
            self._bytes.labels(state).set(allocated)
        for state, count in seen.images.items():
            self._images.labels(state).set(count)
        self._damaged.set(seen.damaged)
        if seen.last_scrub is not None:
            self._scrubbed.set(seen.last_scrub)

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

    def _counter(self, name: str, text: str, *labels: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"{_PREFIX}_{name}", text, labels, registry=self._counting)

    def _gauge(self, name: str, text: str, *labels: str) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(f"{_PREFIX}_{name}", text, labels, registry=self.registry)


#: What an eviction's reason contains, and the word that metrics have for it.
_REASONS = (
    ("damaged", "damaged"),
    ("asked for", "asked"),
    ("needs the room", "space"),
    ("max_cache_size", "space"),
    ("free_space_low", "space"),
    ("in the trash", "interrupted"),
    ("unused since", "age"),
)
#: The word where none of these fits: the base did not serve what was asked for.
_UNFIT = "unfit"


def _why_evicted(reason: str) -> str:
    return next((word for part, word in _REASONS if part in reason), _UNFIT)


def _filesystem(path: str) -> tuple[float, float]:
    """Return a filesystem's size and what may still be allocated of it, in bytes. NaN: nobody can tell."""
    try:
        status = os.statvfs(path)
    except OSError:
        return math.nan, math.nan
    return float(status.f_blocks * status.f_frsize), float(status.f_bavail * status.f_frsize)
