# SPDX-License-Identifier: Apache-2.0
"""A job that is cancelled, or left by its conductor, in each of its phases: what every image ends with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from imagecache_lib.precache import client, job
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.precacher import AggregatePrecacher
from imagecache_lib.system.host import System
from tests.flows.test_precache import FakeHosts, JobCase

SKIPPED = job.Result.SKIPPED

#: Terms by the phase in which they hold a job of one host: see :meth:`PhaseCase.hold`.
PHASES: Mapping[str, Mapping[str, float]] = {
    "jitter": {"jitter": 3600.0},
    "at work": {},
    "down": {},
    "busy": {},
}


class PhaseCase(JobCase):
    def hold(self, phase: str) -> None:
        """Have the host "one", new as all others are, stay in a phase."""
        self.hosts = FakeHosts(["one", "two"])
        answers = {
            "down": client.HostDown("no answer"),
            "busy": client.HostBusy("the host has 100 unfinished tasks"),
        }
        fake = self.hosts.hosts["one"]
        fake.idle = phase == "at work"

        def before(_call: str) -> None:
            if phase in answers:
                raise answers[phase]

        fake.before = before

    def let_go(self) -> None:
        fake = self.hosts.hosts["one"]
        fake.idle, fake.before = False, lambda _call: None

    def conductor(self, act: Callable[[], object], *, after: int = 20) -> AggregatePrecacher:
        """Return a conductor that acts when it has waited some times."""
        waits = [0]

        def sleep(seconds: float) -> None:
            waits[0] += 1
            if waits[0] == after:
                act()
            self.time.sleep(seconds)

        host = System(name="conductor", clock=lambda: self.time.now, sleep=sleep, random=lambda: 0.5)
        return AggregatePrecacher(JobDatabase(self.path), self.hosts, host=host)


class PhaseTest(PhaseCase):
    def test_cancelled_in_any_phase_every_image_soon_ends_as_skipped(self) -> None:
        for phase, terms in PHASES.items():
            with self.subTest(phase=phase):
                self.hold(phase)
                work = self.start("one", "two", concurrency=1, **terms)
                moments: list[float] = []

                def cancel(job_id: str = work.id, moments: list[float] = moments) -> None:
                    self.database.cancel(job_id)
                    moments.append(self.time.now)

                ended = self.conductor(cancel).run(work.id)
                self.assertLess(self.time.now - moments[0], 5.0)
                self.assertTrue(ended.is_over)
                self.assertEqual([SKIPPED] * 2, self.results(ended, "one"))
                self.assertIn("cancelled", self.reasons(ended, "one").pop())

    def test_left_in_any_phase_no_image_gets_a_result_that_nobody_gave_and_the_job_goes_on(self) -> None:
        for phase, terms in PHASES.items():
            with self.subTest(phase=phase):
                self.hold(phase)
                work, leave = self.start("one", **terms), threading.Event()
                left = self.conductor(leave.set).run(work.id, leave=leave)
                self.assertFalse(left.is_over)
                self.assertEqual([None] * 2, self.results(left, "one"))
                self.assertIsNone(self.database.lease_of(work.id).runner)
                self.let_go()
                self.assertFalse({None, SKIPPED} & set(self.results(self.precacher().resume(work.id), "one")))

    def test_a_conductor_that_watches_another_can_leave(self) -> None:
        work, leave = self.start("one"), threading.Event()
        self.assertTrue(self.database.take_lease(work.id, "other", self.database.lease_of(work.id)))
        with self.assertLogs("imagecache_lib.precache", "WARNING"):
            left = self.conductor(leave.set, after=3).run(work.id, leave=leave)
        self.assertFalse(left.is_over)
        self.assertEqual("other", self.database.lease_of(work.id).runner)
