# SPDX-License-Identifier: Apache-2.0
"""A host's side of pre-caching: works on tasks with the host's own manager, one image after the other.

The agent takes image ids and limits, and nothing else, from a conductor: where images come from, where
they are kept and how much of the disk they may take is the host's own configuration.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence

from imagecache_lib import dates, errors, manager, model
from imagecache_lib.backends.interface import Feature
from imagecache_lib.precache import client, job
from imagecache_lib.precache.passing_on import PassingOn
from imagecache_lib.precache.tasks import Attempt, Moments, Task
from imagecache_lib.precache.watch import Watch
from imagecache_lib.sources.interface import ImageSource
from imagecache_lib.store import layout
from imagecache_lib.system import durable, threads

LOG = logging.getLogger(__name__)

#: How many finished tasks an agent remembers, so that a conductor that comes back learns how they ended.
_REMEMBERED = 100

#: How many unfinished tasks an agent accepts.
_MOST_TASKS = 100

#: Seconds before an image is tried again: at first, doubled each time, and at most.
_FIRST_DELAY = 5.0
_LONGEST_DELAY = 300.0

#: Waiting is cut into pieces of so many seconds, so that a cancelled task ends soon.
_PIECE = 0.5

#: Seconds that the source may take to say what it has for a survey. A conductor waits longer.
_SURVEY_SECONDS = 10.0

#: Clocks that are further apart than so many seconds are worth a line in the log.
_SKEW = 60.0

_CANCELLED = job.Cell(job.Result.SKIPPED, "the task was cancelled")


class HostAgent:
    """Works on tasks. Safe to share between threads.

    :param cache: the host's image cache.
    :param watch: one of the manager's observers.
    :param max_bytes: the most that one task may bring onto this host's disk, in bytes, checked before each
        image against its length and what the task took so far; 0 for no limit of its own.
    :param fallbacks: sources tried when an image is gone from the manager's source.
    :param passing_on: receives images from other hosts and keeps them for others, or None on a host that does
        neither.
    """

    def __init__(
        self,
        cache: manager.ImageCacheManager,
        *,
        watch: Watch,
        max_bytes: int = 0,
        fallbacks: Sequence[ImageSource] = (),
        passing_on: PassingOn | None = None,
    ) -> None:
        self._cache = cache
        self._watch = watch
        self._max_bytes = max_bytes
        self._fallbacks = tuple(fallbacks)
        self._passing_on = passing_on
        self._host = cache.host
        self._tasks: collections.OrderedDict[str, Task] = collections.OrderedDict()
        self._lock = threading.Lock()
        #: One image at a time on this host, however many conductors ask.
        self._slot = threading.Lock()
        self._instance = durable.new_id()
        #: Set when the agent ends: its next start goes on with the downloads.
        self._ending = threading.Event()
        #: Set whenever an image ends, for the thread that waits for that.
        self.image_ended = threading.Event()

    # -- what a conductor may ask --------------------------------------------------------------------

    def info(self) -> client.AgentInfo:
        """Return which agent this is, and the time by its clock."""
        return client.AgentInfo(self._instance, self._host.clock(), relays=self._passing_on is not None)

    def survey(self, image_ids: Sequence[str]) -> client.Survey:
        """Return which of some images this host has, and how large the others are.

        :raises HostUnsupported: the host's storage clones images.
        """
        if Feature.CLONE in self._cache.backend.features:
            raise client.HostUnsupported("its storage clones images and needs no cache")
        request = model.Request(deadline=self._host.clock() + _SURVEY_SECONDS, fallbacks=self._fallbacks)
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
        """Begin to work on a task, and return at once. A task that this agent knows goes on.

        :raises ImageRejected: the task has an id that no image can have.
        :raises HostBusy: this host has too many tasks now, or can start no thread.
        :raises BackendError: the task has too many images.
        """
        for image_id in task.image_ids:
            layout.base_name(image_id)
        self._compare_clocks(task)
        moments = Moments.of(task, self._host)
        with self._lock:
            known = self._tasks.get(task.job_id)
            is_new = known is None
            if known is None:
                self._require_capacity()
                known = self._tasks[task.job_id] = Task(task, moments)
            else:
                _require_few({*known.cells, *task.image_ids})
                known.extend(task, moments)
            known.watched_until = self._host.monotonic() + client.WATCHED_SECONDS
            if known.route is not None and self._passing_on is not None:
                self._passing_on.expect(task.job_id, known.pending(task.image_ids))
            if known.thread is None and not known.is_over:
                # Not the task's before it runs: asked again, this agent would take it for one that does.
                try:
                    known.thread = threads.start(self._work, known, name=f"imagecache-task-{task.job_id}")
                except errors.BackendError as error:
                    if is_new:
                        del self._tasks[task.job_id]  # it would count as unfinished for ever
                    raise client.HostBusy(error.cause, next_step=error.next_step) from error

    def poll(self, job_id: str) -> client.TaskReport:
        """Return how far a task is.

        :raises UnknownTask: the task was never begun here, or it was begun before the agent restarted.
        """
        with self._lock:
            try:
                task = self._tasks[job_id]
            except KeyError:
                raise client.UnknownTask(f"this host knows no task of job {job_id}") from None
            task.watched_until = self._host.monotonic() + client.WATCHED_SECONDS
            return self._report(task, self._cells(task))

    def changes(self) -> Sequence[tuple[str, client.HostReport]]:
        """Return what changed since this was called last, in the tasks that a conductor watches.

        Each report comes with the mailbox that it is for.
        """
        found = []
        with self._lock:
            now = self._host.monotonic()
            for job_id, task in self._tasks.items():
                mailbox = task.report_to(now)
                if mailbox is not None and (changed := task.changes(self._cells(task))) is not None:
                    report = self._report(task, changed)
                    found.append((mailbox, client.HostReport(self._host.name, job_id, report)))
            running = [job_id for job_id, task in self._tasks.items() if not task.is_over]
        if self._passing_on is not None:
            self._passing_on.sweep(running)
        return found

    @property
    def is_relaying(self) -> bool:
        """Whether other hosts depend on how this one gets on."""
        with self._lock:
            return any(task.route is not None and not task.is_over for task in self._tasks.values())

    def _report(self, task: Task, cells: Mapping[str, job.Cell]) -> client.TaskReport:
        state = None if task.route is None else task.route.state
        return client.TaskReport(cells, self.info(), task.asked.attempt, task.number, state)

    def unsent(self, told: client.HostReport) -> None:
        """Have the content of a report, which could not be sent, reported again."""
        with self._lock:
            task = self._tasks.get(told.job_id)
            if task is not None:
                task.untold(told.report.cells)

    def _cells(self, task: Task) -> Mapping[str, job.Cell]:
        cells = dict(task.cells)
        if task.current is not None and cells[task.current].result is None:
            received, total = self._received(task.current)
            cells[task.current] = dataclasses.replace(cells[task.current], received=received, total=total)
        return cells

    def _received(self, image_id: str) -> tuple[int, int | None]:
        """Return the bytes of an image that came, and its size in bytes or None while that is not known."""
        received, total = self._watch.progress(image_id)
        if self._passing_on is not None:
            passed_on, size = self._passing_on.received(image_id)
            received, total = max(received, passed_on), total if total is not None else size
        return received, total

    def release(self, job_id: str) -> None:
        """Remove what is kept of a job's images for other hosts."""
        if self._passing_on is not None:
            self._passing_on.release(job_id)

    def cancel(self, job_id: str) -> None:
        """Stop working on a task. A task that this agent does not know is ignored."""
        with self._lock:
            task = self._tasks.get(job_id)
            if task is not None:
                task.cancelled.set()
        self.release(job_id)

    def stop(self, timeout: float | None = None) -> None:
        """Cancel all tasks and wait until they end. A conductor begins them again once the agent is back.

        What came of an image under way is left, for the next agent to go on with.

        :param timeout: seconds to wait at most. A fetch whose source hangs sees the cancellation late.
        """
        self._ending.set()
        with self._lock:
            tasks = list(self._tasks.values())
            running = [task.thread for task in tasks if task.thread is not None]
            for task in tasks:
                task.cancelled.set()
        until = None if timeout is None else time.monotonic() + timeout
        for thread in running:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        if self._passing_on is not None:
            self._passing_on.close()

    def _compare_clocks(self, task: client.HostTask) -> None:
        """Log that this host's clock differs from the conductor's, as a task's times tell."""
        for absolute, ahead in ((task.deadline, task.deadline_in), (task.pin_until, task.pin_for)):
            if absolute is None or ahead is None:
                continue
            skew = self._host.clock() + ahead - absolute
            if abs(skew) > _SKEW:
                LOG.warning(
                    "This host's clock is %+.0f s off the conductor's, the times of job %s are taken as "
                    "seconds from now",
                    skew,
                    task.job_id,
                )

    # -- the work ------------------------------------------------------------------------------------

    def _work(self, task: Task) -> None:
        while True:
            with self._lock:
                attempt = task.next(self._host.monotonic())
                if attempt is None and task.is_over:
                    task.thread = None
                    self._forget_oldest()
                    return
                pause = task.seconds_to_next(self._host.monotonic()) if attempt is None else 0.0
            if attempt is None:
                self._host.sleep(min(_PIECE, pause))
                continue
            # Held for the try alone: while a sick image waits for its retry, others have the slot.
            with self._slot:
                cell = self._cache_one(task, attempt)
            if self._passing_on is not None and cell.result is not None:
                proved = cell.result is job.Result.CACHED
                self._passing_on.ended(attempt.image_id, proved=proved)
            self._keep(task, attempt, cell)

    def _keep(self, task: Task, attempt: Attempt, cell: job.Cell) -> None:
        LOG.info(
            "Job %s, image %s: %s %s",
            attempt.asked.job_id,
            attempt.image_id,
            _value(cell.result),
            cell.reason,
        )
        failed = cell.result is None or cell.result.is_failure
        with self._lock:
            # If another attempt began meanwhile, how this one failed is history.
            if failed and task.asked.attempt != attempt.asked.attempt:
                return
            task.cells[attempt.image_id] = cell
            if cell.result is None:
                task.postpone(attempt, self._host.monotonic() + self._delay(attempt))
            else:
                self.image_ended.set()

    def _delay(self, attempt: Attempt) -> float:
        longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2**attempt.failures) * (0.5 + self._host.random() / 2)
        if attempt.moments.deadline is None:
            return float(longest)
        return float(min(longest, max(0.0, attempt.moments.deadline - self._host.monotonic())))

    def _cache_one(self, task: Task, attempt: Attempt) -> job.Cell:
        """Try an image once. Returns a cell without a result if it is to be tried again."""
        if attempt.cancelled.is_set():
            return _CANCELLED
        if attempt.is_late(self._host.monotonic()) and not attempt.failures:
            return job.Cell(job.Result.SKIPPED, "the deadline passed before it was begun")
        try:
            return self._try(task, attempt)
        except errors.CancelledError:
            return _CANCELLED
        except (errors.SourceError, errors.LockTimeoutError) as error:
            if attempt.failures >= attempt.asked.retries or attempt.is_late(self._host.monotonic()):
                return self._failure(attempt.image_id, error)
            return job.Cell(reason=f"to be tried again: {error}")
        except errors.ImageCacheError as error:
            return self._failure(attempt.image_id, error)
        except Exception as error:
            LOG.exception("Pre-caching image %s failed", attempt.image_id)
            return job.Cell(job.Result.ERROR, f"{type(error).__name__}: {error}")

    def _try(self, task: Task, attempt: Attempt) -> job.Cell:
        image_id, asked = attempt.image_id, attempt.asked
        times = attempt.moments.by_the_clock(self._host)
        self._watch.forget(image_id)
        relayed = None
        if task.route is not None and self._passing_on is not None:
            relayed = self._passing_on.source(task.route, attempt, times.deadline)
        request = model.Request(
            source=relayed,
            deadline=times.deadline,
            cancel=attempt.cancelled,
            # What fills a spool keeps to the rate itself: what is read from it is on this host already.
            rate=asked.rate or None if relayed is None else None,
            fallbacks=self._fallbacks,
            hash_pieces=relayed is not None,
            # What other hosts pass on is kept in a spool, which is what goes on.
            resume=self._ending if relayed is None else None,
        )
        self._require_budget(task, image_id, request)
        report = self._cache.precache_image(image_id, pin_until=times.pin_until, request=request)
        if report.result is model.CacheResult.NOT_NEEDED:
            return job.Cell(job.Result.UNSUPPORTED, "its storage clones images and needs no cache")
        task.spent += report.allocated
        if self._passing_on is not None:
            task.spent += self._passing_on.allocated(image_id)
        received, total = self._received(image_id)
        return job.Cell(job.Result(report.result.value), "", max(received, report.received), total)

    def _require_budget(self, task: Task, image_id: str, request: model.Request) -> None:
        if not self._max_bytes or self._cache.is_cached(image_id):
            return
        size = self._cache.describe_image(image_id, request=request).size or 0
        if task.route is not None and self._passing_on is not None:
            size *= 2  # it is kept once more, for the hosts behind this one
        if task.spent + size > self._max_bytes:
            raise errors.BackendError(
                f"with its {dates.size(size)} the job would take more than the "
                f"{dates.size(self._max_bytes)} that this host allows a job",
                image=image_id,
                next_step="ask for fewer images, or raise the host's limit",
            )

    def _failure(self, image_id: str, error: errors.ImageCacheError) -> job.Cell:
        received, total = self._received(image_id)
        return job.Cell(job.Result.ERROR, str(error), received, total)

    # -- limits --------------------------------------------------------------------------------------

    def _free(self) -> int:
        found = os.statvfs(self._cache.config.base_path)
        return found.f_bavail * found.f_frsize

    def _require_capacity(self) -> None:
        if sum(not task.is_over for task in self._tasks.values()) >= _MOST_TASKS:
            raise client.HostBusy(
                f"the host has {_MOST_TASKS} unfinished tasks", next_step="wait until some of them are done"
            )

    def _forget_oldest(self) -> None:
        for job_id in [each for each, task in self._tasks.items() if task.is_over][:-_REMEMBERED]:
            del self._tasks[job_id]


def _require_few(image_ids: Collection[str]) -> None:
    if len(image_ids) > job.MOST_IMAGES:
        raise errors.BackendError(
            f"a task has {job.MOST_IMAGES} images at most", next_step="begin another job for the others"
        )


def _value(result: job.Result | None) -> str:
    return result.value if result is not None else ""
