# SPDX-License-Identifier: Apache-2.0
"""One run of a job: so many hosts at a time are begun and watched until everything has a result.

A host that is down gives its turn to another and comes back later. One that was at work and falls silent
keeps its turn for a while: its download goes on, and the job's rate was shared out with it in mind.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import random as random_module
import threading
from collections.abc import Callable

from imagecache_lib import errors, model
from imagecache_lib.precache import client, job
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.system.host import System

LOG = logging.getLogger(__name__)

#: Seconds between two looks at a host that works, and at one that is down.
POLL = 1.0
POLL_DOWN = 5.0

#: Seconds for which a host that was at work and does not answer keeps its turn.
SILENCE = 60.0

#: Without a deadline, a host that is down is given up after so many seconds.
PATIENCE = 600.0

#: Seconds after the deadline in which a host may still say itself how its images ended.
GRACE = 15.0


@dataclasses.dataclass
class _Turn:
    """A host that is not done.

    :param not_before: epoch seconds of the next try.
    :param begun: it has the task, as far as is known.
    :param down_since: epoch seconds. None: it answers.
    :param why_down: what it failed with.
    """

    name: str
    not_before: float
    begun: bool = False
    down_since: float | None = None
    why_down: str = ""


class JobRun:
    """Works on one job.

    :param done: called with a host whose images all have a result.
    :param leave: once it is set, the run returns, and the hosts go on by themselves.
    :param random: uniform in [0, 1).
    """

    def __init__(
        self,
        work: job.Job,
        database: JobDatabase,
        hosts: client.HostClient,
        *,
        host: System,
        done: Callable[[str], None],
        leave: model.CancelToken,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self._work = work
        self._database = database
        self._hosts = hosts
        self._host = host
        self._done = done
        self._leave = leave
        self._random = random
        self._lock = threading.Lock()
        now = host.clock()
        self._turns = [
            _Turn(name, now + random() * work.terms.jitter) for name in work.hosts if work.pending(name)
        ]

    def execute(self) -> None:
        """Return when every image on every host has a result, or when it shall leave.

        :raises ConfigError: the database failed.
        """
        workers = max(1, min(self._work.terms.concurrency, len(self._turns)))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for worker in [pool.submit(self._serve) for _ in range(workers)]:
                worker.result()

    def _serve(self) -> None:
        while (turn := self._take()) is not None:
            self._sleep_until(turn.not_before)
            if self._leave.is_set():
                return
            if self._bring(turn):
                self._done(turn.name)
            else:
                with self._lock:
                    self._turns.append(turn)

    def _take(self) -> _Turn | None:
        """Return the host that may be tried first. None: others have all that are left."""
        with self._lock:
            if not self._turns:
                return None
            first = min(self._turns, key=lambda turn: turn.not_before)
            self._turns.remove(first)
            return first

    # -- one host ------------------------------------------------------------------------------------

    def _bring(self, turn: _Turn) -> bool:
        """Bring a host's images to a result, whatever happens. False: they have none yet."""
        try:
            return self._follow(turn)
        except client.HostUnsupported as error:
            self._end(turn, job.Result.UNSUPPORTED, str(error))
        except errors.ImageCacheError as error:
            self._end(turn, job.Result.ERROR, str(error))
        except Exception as error:
            # Nothing may be lost in silence: the host gets a result, and the log the traceback.
            LOG.exception("Pre-caching host %s failed", turn.name)
            self._end(turn, job.Result.ERROR, f"{type(error).__name__}: {error}")
        return True

    def _follow(self, turn: _Turn) -> bool:
        while pending := self._database.pending(self._work.id, turn.name):
            if self._leave.is_set():
                return False
            if self._database.is_cancelled(self._work.id):
                self._cancel(turn, job.Result.SKIPPED, "the job was cancelled")
            elif self._is_too_late(turn):
                self._give_up(turn)
            else:
                try:
                    self._look(turn, pending)
                except client.UnknownTask:
                    turn.begun = False
                except client.HostDown as error:
                    if self._is_down(turn, error):
                        return False
                    continue
                if self._database.pending(self._work.id, turn.name):
                    self._host.sleep(POLL * (0.5 + self._random()))
        return True

    def _look(self, turn: _Turn, pending: tuple[str, ...]) -> None:
        if not turn.begun:
            self._hosts.begin(turn.name, self._task(pending))
            turn.begun = True
        found = self._hosts.poll(turn.name, self._work.id)
        if turn.down_since is not None:
            LOG.info("Host %s answers again", turn.name)
            turn.down_since = None
        self._database.record(self._work.id, turn.name, found)
        if not set(pending) <= set(found):
            turn.begun = False

    def _is_down(self, turn: _Turn, error: client.HostDown) -> bool:
        """Note that a host does not answer. True: it gives its turn away."""
        now = self._host.clock()
        if turn.down_since is None:
            turn.down_since = now
            LOG.warning("Host %s does not answer, to be tried again: %s", turn.name, error)
        turn.why_down = str(error)
        self._database.explain(self._work.id, turn.name, f"the host is down: {error}")
        if not turn.begun or now - turn.down_since > SILENCE:
            turn.not_before = now + self._down_delay()
            return True
        self._host.sleep(self._down_delay())
        return False

    def _down_delay(self) -> float:
        return POLL_DOWN * (0.5 + self._random())

    def _is_too_late(self, turn: _Turn) -> bool:
        now = self._host.clock()
        deadline = self._work.terms.deadline
        if deadline is not None:
            return now >= (deadline if turn.down_since is not None or not turn.begun else deadline + GRACE)
        return turn.down_since is not None and now - turn.down_since >= PATIENCE

    def _give_up(self, turn: _Turn) -> None:
        if turn.down_since is not None:
            self._end(turn, job.Result.SKIPPED, f"the host is down: {turn.why_down}")
        elif not turn.begun:
            self._end(turn, job.Result.SKIPPED, "the deadline passed before it was the host's turn")
        else:
            self._cancel(turn, job.Result.ERROR, "the deadline passed while the host was at work")

    def _cancel(self, turn: _Turn, result: job.Result, reason: str) -> None:
        try:
            self._hosts.cancel(turn.name, self._work.id)
        except errors.ImageCacheError as error:
            reason = f"{reason}, and the host could not be told: {error}"
        self._end(turn, result, reason)

    def _end(self, turn: _Turn, result: job.Result, reason: str) -> None:
        LOG.warning("Job %s ends on host %s: %s, %s", self._work.id, turn.name, result.value, reason)
        self._database.explain(self._work.id, turn.name, reason, result)

    def _task(self, pending: tuple[str, ...]) -> client.HostTask:
        terms = self._work.terms
        return client.HostTask(
            self._work.id,
            pending,
            attempt=self._work.attempt,
            rate=terms.rate(len(self._work.hosts)),
            deadline=terms.deadline,
            pin_until=terms.pin_until,
            retries=terms.retries,
        )

    def _sleep_until(self, moment: float) -> None:
        while (left := moment - self._host.clock()) > 0:
            if self._leave.is_set() or self._database.is_cancelled(self._work.id):
                return
            self._host.sleep(min(POLL, left))
