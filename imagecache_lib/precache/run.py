# SPDX-License-Identifier: Apache-2.0
"""One run of a job: so many hosts at a time are begun and watched until everything has a result.

A host at work holds one of as many *slots* as the job's concurrency allows. It holds no thread: one thread
decides, and a pool of others makes the calls. A host that is down gives its slot to another and comes back
later. One that was at work and falls silent keeps its slot for a while: its download goes on, and the job's
rate was shared out with it in mind.

Agents say by themselves what changed. That may get lost, come twice or late, so it is no more than a reason
not to ask: a host is asked when it was not heard for a while or a report of it is missing, and now and then
in any case. Agents of earlier releases are asked all the time.
"""

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Callable, Mapping

from imagecache_lib import errors, model
from imagecache_lib.precache import answering, client, job
from imagecache_lib.precache.calls import Call, Stop, Visit
from imagecache_lib.precache.patience import USUAL, Patience, Pauses
from imagecache_lib.precache.progress import JobProgress
from imagecache_lib.precache.relaying import Relaying, Unicast
from imagecache_lib.precache.slots import HostState, Slots
from imagecache_lib.precache.writer import JobWriter
from imagecache_lib.system import threads
from imagecache_lib.system.host import System

LOG = logging.getLogger(__name__)

#: How often an agent may forget its task without finishing an image in between.
MOST_RESTARTS = 5

#: The most calls at a time. Most of a call is waiting.
_MOST_CALLS = 128

#: The longest that the deciding thread waits before it looks at everything again, in seconds.
_TICK = 0.5

#: And the shortest: the difference of two moments may be too small to add to either.
_SHORTEST = 0.001


