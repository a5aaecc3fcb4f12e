# SPDX-License-Identifier: Apache-2.0
"""Agents that say by themselves what changed: heard, lost, doubled, late, or of somebody else."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import time
from collections.abc import Callable, Iterator

from imagecache_lib import errors
from imagecache_lib.precache import client, job, patience
from imagecache_lib.precache.reporter import Reporter
from imagecache_lib.system.host import System
from tests.flows.test_precache import AgentCase, FakeHosts, JobCase
from tests.support.cache_case import ID, OTHER_ID
from tests.support.no_threads import no_more_threads

CACHED, ERROR, SKIPPED = job.Result.CACHED, job.Result.ERROR, job.Result.SKIPPED
WHO = client.AgentInfo("first", 1000.0, reports=True)
BOX = "0" * 32

#: What happens when, in seconds after the begin of a run.
Steps = list[tuple[float, Callable[[], None]]]


class ReportingHosts(FakeHosts):
    """Fake agents that work only when a test has them say so.

    :ivar polls: the hosts that were asked, in order.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.polls: list[str] = []
        self.inbox: client.Inbox | None = None
        self.numbers = dict.fromkeys(names, 0)
        for fake in self.hosts.values():
            fake.idle, fake.info = True, WHO

    @contextlib.contextmanager
    def listening(self, inbox: client.Inbox) -> Iterator[str | None]:
        self.inbox = inbox
        yield BOX

    def poll(self, host: str, job_id: str) -> client.TaskReport:
        self.polls.append(host)
        report = super().poll(host, job_id)
        return dataclasses.replace(report, number=self.numbers[host])

    def say(
        self,
        host: str,
        job_id: str,
        cells: dict[str, job.Cell],
        *,
        number: int | None = None,
        attempt: int = 0,
        who: client.AgentInfo = WHO,
    ) -> None:
        """Have an agent report: so it is on the host from now on, and so it is told."""
        self.numbers[host] += 1
        told = client.TaskReport(cells, who, attempt, self.numbers[host] if number is None else number)
        assert self.inbox is not None
        self.inbox.put(client.HostReport(host, job_id, told))


def done(received: int = 10) -> job.Cell:
    return job.Cell(CACHED, "", received, 10)


class HeardTest(JobCase):
    hosts: ReportingHosts

    def setUp(self) -> None:
        super().setUp()
        self.hosts = ReportingHosts(["one", "two", "three"])

    def run_with(self, script: Callable[[str], Steps], *names: str, **terms: object) -> job.Job:
        """Run a job, and have a script act while the conductor sleeps."""
        work = self.start(*names, **terms)
        steps = script(work.id)
        began = self.time.now
        sleep = self.time.sleep

        def act(seconds: float) -> None:
            sleep(seconds)
            while steps and self.time.now - began >= steps[0][0]:
                steps.pop(0)[1]()

        self.time.host = dataclasses.replace(self.time.host, sleep=act)
        self.running = self.precacher()
        return self.running.run(work.id)

    def test_a_host_that_reports_is_hardly_asked(self) -> None:
        def script(work: str) -> Steps:
            progress = [
                (
                    float(second),
                    functools.partial(
                        self.hosts.say, "one", work, {"image-a": job.Cell(None, "", second, 1000)}
                    ),
                )
                for second in range(4, 400, 4)
            ]
            ends = {name: done() for name in self.IMAGES}
            return [*progress, (401.0, lambda: self.hosts.say("one", work, ends))]

        ended = self.run_with(script, "one")
        self.assertEqual([CACHED] * 2, self.results(ended, "one"))
        self.assertLessEqual(len(self.hosts.polls), 2 + 400 / (client.ASKED_SECONDS / 2))
        self.assertGreaterEqual(len(self.hosts.polls), 400 / client.ASKED_SECONDS, "the agent has to be told")
        self.assertLess(self.time.now - 1000, 403)

    def test_what_was_lost_is_asked_for(self) -> None:
        fake = self.hosts.hosts["one"]

        def finish() -> None:
            fake.cells.update({name: done() for name in self.IMAGES})
            self.hosts.numbers["one"] += 1  # said, and lost

        ended = self.run_with(lambda _work: [(30.0, finish)], "one")
        self.assertEqual([CACHED] * 2, self.results(ended, "one"))
        self.assertLess(self.time.now - 1000, 30 + 2 * patience.QUIET)

    def test_a_report_that_is_missing_is_asked_for_at_once(self) -> None:
        fake = self.hosts.hosts["one"]

        def script(work: str) -> Steps:
            def later() -> None:
                fake.cells.update({name: done() for name in self.IMAGES})
                self.hosts.numbers["one"] += 1  # said of image-a, and lost
                self.hosts.say("one", work, {"image-b": done()})

            def first() -> None:
                self.hosts.say("one", work, {"image-a": job.Cell(None, "", 1, 10)})

            return [(4.0, first), (8.0, later)]

        ended = self.run_with(script, "one")
        self.assertEqual([CACHED] * 2, self.results(ended, "one"))
        self.assertLess(self.time.now - 1000, 10)

    def test_doubled_and_late_reports_change_nothing(self) -> None:
        seen: list[int] = []

        def script(work: str) -> Steps:
            def say(number: int, received: int) -> Callable[[], None]:
                cell = {"image-a": job.Cell(None, "", received, 1000)}
                return lambda: self.hosts.say("one", work, cell, number=number)

            def look() -> None:
                seen.append(self.running.status(work).cells["one"]["image-a"].received)

            finish = {name: done() for name in self.IMAGES}
            return [
                (4.0, say(1, 100)),
                (8.0, say(2, 200)),
                (8.5, say(2, 200)),
                (9.0, say(1, 100)),
                (10.0, look),
                (11.0, lambda: self.hosts.say("one", work, finish, number=9)),
            ]

        ended = self.run_with(script, "one")
        self.assertEqual([200], seen)
        self.assertEqual([CACHED] * 2, self.results(ended, "one"))

    def test_reports_of_another_attempt_job_or_agent_change_nothing(self) -> None:
        def script(work: str) -> Steps:
            failed = {name: job.Cell(ERROR, "long ago") for name in self.IMAGES}
            ends = {name: done() for name in self.IMAGES}
            other = client.AgentInfo("another", 1000.0, reports=True)
            return [
                (4.0, lambda: self.hosts.say("one", work, failed, attempt=7, number=1)),
                (4.5, lambda: self.hosts.say("one", "another-job", failed, number=1)),
                (5.0, lambda: self.hosts.say("one", work, failed, who=other, number=1)),
                (6.0, lambda: self.hosts.say("one", work, ends, number=1)),
            ]

        self.assertEqual([CACHED] * 2, self.results(self.run_with(script, "one"), "one"))

    def test_the_deadline_ends_a_host_that_reports(self) -> None:
        ended = self.run_with(lambda _work: [], "one", deadline=self.time.now + 100)
        self.assertEqual([ERROR] * 2, self.results(ended, "one"))
        self.assertLess(self.time.now - 1000, 100 + patience.GRACE + 2)


