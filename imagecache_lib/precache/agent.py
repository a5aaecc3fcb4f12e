# SPDX-License-Identifier: Apache-2.0
"""A host's side of pre-caching: works on tasks with the host's own manager, one image after the other.

The agent takes image ids and limits, and nothing else, from whoever asks: where images come from, where
they are kept and how much of the disk they may take is the host's own configuration.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import random as random_module
import threading
from collections.abc import Callable, Collection, Mapping, Sequence

from imagecache_lib import errors, events, manager, model
from imagecache_lib.backends.interface import Feature
from imagecache_lib.precache import client, job
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.store import layout

LOG = logging.getLogger(__name__)

#: How many finished tasks an agent remembers, so that a conductor that comes back learns how they ended.
_REMEMBERED = 100

#: How many unfinished tasks an agent accepts.
_MOST_TASKS = 100

#: Seconds before an image is tried again: at first, doubled each time, and at most.
_FIRST_DELAY = 5.0
_LONGEST_DELAY = 300.0

#: Seconds that the source may take to say what it has, when somebody only wants to know.
_SURVEY_PATIENCE = 20.0

_CANCELLED = job.Cell(job.Result.SKIPPED, "the task was cancelled")


class Watch:
    """An observer that knows how far images are. Give it to the manager and to its agent."""

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

    def far(self, image_id: str) -> tuple[int, int | None]:
        """Return the bytes of an image that came, and those it has in all."""
        with self._lock:
            return self._seen.get(image_id, (0, None))


class _Task:
    """A task at work. Guarded by the agent's lock."""

    def __init__(self, asked: client.HostTask) -> None:
        self.asked = asked
        self.cells = {image_id: job.Cell() for image_id in asked.image_ids}
        self.cancelled = threading.Event()
        self.thread: threading.Thread | None = None
        self.current: str | None = None
        self.spent = 0

    @property
    def is_over(self) -> bool:
        return all(cell.result is not None for cell in self.cells.values())

    def extend(self, asked: client.HostTask) -> None:
        """Go on with what is asked now: more images, or another attempt at those that failed."""
        again = asked.attempt > self.asked.attempt
        for image_id in asked.image_ids:
            cell = self.cells.setdefault(image_id, job.Cell())
            if again and cell.result is not None and cell.result.is_failure:
                self.cells[image_id] = job.Cell()
        if again:
            self.asked = asked
            self.cancelled = threading.Event()

    def next(self) -> str | None:
        return next((image_id for image_id, cell in self.cells.items() if cell.result is None), None)