class JobRun:
    """Works on one job.

    :param progress: how far the job is; this run alone changes it.
    :param writer: stores the progress.
    :param hosts: reaches the agents.
    :param again: whether hosts may be at work from an earlier run.
    :param done: called with a host whose images all have a result.
    :param leave: once it is set, the run returns, and the hosts go on by themselves.
    :param pauses: how long to wait for what.
    """

    def __init__(
        self,
        progress: JobProgress,
        writer: JobWriter,
        hosts: client.HostClient,
        *,
        host: System,
        again: bool,
        done: Callable[[str], None],
        leave: model.CancelToken,
        pauses: Pauses = USUAL,
    ) -> None:
        self._progress = progress
        self._work = progress.job
        self._writer = writer
        self._hosts = hosts
        self._host = host
        self._again = again
        self._done = done
        self._leave = leave
        self._arrivals: queue.SimpleQueue[Visit | client.HostReport | None] = queue.SimpleQueue()
        self._mailbox: str | None = None
        self._patience = Patience(self._work.terms, host, pauses)
        self._stopping = False
        self._relaying = Unicast() if self._work.terms.relay is None else Relaying(self._work)
        now, terms = host.monotonic(), self._work.terms
        pending = [name for name in self._work.hosts if not progress.is_host_over(name)]
        # A chain keeps all its hosts at work: what bounds their downloads is the number of its heads.
        slots = terms.concurrency if terms.relay is None else max(1, len(pending))
        # Those that have to be told to stop hold no slot.
        self._calls = max(1, min(_MOST_CALLS, len(pending) if again else slots, len(pending)))
        self._slots = Slots(
            [HostState(name, now + host.random() * terms.jitter) for name in pending],
            slots=slots,
            calls=self._calls,
        )

    def execute(self) -> None:
        """Work until every image on every host has a result, or ``leave`` is set.

        :raises LeaseLost: another conductor runs the job.
        :raises ConfigError: the job database fails.
        :raises BackendError: not one thread can be started. No host was begun.
        """
        try:
            with (
                self._hosts.listening(self._arrivals) as self._mailbox,
                threads.Pool(self._calls, "imagecache-hosts") as pool,
            ):
                while self._slots.hosts_left and not self._leave.is_set():
                    self._writer.tick(self._wake)
                    self._end_early()
                    self._replan()
                    self._make_calls(pool)
                    self._wait()
                if not self._leave.is_set():
                    self._release(pool)
            while self._slots.calls_under_way:
                self._settle(self._arrivals.get())
        except BaseException:
            self._writer.abandon()
            raise
        self._writer.close()

    def _replan(self) -> None:
        """Let hosts whose route has changed be told at once."""
        now = self._host.monotonic()
        for name in self._relaying.stale(now):
            state = self._slots.find(name)
            if state is not None and state.begun and not self._slots.is_called(name):
                self._slots.wake(state, now)

    def _release(self, pool: threads.Pool) -> None:
        """Let hosts remove what they keep for others. Those that are not told do so by themselves, later."""
        for name in self._relaying.relaying():
            pool.submit(Call(self._hosts, self._work.id, name, release=True).make)

    def _wake(self) -> None:
        """Have the deciding thread look at everything again."""
        self._arrivals.put(None)

    def _make_calls(self, pool: threads.Pool) -> None:
        while (state := self._slots.take(self._host.monotonic())) is not None:
            stop = self._give_up(state)
            if self._progress.is_host_over(state.name):
                self._slots.returned(state.name)
                self._finished(state)
                continue
            if stop is None and not self._relaying.admits(state.name):
                self._slots.returned(state.name)
                self._slots.give_away(state, self._host.monotonic() + self._patience.pauses.poll)
                continue
            pending = self._progress.pending(state.name)
            task = None
            if stop is None and self._relaying.knows(state.name):
                is_told = state.begun and not self._relaying.is_stale(state.name)
                task = None if is_told else self._task(state.name, pending)
            call = Call(self._hosts, self._work.id, state.name, task=task, stop=stop)
            pool.submit(lambda call=call: self._arrivals.put(call.make()))  # type: ignore[misc]

    def _wait(self) -> None:
        """Wait for a call, a write, or the moment at which something is due."""
        if not self._slots.hosts_left:
            return
        now = self._host.monotonic()
        pause = min(_TICK, max(_SHORTEST, self._slots.next_due(now) - now))
        if not self._slots.calls_under_way and not self._writer.is_busy:
            self._host.sleep(pause)
            pause = 0.0
        with contextlib.suppress(queue.Empty):
            self._settle(self._arrivals.get(block=pause > 0, timeout=pause))
            while True:
                self._settle(self._arrivals.get_nowait())

    # -- ends that do not come from the host ---------------------------------------------------------

    def _end_early(self) -> None:
        """Once the job is cancelled, or its deadline passed, end the hosts that have not begun."""
        deadline = self._work.terms.deadline
        late = deadline is not None and self._host.clock() >= deadline
        if self._stopping or not (late or self._writer.cancelled):
            return
        self._stopping = self._writer.cancelled
        for state in self._slots.waiting():
            if state.begun:
                continue
            reason = "the job was cancelled" if self._writer.cancelled else self._why_not_begun(state)
            if self._again:
                # It may have what an earlier run asked it for: that is worth a question.
                state.stop = Stop(job.Result.SKIPPED, reason)
                self._slots.stop(state, self._host.monotonic())
            else:
                self._end(state, job.Result.SKIPPED, reason)
                self._finished(state)
        if self._stopping:
            self._slots.hurry()

    def _why_not_begun(self, state: HostState) -> str:
        what = "it was done" if self._again else "the host could begin"
        return state.trouble or f"the deadline passed before {what}"

    def _give_up(self, state: HostState) -> Stop | None:
        """End a host that has had its time, or return how to stop it. Returns None to go on with it."""
        if state.stop is not None:
            return state.stop
        now, deadline = self._host.monotonic(), self._work.terms.deadline
        if self._writer.cancelled:
            if state.begun or self._again:
                return Stop(job.Result.SKIPPED, "the job was cancelled")
            self._end(state, job.Result.SKIPPED, "the job was cancelled")
        elif now >= self._patience.last_moment(state):
            if state.trouble:
                self._end(state, job.Result.SKIPPED, state.trouble)
            elif not state.begun and self._again:
                return Stop(job.Result.SKIPPED, self._why_not_begun(state))
            elif not state.begun:
                self._end(state, job.Result.SKIPPED, self._why_not_begun(state))
            else:
                assert deadline is not None
                return Stop(job.Result.ERROR, "the deadline passed while the host was at work")
        return None

    # -- what hosts say ------------------------------------------------------------------------------

    def _settle(self, arrival: Visit | client.HostReport | None) -> None:
        match arrival:
            case Visit():
                self._settle_call(arrival)
            case client.HostReport():
                self._hear(arrival)

    def _settle_call(self, visit: Visit) -> None:
        state = self._slots.returned(visit.host)
        if visit.failure is not None and not isinstance(visit.failure, Exception):
            raise visit.failure
        state.begun = state.begun or visit.begun
        self._relaying.told(state.name, visit.route)
        self._note_agents(state, visit)
        if visit.report is not None:
            self._record(state, visit)
        if visit.stop is not None:
            self._end(state, visit.stop.result, visit.stop.reason)
        elif visit.failure is not None:
            self._fail(state, visit.failure)
        if self._progress.is_host_over(state.name):
            self._finished(state)
        elif not state.is_scheduled:
            now = self._host.monotonic()
            is_stale = state.begun and self._relaying.is_stale(state.name)
            self._slots.keep(state, now if is_stale else self._patience.next_look(state, now))

    def _hear(self, told: client.HostReport) -> None:
        """Take note of what an agent reports by itself, if it is new."""
        state, report = self._slots.find(told.host), told.report
        if state is None or (told.job_id, report.attempt) != (self._work.id, self._work.attempt):
            return
        has_gap = not answering.is_next(state, report)
        if not answering.is_news(state, report):
            return
        # Why an image was skipped depends on who told the host to stop: that is asked.
        cells = {name: cell for name, cell in report.cells.items() if cell.result is not job.Result.SKIPPED}
        self._keep(state, cells, report)
        self._answers(state)
        if self._slots.is_called(state.name):
            return  # what the call brings decides how it goes on
        if self._progress.is_host_over(state.name):
            self._finished(state)
            return
        now = self._host.monotonic()
        has_gap = has_gap or len(cells) < len(report.cells)
        self._slots.wake(state, now if has_gap else self._patience.next_look(state, now))

    def _record(self, state: HostState, visit: Visit) -> None:
        assert visit.report is not None
        cells = visit.report.cells
        if visit.stop is not None:
            # What the host skipped because it was told to stop ends with the reason for that.
            cells = {name: cell for name, cell in cells.items() if cell.result is not job.Result.SKIPPED}
        elif not state.begun:
            # It was only asked whether it relays, and says how an earlier attempt ended: that is tried again.
            cells = {name: cell for name, cell in cells.items() if cell.result not in job.RETRIED}
        self._keep(state, cells, visit.report)
        if visit.failure is None:
            self._answers(state)
        state.ask_by = self._patience.ask_by(self._host.monotonic())
        answering.compare(state, visit.report, listening=self._mailbox is not None)
        if not set(self._progress.pending(state.name)) <= set(visit.report.cells):
            self._forgotten(state)

    def _keep(self, state: HostState, cells: Mapping[str, job.Cell], report: client.TaskReport) -> None:
        cells = self._relaying.explained(state.name, cells, report.relay)
        if self._progress.record(state.name, cells):
            state.restarts = 0
        known = self._work.cells[state.name]
        self._relaying.heard(state.name, known, report.relay, now=self._host.monotonic())

    def _answers(self, state: HostState) -> None:
        if state.down_since is not None:
            LOG.info("Host %s answers again", state.name)
        state.down_since, state.busy_since, state.failures, state.trouble = None, None, 0, ""

    def _fail(self, state: HostState, failure: Exception) -> None:
        match failure:
            case client.UnknownTask():
                self._forgotten(state)
            case client.HostDown():
                self._is_down(state, failure)
            case client.HostBusy():
                self._is_busy(state, failure)
            case client.HostUnsupported():
                self._end(state, job.Result.UNSUPPORTED, str(failure))
            case errors.ImageCacheError():
                self._end(state, job.Result.ERROR, str(failure))
            case _:
                # Nothing may be lost in silence: the host gets a result, and the log the traceback.
                LOG.error("Pre-caching host %s failed", state.name, exc_info=failure)
                self._end(state, job.Result.ERROR, f"{type(failure).__name__}: {failure}")

    def _forgotten(self, state: HostState) -> None:
        """Begin a task again that the agent has forgotten, unless that happens again and again."""
        if not state.begun or state.stop is not None:
            return
        state.begun = False
        state.restarts += 1
        if state.restarts >= MOST_RESTARTS:
            self._stop_later(
                state,
                f"the agent forgot its task {state.restarts} times and finished no image in between: it "
                "restarts again and again, or several agents have the host's name",
            )

    def _note_agents(self, state: HostState, visit: Visit) -> None:
        answered = visit.report is not None or isinstance(visit.failure, client.UnknownTask)
        if visit.stop is None and (visit.agents or answered):
            self._relaying.met(state.name, visit.agents[-1] if visit.agents else None)
        stop = answering.note(state, visit, self._host.clock())
        if stop is not None and state.stop is None:
            self._stop_later(state, stop.reason)

    def _stop_later(self, state: HostState, reason: str) -> None:
        # Several agents under one name take calls by turns: each must be told.
        state.stop = Stop(job.Result.ERROR, reason, calls=max(1, len(set(state.instances))))
        self._slots.keep(state, self._host.monotonic())

    def _is_down(self, state: HostState, error: Exception) -> None:
        """Note that a host does not answer. One that was at work keeps its slot for a while."""
        now = self._host.monotonic()
        self._relaying.down(state.name)
        if state.down_since is None:
            state.down_since = now
            LOG.warning("Host %s does not answer, to be tried again: %s", state.name, error)
        state.trouble = f"the host is down: {error}"
        self._progress.set_reason(state.name, state.trouble)
        if state.begun and now - state.down_since <= self._patience.pauses.silence:
            self._slots.keep(state, self._patience.next_try(state, now, failures=0))
        else:
            self._slots.give_away(state, self._patience.next_try(state, now, failures=state.failures))
            state.failures += 1

    def _is_busy(self, state: HostState, error: Exception) -> None:
        now = self._host.monotonic()
        state.down_since = None
        state.busy_since = state.busy_since or now
        state.trouble = f"the host is busy: {error}"
        self._progress.set_reason(state.name, state.trouble)
        self._slots.give_away(state, self._patience.next_try(state, now, failures=state.failures))
        state.failures += 1

    # -- ends ----------------------------------------------------------------------------------------

    def _end(self, state: HostState, result: job.Result, reason: str) -> None:
        LOG.warning("Job %s ends on host %s: %s, %s", self._work.id, state.name, result.value, reason)
        self._progress.finish(state.name, result, reason)

    def _finished(self, state: HostState) -> None:
        self._slots.remove(state)
        failed = any(
            cell.result is not None and cell.result.is_failure
            for cell in self._work.cells[state.name].values()
        )
        self._relaying.ended(state.name, failed=failed)
        self._done(state.name)

    def _task(self, name: str, pending: tuple[str, ...]) -> client.HostTask:
        terms, now = self._work.terms, self._host.clock()
        return client.HostTask(
            self._work.id,
            pending,
            attempt=self._work.attempt,
            rate=self._relaying.rate(name, terms, len(self._work.hosts)),
            deadline=terms.deadline,
            pin_until=terms.pin_until,
            retries=terms.retries,
            deadline_in=None if terms.deadline is None else max(0.0, terms.deadline - now),
            pin_for=None if terms.pin_until is None else max(0.0, terms.pin_until - now),
            report_to=self._mailbox,
            relay=self._relaying.route(name),
        )