class Sent:
    """Keeps reports, or fails to send them."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[tuple[str, client.HostReport]] = queue.SimpleQueue()
        self.fails = False

    def send(self, mailbox: str, told: client.HostReport) -> None:
        if self.fails:
            raise errors.BackendError("the bus takes nothing", next_step="wait")
        self.told.put((mailbox, told))


class ReporterTest(AgentCase):
    passed = 0.0

    def host(self, **options: object) -> System:
        return super().host(**{"monotonic": lambda: time.monotonic() + self.passed, **options})

    def test_an_image_that_ends_is_told_at_once(self) -> None:
        agent, sent = self.agent(), Sent()
        reporter = Reporter(agent, sent, period=3600.0)
        reporter.start()
        self.addCleanup(reporter.stop)
        agent.begin(client.HostTask("job", (ID, OTHER_ID), report_to=BOX))
        results: dict[str, job.Result | None] = {}
        while list(results.values()) != [CACHED, CACHED]:
            mailbox, told = sent.told.get(timeout=60)
            self.assertEqual((BOX, "job"), (mailbox, told.job_id))
            results.update({name: cell.result for name, cell in told.report.cells.items()})

    def test_an_agent_that_had_no_thread_for_its_reports_at_first_reports_later(self) -> None:
        agent, sent = self.agent(), Sent()
        reporter = Reporter(agent, sent, period=3600.0)
        self.addCleanup(reporter.stop)
        with no_more_threads(), self.assertRaises(errors.BackendError):
            reporter.start()
        reporter.start()
        agent.begin(client.HostTask("job", (ID,), report_to=BOX))
        self.assertEqual(BOX, sent.told.get(timeout=60)[0])

    def test_what_could_not_be_sent_is_told_later_and_what_did_not_change_is_not(self) -> None:
        agent, sent = self.agent(), Sent()
        reporter = Reporter(agent, sent)
        self.finish(agent, client.HostTask("job", (ID,), report_to=BOX))
        sent.fails = True
        with self.assertLogs("imagecache_lib.precache.reporter", "WARNING"):
            reporter.report()
        sent.fails = False
        reporter.report()
        reporter.report()
        _mailbox, told = sent.told.get_nowait()
        self.assertEqual(CACHED, told.report.cells[ID].result)
        self.assertTrue(sent.told.empty())
        self.assertEqual(told.report.number, agent.poll("job").number)

    def test_nobody_is_told_whose_conductor_does_not_ask_any_more(self) -> None:
        agent, sent = self.agent(), Sent()
        self.finish(agent, client.HostTask("job", (ID,), report_to=BOX))
        self.passed = client.WATCHED_SECONDS + 1
        Reporter(agent, sent).report()
        self.assertTrue(sent.told.empty())
        agent.poll("job")
        Reporter(agent, sent).report()
        self.assertFalse(sent.told.empty())

    def test_a_task_without_a_mailbox_is_told_to_nobody(self) -> None:
        agent, sent = self.agent(), Sent()
        self.finish(agent, client.HostTask("job", (ID,)))
        Reporter(agent, sent).report()
        self.assertTrue(sent.told.empty())