class HostAgent:
    """Works on tasks. Safe to share between threads.

    :param cache: the host's image cache.
    :param watch: one of the manager's observers.
    :param max_bytes: the most that one task may bring onto this host's disk, in bytes, checked before each
        image against its length and what the task took so far. 0: no limit of its own.
    :param fallbacks: sources tried when an image is gone from the manager's.
    :param random: uniform in [0, 1), for the back-off's jitter.
    """

    def __init__(
        self,
        cache: manager.ImageCacheManager,
        *,
        watch: Watch,
        max_bytes: int = 0,
        fallbacks: Sequence[ImageSource] = (),
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self._cache = cache
        self._watch = watch
        self._max_bytes = max_bytes
        self._fallbacks = tuple(fallbacks)
        self._random = random
        self._host = cache.host
        self._tasks: collections.OrderedDict[str, _Task] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()

    # -- what a conductor may ask --------------------------------------------------------------------

    def survey(self, image_ids: Sequence[str]) -> client.Survey:
        """Say what is here of some images, and how large the others are.

        :raises HostUnsupported: the host's storage clones images.
        """
        if Feature.CLONE in self._cache.backend.features:
            raise client.HostUnsupported("its storage clones images and needs no cache")
        request = model.Request(deadline=self._host.clock() + _SURVEY_PATIENCE, fallbacks=self._fallbacks)
        present, problems = [], {}
        missing: dict[str, int | None] = {}
        for image_id in image_ids:
            try:
                if self._cache.is_cached(image_id):
                    present.append(image_id)
                else:
                    missing[image_id] = self._cache.describe_image(image_id, request=request).size
            except errors.ImageCacheError as error:
                problems[image_id] = str(error)
        return client.Survey(tuple(present), missing, self._free(), problems)

    def begin(self, task: client.HostTask) -> None:
        """Work on a task; one that is known goes on.

        :raises ImageRejected: an id that no image can have.
        :raises BackendError: this host has too many tasks, or the task too many images.
        """
        for image_id in task.image_ids:
            layout.base_name(image_id)
        with self._lock:
            known = self._tasks.get(task.job_id)
            if known is None:
                self._require_room()
                known = self._tasks[task.job_id] = _Task(task)
            else:
                _require_few({*known.cells, *task.image_ids})
                known.extend(task)
            if known.thread is None and not known.is_over:
                known.thread = threading.Thread(
                    target=self._work, args=(known,), name=f"imagecache-task-{task.job_id}", daemon=True
                )
                known.thread.start()

    def poll(self, job_id: str) -> Mapping[str, job.Cell]:
        """Return how far a task is, by image id.

        :raises UnknownTask: it was never begun here, or before a restart.
        """
        with self._lock:
            try:
                task = self._tasks[job_id]
            except KeyError:
                raise client.UnknownTask(f"this host knows no task of job {job_id}") from None
            cells = dict(task.cells)
            current = task.current
        if current is not None and cells[current].result is None:
            received, total = self._watch.far(current)
            cells[current] = dataclasses.replace(cells[current], received=received, total=total)
        return cells

    def cancel(self, job_id: str) -> None:
        """Stop working on a task."""
        with self._lock:
            task = self._tasks.get(job_id)
            if task is not None:
                task.cancelled.set()

    def stop(self) -> None:
        """Cancel everything and wait for it. A conductor begins it again once the agent is back."""
        with self._lock:
            tasks = list(self._tasks.values())
            threads = [task.thread for task in tasks if task.thread is not None]
            for task in tasks:
                task.cancelled.set()
        for thread in threads:
            thread.join()

    # -- the work ------------------------------------------------------------------------------------

    def _work(self, task: _Task) -> None:
        while True:
            with self._lock:
                image_id = task.current = task.next()
                if image_id is None:
                    task.thread = None
                    self._forget_oldest()
                    return
                asked, cancelled = task.asked, task.cancelled
            # One image at a time on this host, however many conductors ask.
            with self._one_at_a_time:
                cell = self._cache_one(task, asked, cancelled, image_id)
            LOG.info("Job %s, image %s: %s %s", asked.job_id, image_id, _value(cell.result), cell.reason)
            with self._lock:
                # If another attempt began meanwhile, how this one failed is history.
                failed = cell.result is not None and cell.result.is_failure
                if not (failed and task.asked.attempt != asked.attempt):
                    task.cells[image_id] = cell

    def _cache_one(
        self, task: _Task, asked: client.HostTask, cancelled: threading.Event, image_id: str
    ) -> job.Cell:
        for attempt in range(asked.retries + 1):
            if cancelled.is_set():
                return _CANCELLED
            if asked.deadline is not None and self._host.clock() >= asked.deadline and attempt == 0:
                return job.Cell(job.Result.SKIPPED, "the deadline passed before it was begun")
            try:
                return self._try(task, asked, cancelled, image_id)
            except errors.CancelledError:
                return _CANCELLED
            except (errors.SourceError, errors.LockTimeoutError) as error:
                late = asked.deadline is not None and self._host.clock() >= asked.deadline
                if attempt == asked.retries or late:
                    return self._failure(image_id, error)
                self._note(task, image_id, f"to be tried again: {error}")
                self._pause(cancelled, attempt, asked.deadline)
            except errors.ImageCacheError as error:
                return self._failure(image_id, error)
            except Exception as error:
                LOG.exception("Pre-caching image %s failed", image_id)
                return job.Cell(job.Result.ERROR, f"{type(error).__name__}: {error}")
        raise AssertionError("the last attempt returns")

    def _try(
        self, task: _Task, asked: client.HostTask, cancelled: threading.Event, image_id: str
    ) -> job.Cell:
        self._watch.forget(image_id)
        request = model.Request(
            deadline=asked.deadline, cancel=cancelled, rate=asked.rate or None, fallbacks=self._fallbacks
        )
        self._require_budget(task, image_id, request)
        report = self._cache.precache_image(image_id, pin_until=asked.pin_until, request=request)
        if report.result is model.CacheResult.NOT_NEEDED:
            return job.Cell(job.Result.UNSUPPORTED, "its storage clones images and needs no cache")
        task.spent += report.allocated
        received, total = self._watch.far(image_id)
        return job.Cell(job.Result(report.result.value), "", max(received, report.received), total)

    def _require_budget(self, task: _Task, image_id: str, request: model.Request) -> None:
        if not self._max_bytes or self._cache.is_cached(image_id):
            return
        size = self._cache.describe_image(image_id, request=request).size or 0
        if task.spent + size > self._max_bytes:
            raise errors.BackendError(
                f"with its {size} bytes the job would take more than the {self._max_bytes} that this host "
                "allows a job",
                image=image_id,
                next_step="ask for fewer images, or raise the host's limit",
            )

    def _failure(self, image_id: str, error: errors.ImageCacheError) -> job.Cell:
        received, total = self._watch.far(image_id)
        return job.Cell(job.Result.ERROR, str(error), received, total)

    def _pause(self, cancelled: threading.Event, attempt: int, deadline: float | None) -> None:
        longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2**attempt)
        until = self._host.clock() + longest * (0.5 + self._random() / 2)
        if deadline is not None:
            until = min(until, deadline)
        while not cancelled.is_set() and (left := until - self._host.clock()) > 0:
            self._host.sleep(min(0.5, left))

    def _note(self, task: _Task, image_id: str, reason: str) -> None:
        LOG.warning("Job %s, image %s: %s", task.asked.job_id, image_id, reason)
        with self._lock:
            task.cells[image_id] = job.Cell(reason=reason)

    # -- room ----------------------------------------------------------------------------------------

    def _free(self) -> int:
        found = os.statvfs(self._cache.config.base_path)
        return found.f_bavail * found.f_frsize

    def _require_room(self) -> None:
        if sum(not task.is_over for task in self._tasks.values()) >= _MOST_TASKS:
            raise errors.BackendError(
                f"the host has {_MOST_TASKS} unfinished tasks", next_step="wait until some of them are done"
            )

    def _forget_oldest(self) -> None:
        for job_id in [each for each, task in self._tasks.items() if task.is_over][:-_REMEMBERED]:
            del self._tasks[job_id]


def _require_few(image_ids: Collection[str]) -> None:
    if len(image_ids) > client.MOST_IMAGES:
        raise errors.BackendError(
            f"a task has {client.MOST_IMAGES} images at most", next_step="begin another job for the others"
        )


def _value(result: job.Result | None) -> str:
    return result.value if result is not None else ""
