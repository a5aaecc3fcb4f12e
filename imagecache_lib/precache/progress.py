# SPDX-License-Identifier: Apache-2.0
"""How far a job is that runs in this process: in memory, with what the database does not know yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from imagecache_lib.precache import job
from imagecache_lib.precache.job import Cell

#: A host and an image of the job.
Key = tuple[str, str]


class JobProgress:
    """The cells of one job. One thread changes them; others may look at :attr:`job` meanwhile.

    :param work: the job as the database has it.
    """

    def __init__(self, work: job.Job) -> None:
        self._cells: dict[str, Mapping[str, Cell]] = dict(work.cells)
        self._open = {
            host: sum(cell.result is None for cell in cells.values()) for host, cells in work.cells.items()
        }
        self._changed: dict[Key, None] = {}
        #: The job, with a view of its cells: it goes on changing.
        self.job = dataclasses.replace(work, cells=MappingProxyType(self._cells))
        #: How many hosts are over.
        self.hosts_over = sum(not count for count in self._open.values())

    @property
    def is_over(self) -> bool:
        """Whether every image on every host has a result."""
        return self.hosts_over == len(self._open)

    @property
    def has_changes(self) -> bool:
        """Whether cells changed since :meth:`take_changes`."""
        return bool(self._changed)

    def is_host_over(self, host: str) -> bool:
        """Whether every image on a host has a result."""
        return not self._open[host]

    def pending(self, host: str) -> tuple[str, ...]:
        """Return the images that have no result on a host yet."""
        return self.job.pending(host) if self._open[host] else ()

    def record(self, host: str, cells: Mapping[str, Cell]) -> int:
        """Record how far a host is. A result that is there stays. Returns how many results are new."""
        known, fresh = self._cells[host], 0
        news = {}
        for image_id, cell in cells.items():
            before = known.get(image_id)
            if before is None or before.result is not None or before == cell:
                continue
            news[image_id] = cell.storable()
            fresh += cell.result is not None
        if news:
            self._cells[host] = {**known, **news}
            self._changed.update(dict.fromkeys((host, image_id) for image_id in news))
        if fresh:
            self._open[host] -= fresh
            self.hosts_over += not self._open[host]
        return fresh

    def set_reason(self, host: str, reason: str) -> None:
        """Set the reason of all images that have no result on a host."""
        known = self._cells[host]
        self.record(
            host, {each: dataclasses.replace(known[each], reason=reason) for each in self.pending(host)}
        )

    def finish(self, host: str, result: job.Result, reason: str) -> None:
        """Give the same result and reason to all images that have no result on a host."""
        known = self._cells[host]
        ended = {
            image_id: dataclasses.replace(known[image_id], result=result, reason=reason)
            for image_id in self.pending(host)
        }
        self.record(host, ended)

    def take_changes(self) -> Mapping[Key, Cell]:
        """Return the cells that changed since the last call."""
        changed, self._changed = self._changed, {}
        return {(host, image_id): self._cells[host][image_id] for host, image_id in changed}

    def put_back(self, keys: Iterable[Key]) -> None:
        """Count cells as changed again, since they could not be stored."""
        self._changed = {**dict.fromkeys(keys), **self._changed}
