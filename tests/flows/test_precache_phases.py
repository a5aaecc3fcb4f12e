# SPDX-License-Identifier: Apache-2.0
"""A job that is cancelled, or left by its conductor, in each of its phases: what every image ends with."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping

from imagecache_lib.precache import client, job
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.precacher import AggregatePrecacher
from imagecache_lib.system.host import System
from tests.flows.test_precache import Crash, FakeHost, FakeHosts, JobCase

CACHED, EXISTING, SKIPPED = job.Result.CACHED, job.Result.EXISTING, job.Result.SKIPPED

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

        host = System(
            name="conductor",
            clock=lambda: self.time.now,
            monotonic=lambda: self.time.now,
            sleep=sleep,
            random=lambda: 0.5,
        )
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


class DeathTest(PhaseCase):
    """A conductor or an agent that dies at any call, before it or before its answer."""

    HOSTS = ("one", "two")

    def fresh(self, act: Callable[[int], None]) -> job.Job:
        """Return a job of hosts that are new, which call something with the number of each call."""
        self.hosts, numbers = FakeHosts(list(self.HOSTS)), itertools.count()

        def before(_call: str) -> None:
            act(next(numbers))

        for fake in self.hosts.hosts.values():
            fake.before = before
        return self.start(*self.HOSTS, concurrency=1)

    def let_all_go(self) -> None:
        for fake in self.hosts.hosts.values():
            fake.before = lambda _call: None

    def fetched(self) -> list[list[str]]:
        return [fake.fetched for fake in self.hosts.hosts.values()]

    def calls(self) -> int:
        """Return how many calls an undisturbed job takes."""
        made: list[int] = []
        work = self.fresh(made.append)
        self.precacher().run(work.id)
        return len(made)

    def test_a_conductor_that_dies_at_any_call_repeats_no_download(self) -> None:
        for at in range(self.calls()):
            with self.subTest(at=at):

                def die(number: int, at: int = at) -> None:
                    if number == at:
                        raise Crash

                work = self.fresh(die)
                with self.assertRaises(Crash):
                    self.precacher().run(work.id)
                self.assertFalse(self.database.get(work.id).is_over)
                self.let_all_go()
                ended = self.precacher().resume(work.id)
                self.assertEqual(4, ended.count()[CACHED])
                self.assertEqual([list(self.IMAGES)] * 2, self.fetched())

    def test_a_conductor_that_dies_while_it_cancels_is_followed_by_one_that_does(self) -> None:
        for at in range(2):
            with self.subTest(at=at):
                work = self.fresh(lambda _number: None)
                cancels = itertools.count()

                def die(call: str, at: int = at, cancels: Iterator[int] = cancels) -> None:
                    if call == "cancel" and next(cancels) == at:
                        raise Crash

                for fake in self.hosts.hosts.values():
                    fake.before = die
                with contextlib.suppress(Crash):
                    self.precacher().cancel(work.id)
                self.let_all_go()
                ended = self.precacher().cancel(work.id)
                self.assertEqual(4, ended.count()[SKIPPED])
                self.assertEqual([[], []], self.fetched())

    def test_an_agent_that_dies_at_any_call_repeats_no_download_that_it_had_finished(self) -> None:
        for at in range(self.calls()):
            with self.subTest(at=at):
                self.restarts(at, lambda fake: fake.restart())

    def test_an_agent_that_dies_before_any_of_its_answers_is_asked_once_more(self) -> None:
        def lose_the_answer(fake: FakeHost) -> None:
            fake.restart()
            raise client.HostDown("no answer")

        for at in range(self.calls()):
            with self.subTest(at=at):
                self.restarts(at, lose_the_answer)

    def restarts(self, at: int, act: Callable[[FakeHost], None]) -> None:
        """Check a job in which an agent dies at a call."""
        work = self.fresh(lambda _number: None)
        numbers = itertools.count()
        for fake in self.hosts.hosts.values():

            def before(_call: str, fake: FakeHost = fake) -> None:
                if next(numbers) == at:
                    act(fake)

            fake.before = before
        ended = self.precacher().run(work.id)
        self.assertEqual({CACHED}, {*self.results(ended, "one"), *self.results(ended, "two")} - {EXISTING})
        self.assertTrue(ended.is_over)
        self.assertEqual([list(self.IMAGES)] * 2, self.fetched())
