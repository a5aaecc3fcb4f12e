# SPDX-License-Identifier: Apache-2.0
"""Clocks that are set while a job is at work, by a time service or by an operator."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from imagecache_lib import errors
from imagecache_lib.precache import client, job, lease
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.precacher import AggregatePrecacher
from imagecache_lib.system.host import System
from tests.flows.test_precache import AgentCase, JobCase
from tests.support.cache_case import ID

CACHED, ERROR = job.Result.CACHED, job.Result.ERROR

#: Seconds by which clocks are set.
DAY = 86400.0


class ConductorTest(JobCase):
    def setUp(self) -> None:
        super().setUp()
        #: Seconds by which the conductor's clock was set.
        self.offset = 0.0

    def conductor(self, look: Callable[[], None] = lambda: None) -> AggregatePrecacher:
        """Return a conductor whose clock can be set.

        :param look: called whenever it waits.
        """

        def sleep(seconds: float) -> None:
            self.time.sleep(seconds)
            look()

        host = System(
            name="conductor",
            clock=lambda: self.time.now + self.offset,
            monotonic=lambda: self.time.now,
            sleep=sleep,
            random=lambda: 0.5,
        )
        return AggregatePrecacher(JobDatabase(self.path), self.hosts, host=host)

    def set_during(self, call: int, offset: float) -> None:
        """Have the clock set while the host "one" is asked, which is down for some calls."""
        calls: list[str] = []

        def before(name: str) -> None:
            calls.append(name)
            if len(calls) == call:
                self.offset = offset
            if call <= len(calls) < call + 3:
                raise client.HostDown("no answer")

        self.hosts.hosts["one"].before = before

    def test_no_host_is_given_up_or_forgotten_because_the_clock_was_set(self) -> None:
        for offset in (-DAY, DAY):
            for call in (1, 2):
                with self.subTest(offset=offset, call=call):
                    self.setUp()
                    self.set_during(call, offset)
                    work = self.start("one", "two", concurrency=2)
                    ended = self.conductor().run(work.id)
                    self.assertEqual(4, ended.count()[CACHED], ended.cells)
                    self.assertLess(self.time.now, 1000 + 120)

    def test_what_hosts_say_is_written_and_a_cancellation_is_seen_although_the_clock_was_set(self) -> None:
        for offset in (-DAY, DAY):
            with self.subTest(offset=offset):
                self.setUp()
                self.hosts.hosts["one"].idle = True
                work = self.start("one")

                def look(offset: float = offset, job_id: str = work.id) -> None:
                    if self.time.now > 1005 and not self.offset:
                        self.offset = offset
                        self.database.cancel(job_id)

                ended = self.conductor(look).run(work.id)
                self.assertEqual(2, ended.count()[job.Result.SKIPPED])
                self.assertLess(self.time.now, 1000 + 30)

    def test_a_job_is_not_taken_from_one_that_lives_because_the_clock_was_set(self) -> None:
        work = self.start("one")
        self.assertTrue(self.database.take_lease(work.id, "living", self.database.lease_of(work.id)))
        leave = threading.Event()

        def look() -> None:
            self.database.keep(work.id, "living", [])
            self.offset = DAY
            if self.time.now > 1000 + 3 * lease.SECONDS:
                leave.set()

        with self.assertLogs("imagecache_lib.precache", "WARNING"):
            self.conductor(look).run(work.id, leave=leave)
        self.assertEqual("living", self.database.lease_of(work.id).runner)

    def test_a_deadline_is_a_time_of_day_whenever_the_clock_was_set(self) -> None:
        self.hosts.hosts["one"].idle = True
        work = self.start("one", deadline=1000.0 + DAY)

        def look() -> None:
            if self.time.now > 1005:
                self.offset = DAY

        ended = self.conductor(look).run(work.id)
        self.assertEqual([ERROR, ERROR], self.results(ended, "one"))
        self.assertIn("deadline", str(self.reasons(ended, "one")))
        self.assertLess(self.time.now, 1000 + 60)


class AgentTest(AgentCase):
    def host(self, **options: object) -> System:
        slept = [0.0]

        def sleep(seconds: float) -> None:
            slept[0] += seconds
            self.longest = max(self.longest, slept[0])

        clocks = {
            "clock": lambda: time.time() + slept[0] + self.offset,
            "monotonic": lambda: time.monotonic() + slept[0],
        }
        return super().host(**{"sleep": sleep, **clocks, **options})

    offset = 0.0
    longest = 0.0

    def test_a_retry_comes_when_it_should_and_no_deadline_passes_because_the_clock_was_set(self) -> None:
        for offset in (-DAY, DAY):
            with self.subTest(offset=offset):
                self.offset = self.longest = 0.0
                agent = self.agent()

                class Busy(errors.SourceError):
                    """Says so, and has the clock set."""

                    def __init__(its, offset: float = offset) -> None:
                        super().__init__("busy")
                        self.addCleanup(setattr, self, "offset", 0.0)
                        its.offset = offset

                    def __str__(its) -> str:
                        self.offset = its.offset
                        return "busy"

                self.source.fail_describe(Busy())
                task = client.HostTask(f"job{offset}", (ID,), retries=2, deadline_in=600.0)
                cells = self.finish(agent, task)
                self.assertNotIn(cells[ID].result, (ERROR, job.Result.SKIPPED), cells)
                self.assertLess(self.longest, 600)
                agent.stop()
