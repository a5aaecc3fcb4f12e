# SPDX-License-Identifier: Apache-2.0
"""Pre-caching jobs: what is asked, where it is kept, and how every image on every host comes to a result."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Mapping, Sequence

from imagecache_lib import errors, model
from imagecache_lib.precache import client, job, job_events, patience, precacher
from imagecache_lib.precache.agent import HostAgent
from imagecache_lib.precache.database import Change, JobDatabase
from imagecache_lib.precache.in_process import InProcessClient
from imagecache_lib.precache.watch import Watch
from imagecache_lib.system.host import System
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, OTHER_ID, CacheCase, raw_image

CACHED, EXISTING = job.Result.CACHED, job.Result.EXISTING
ERROR, SKIPPED, UNSUPPORTED = job.Result.ERROR, job.Result.SKIPPED, job.Result.UNSUPPORTED


def _note(calls: list[str], name: str, _call: str) -> None:
    calls.append(name)


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._lock = threading.Lock()
        self.host = System(
            name="conductor",
            clock=lambda: self.now,
            monotonic=lambda: self.now,
            sleep=self.sleep,
            random=lambda: 0.5,
        )

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


class FakeHost:
    """An agent that finishes one image each time that it is looked at, unless a script says otherwise.

    :ivar begun: every task it was given.
    :ivar fetched: every image it fetched, in order.
    """

    def __init__(self) -> None:
        self.begun: list[client.HostTask] = []
        self.fetched: list[str] = []
        self.cells: dict[str, job.Cell] = {}
        self.known: set[str] = set()
        self.here: set[str] = set()
        self.cancelled: list[str] = []
        self.idle = False
        #: What it says of itself, if it does.
        self.info: client.AgentInfo | None = None
        #: Called before each answer; what it raises is the answer.
        self.before: Callable[[str], None] = lambda _call: None
        #: Results other than cached, by image.
        self.fails: dict[str, job.Cell] = {}

    def begin(self, task: client.HostTask) -> None:
        self.before("begin")
        self.begun.append(task)
        self.known.add(task.job_id)
        for image_id in task.image_ids:
            self.cells.setdefault(image_id, job.Cell())

    def poll(self, job_id: str) -> Mapping[str, job.Cell]:
        self.before("poll")
        if job_id not in self.known:
            raise client.UnknownTask("it knows nothing of it")
        pending = [image_id for image_id, cell in self.cells.items() if cell.result is None]
        if pending and not self.idle:
            self.cells[pending[0]] = self._finish(pending[0])
        return dict(self.cells)

    def _finish(self, image_id: str) -> job.Cell:
        if image_id in self.fails:
            return self.fails[image_id]
        if image_id in self.here:
            return job.Cell(EXISTING)
        self.fetched.append(image_id)
        self.here.add(image_id)
        return job.Cell(CACHED, "", 10, 10)

    def restart(self) -> None:
        self.cells.clear()
        self.known.clear()


class FakeHosts(client.HostClient):
    """Fake agents by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.hosts = {name: FakeHost() for name in names}

    def survey(self, host: str, image_ids: Sequence[str]) -> client.Survey:
        self.hosts[host].before("survey")
        here = self.hosts[host].here
        present = tuple(image_id for image_id in image_ids if image_id in here)
        return client.Survey(present, {each: 10 for each in image_ids if each not in here}, 1000)

    def begin(self, host: str, task: client.HostTask) -> client.AgentInfo | None:
        self.hosts[host].begin(task)
        return self.hosts[host].info

    def poll(self, host: str, job_id: str) -> client.TaskReport:
        return client.TaskReport(self.hosts[host].poll(job_id), self.hosts[host].info)

    def cancel(self, host: str, job_id: str) -> None:
        self.hosts[host].before("cancel")
        self.hosts[host].cancelled.append(job_id)


class Crash(BaseException):
    """The conductor dies."""


class RequestTest(unittest.TestCase):
    def test_requests_that_make_no_sense_are_refused(self) -> None:
        for hosts, images in (
            ([], ["a"]),
            (["h"], []),
            (["h", "h"], ["a"]),
            (["h"], ["a", "a"]),
            (["h\n"], ["a"]),
        ):
            with self.subTest(hosts=hosts, images=images), self.assertRaises(errors.ConfigError):
                job.check(hosts, images)
        with self.assertRaises(errors.ImageRejected):
            job.check(["h"], ["a\0b"])

    def test_a_long_list_is_checked_quickly(self) -> None:
        job.check([f"host-{number}" for number in range(50_000)], ["a"])

    def test_what_all_may_fetch_is_shared_by_those_at_work(self) -> None:
        self.assertEqual(25, job.Terms(concurrency=4, total_rate=100).rate(8))
        self.assertEqual(50, job.Terms(concurrency=4, total_rate=100).rate(2))
        self.assertEqual(10, job.Terms(concurrency=4, total_rate=100, host_rate=10).rate(8))
        self.assertEqual(7, job.Terms(host_rate=7).rate(8))
        self.assertEqual(0, job.Terms().rate(8))
        self.assertEqual(1, job.Terms(concurrency=200, total_rate=100).rate(200))

    def test_terms_that_make_no_sense_are_refused(self) -> None:
        for wrong in (
            {"concurrency": 0},
            {"host_rate": -1},
            {"host_rate": 2**63},
            {"total_rate": 2**63},
            {"retries": -1},
            {"retries": job.MOST_RETRIES + 1},
            {"jitter": -0.1},
            {"jitter": math.nan},
            {"jitter": math.inf},
            {"deadline": -1.0},
            {"deadline": math.nan},
            {"pin_until": math.inf},
        ):
            with self.subTest(**wrong), self.assertRaises(errors.ConfigError):
                job.Terms(**wrong)


class JobCase(unittest.TestCase):
    IMAGES: tuple[str, ...] = ("image-a", "image-b")

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, "jobs.sqlite")
        self.database = JobDatabase(self.path)
        self.time = Time()
        self.told: list[job_events.JobEvent] = []
        self.hosts = FakeHosts(["one", "two", "three"])

    def precacher(self) -> precacher.AggregatePrecacher:
        return precacher.AggregatePrecacher(
            JobDatabase(self.path),
            self.hosts,
            host=self.time.host,
            observers=(self.told.append,),
        )

    def start(self, *names: str, **terms: object) -> job.Job:
        return self.precacher().start(
            "racks",
            names or tuple(self.hosts.hosts),
            self.IMAGES,
            job.Terms(**terms),  # type: ignore[arg-type]
        )

    def run_job(self, *names: str, **terms: object) -> job.Job:
        return self.precacher().run(self.start(*names, **terms).id)

    def only_job(self) -> job.Job:
        (listed,) = self.database.summaries()
        return self.database.get(listed.id)

    def results(self, work: job.Job, name: str) -> list[job.Result | None]:
        return [cell.result for cell in work.cells[name].values()]

    def reasons(self, work: job.Job, name: str) -> set[str]:
        return {cell.reason for cell in work.cells[name].values()}


class DatabaseTest(JobCase):
    def test_a_job_is_there_for_the_next_process(self) -> None:
        made = self.start(concurrency=3, deadline=5.5, pin_until=7.5, total_rate=9)
        self.assertEqual(made, JobDatabase(self.path).get(made.id))
        (listed,) = JobDatabase(self.path).summaries()
        self.assertEqual(
            (made.id, "racks", 3, 2, False),
            (listed.id, listed.aggregate, listed.hosts, listed.images, listed.is_over),
        )
        self.assertEqual(("one", "two", "three"), made.hosts)
        self.assertEqual(self.IMAGES, made.image_ids)

    def lease(self, made: job.Job, runner: str = "a-runner") -> str:
        self.assertTrue(self.database.take_lease(made.id, runner, self.database.lease_of(made.id)))
        return runner

    def keep(self, made: job.Job, runner: str, *cells: job.Cell) -> None:
        self.database.keep(made.id, runner, [Change(0, image, cell) for image, cell in enumerate(cells)])

    def test_what_the_hosts_are_called_may_be_anything(self) -> None:
        for aggregate in ("", "\N{GRINNING FACE}", "a\0b", os.fsdecode(b"\xff"), "x" * 100_000):
            with self.subTest(aggregate=aggregate[:20]):
                work = self.database.add(aggregate, ["one"], ["image"], job.Terms(), now=1.0)
                self.assertIn((work.id, work.aggregate), self.listed())
                if aggregate.isprintable() and len(aggregate) < 1000:
                    self.assertEqual(aggregate, work.aggregate)

    def listed(self) -> set[tuple[str, str]]:
        return {(each.id, each.aggregate) for each in self.database.summaries()}

    def test_a_result_stays(self) -> None:
        made = self.start("one")
        runner = self.lease(made)
        self.keep(made, runner, job.Cell(CACHED, "", 5, 5))
        self.keep(made, runner, job.Cell(ERROR, "too late"), job.Cell(SKIPPED, "cancelled"))
        found = self.database.get(made.id).cells["one"]
        self.assertEqual(job.Cell(CACHED, "", 5, 5), found["image-a"])
        self.assertEqual((SKIPPED, "cancelled"), (found["image-b"].result, found["image-b"].reason))

    def test_a_retry_takes_back_failures_alone(self) -> None:
        made = self.start("one")
        runner = self.lease(made)
        self.keep(made, runner, job.Cell(EXISTING), job.Cell(ERROR, "no"))
        self.database.cancel(made.id)
        self.database.retry(made.id, runner)
        found = self.database.get(made.id)
        self.assertEqual([EXISTING, None], self.results(found, "one"))
        self.assertEqual((False, 1), (found.cancelled, found.attempt))

    def test_what_is_wrong_with_it_is_said(self) -> None:
        with self.assertRaisesRegex(errors.ConfigError, "no job nonsense"):
            self.database.get("nonsense")
        self.database.close()
        with open(self.path, "wb") as file:
            file.write(b"no database at all" * 100)
        with self.assertRaisesRegex(errors.ConfigError, "jobs.sqlite"):
            JobDatabase(self.path)


class RunTest(JobCase):
    def test_every_host_gets_every_image(self) -> None:
        ended = self.run_job(concurrency=2, pin_until=5000.0, host_rate=3, retries=1)
        self.assertTrue(ended.is_over)
        self.assertEqual(6, ended.count()[CACHED])
        self.assertFalse(ended.has_failed)
        task = self.hosts.hosts["one"].begun[0]
        self.assertEqual(
            (self.IMAGES, 3, 5000.0, 1), (task.image_ids, task.rate, task.pin_until, task.retries)
        )

    def test_no_more_hosts_work_at_a_time_than_asked_for(self) -> None:
        calls: list[str] = []
        for name, fake in self.hosts.hosts.items():
            fake.before = functools.partial(_note, calls, name)
        self.run_job(concurrency=1)
        changes = sum(before != after for before, after in itertools.pairwise(calls))
        self.assertEqual(2, changes, calls)

    def test_events_say_who_is_done_and_how_far_it_is(self) -> None:
        self.hosts.hosts["two"].fails["image-a"] = job.Cell(ERROR, "rejected")
        self.run_job()
        self.assertEqual(
            ["start", "progress", "progress", "progress", "end"], [each.kind for each in self.told]
        )
        self.assertEqual([1, 2, 3], [each.index for each in self.told[1:4]])
        self.assertEqual({"one", "two", "three"}, {each.host for each in self.told[1:4]})

    def test_one_failure_stops_nothing(self) -> None:
        self.hosts.hosts["two"].fails["image-a"] = job.Cell(ERROR, "rejected")
        ended = self.run_job()
        self.assertEqual([ERROR, CACHED], self.results(ended, "two"))
        self.assertEqual("rejected", ended.cells["two"]["image-a"].reason)
        self.assertEqual(5, ended.count()[CACHED])
        self.assertTrue(ended.has_failed)

    def test_an_observer_that_fails_stops_nothing(self) -> None:
        def fail(_event: job_events.JobEvent) -> None:
            raise RuntimeError("the bus is on fire")

        conductor = precacher.AggregatePrecacher(
            self.database, self.hosts, host=self.time.host, observers=(fail, self.told.append)
        )
        with self.assertLogs("imagecache_lib.precache", "ERROR"):
            ended = conductor.run(self.start().id)
        self.assertEqual(6, ended.count()[CACHED])
        self.assertEqual(5, len(self.told))

    def test_a_host_without_a_cache_is_unsupported(self) -> None:
        def before(_call: str) -> None:
            raise client.HostUnsupported("it has no image cache")

        self.hosts.hosts["two"].before = before
        ended = self.run_job()
        self.assertEqual([UNSUPPORTED] * 2, self.results(ended, "two"))
        self.assertEqual({"it has no image cache"}, self.reasons(ended, "two"))
        self.assertFalse(ended.has_failed)

    def test_a_failed_call_leaves_an_event_a_log_line_and_an_error(self) -> None:
        for failure in (errors.BackendError("it refuses"), KeyError("foreign")):
            with self.subTest(failure=failure):
                self.hosts, self.told = FakeHosts(["one", "two"]), []

                def before(call: str, failure: Exception = failure) -> None:
                    if call == "poll":
                        raise failure

                self.hosts.hosts["two"].before = before
                with self.assertLogs("imagecache_lib.precache", "WARNING") as logged:
                    ended = self.run_job("one", "two")
                self.assertEqual([ERROR] * 2, self.results(ended, "two"))
                self.assertEqual([CACHED] * 2, self.results(ended, "one"))
                self.assertTrue(all(self.reasons(ended, "two")))
                self.assertIn("two", "".join(logged.output))
                self.assertIn("two", [each.host for each in self.told if each.kind == "progress"])

    def test_a_plan_says_what_an_agent_does_not_mention_and_nothing_of_other_images(self) -> None:
        told = client.Survey(("image-b", "other"), {"other-too": 7}, 100, {"foreign": "no"})
        self.hosts.survey = lambda host, image_ids: told  # type: ignore[method-assign]
        plan = self.precacher().plan(["one"], self.IMAGES)
        self.assertEqual(
            client.Survey(("image-b",), {}, 100, plan.surveys["one"].problems), plan.surveys["one"]
        )
        self.assertEqual(["image-a"], list(plan.surveys["one"].problems))
        self.assertEqual(0, plan.bytes_to_fetch)

    def test_a_plan_that_is_interrupted_waits_for_no_host_and_asks_no_more(self) -> None:
        self.hosts = FakeHosts([f"host-{number}" for number in range(400)])
        go_on, asked = threading.Event(), []

        def before(name: str) -> None:
            asked.append(name)
            if name != "host-0":
                go_on.wait()

        for name, fake in self.hosts.hosts.items():
            fake.before = lambda _call, name=name: before(name)  # type: ignore[misc]
        self.addCleanup(go_on.set)

        def interrupt(_host: str, _answer: object) -> None:
            raise Crash

        with self.assertRaises(Crash):
            self.precacher().plan(list(self.hosts.hosts), self.IMAGES, learned=interrupt)
        self.assertLess(len(asked), 200)

    def test_a_plan_asks_all_and_changes_nothing(self) -> None:
        self.hosts.hosts["one"].here.add("image-a")

        def before(_call: str) -> None:
            raise client.HostDown("it does not answer")

        self.hosts.hosts["three"].before = before
        plan = self.precacher().plan(["one", "two", "three"], self.IMAGES)
        self.assertEqual(30, plan.bytes_to_fetch)
        self.assertEqual(("image-a",), plan.surveys["one"].present)
        self.assertEqual(["three"], list(plan.unreachable))
        self.assertEqual([], self.database.summaries())
        self.assertEqual([], self.hosts.hosts["one"].begun)


class DownTest(JobCase):
    def down(self, name: str, until: float) -> None:
        def before(_call: str) -> None:
            if self.time.now < until:
                raise client.HostDown("no answer")

        self.hosts.hosts[name].before = before

    def test_a_host_that_comes_back_is_served(self) -> None:
        self.down("two", self.time.now + 60)
        with self.assertLogs("imagecache_lib.precache", "INFO") as logged:
            ended = self.run_job(deadline=self.time.now + 3600)
        self.assertEqual(6, ended.count()[CACHED])
        self.assertEqual(1, sum("does not answer" in line for line in logged.output))
        self.assertEqual(1, sum("answers again" in line for line in logged.output))

    def test_one_that_is_down_does_not_hold_up_the_others(self) -> None:
        self.down("one", self.time.now + 60)
        self.run_job(concurrency=1)
        done = [each.host for each in self.told if each.kind == "progress"]
        self.assertEqual("one", done[-1])

    def test_down_until_the_deadline_is_skipped(self) -> None:
        self.down("two", self.time.now + 10_000)
        deadline = self.time.now + 300
        ended = self.run_job(deadline=deadline)
        self.assertEqual([SKIPPED] * 2, self.results(ended, "two"))
        self.assertEqual({"the host is down: no answer"}, self.reasons(ended, "two"))
        self.assertEqual(4, ended.count()[CACHED])
        self.assertLess(self.time.now, deadline + 2 * patience.POLL_DOWN)
        self.assertTrue(ended.has_failed)

    def test_without_a_deadline_patience_ends(self) -> None:
        self.down("two", self.time.now + 10_000)
        ended = self.run_job()
        self.assertEqual([SKIPPED] * 2, self.results(ended, "two"))
        self.assertLess(self.time.now, 1000 + patience.PATIENCE + 100)

    def test_the_status_says_meanwhile_what_is_wrong(self) -> None:
        self.down("two", self.time.now + 60)
        seen: list[set[str]] = []
        sleep = self.time.sleep

        def look(seconds: float) -> None:
            seen.append(self.reasons(self.only_job(), "two"))
            sleep(seconds)

        self.time.host = System(clock=lambda: self.time.now, monotonic=lambda: self.time.now, sleep=look)
        self.run_job()
        self.assertIn({"the host is down: no answer"}, seen)

    def test_an_agent_that_restarts_is_asked_again(self) -> None:
        fake = self.hosts.hosts["one"]
        calls: list[str] = []

        def before(call: str) -> None:
            calls.append(call)
            if calls.count("poll") == 2 and call == "poll":
                fake.restart()

        fake.before = before
        ended = self.run_job("one")
        self.assertEqual([CACHED, CACHED], self.results(ended, "one"))
        self.assertEqual(["image-a", "image-b"], fake.fetched)
        self.assertEqual([self.IMAGES, ("image-b",)], [task.image_ids for task in fake.begun])


class EndTest(JobCase):
    def test_the_deadline_ends_what_is_at_work(self) -> None:
        self.hosts.hosts["one"].idle = True
        ended = self.run_job("one", deadline=self.time.now + 100)
        self.assertEqual([ERROR] * 2, self.results(ended, "one"))
        self.assertIn("deadline", self.reasons(ended, "one").pop())
        self.assertEqual([ended.id], self.hosts.hosts["one"].cancelled)

    def test_the_deadline_skips_those_whose_turn_never_came(self) -> None:
        self.hosts.hosts["one"].idle = True
        ended = self.run_job("one", "two", deadline=self.time.now + 100)
        self.assertEqual([SKIPPED] * 2, self.results(ended, "two"))
        self.assertIn("before the host could begin", self.reasons(ended, "two").pop())

    def test_a_cancelled_job_ends_whoever_runs_it(self) -> None:
        polls: list[str] = []

        def before(call: str) -> None:
            polls.append(call)
            if len(polls) == 3:
                self.database.cancel(self.only_job().id)

        fake = self.hosts.hosts["one"]
        fake.idle, fake.before = True, before
        ended = self.run_job("one", "two", concurrency=1)
        self.assertEqual([SKIPPED] * 4, self.results(ended, "one") + self.results(ended, "two"))
        self.assertEqual({"the job was cancelled"}, self.reasons(ended, "one"))
        self.assertEqual([ended.id], fake.cancelled)

    def test_cancel_tells_the_hosts_that_can_be_told(self) -> None:
        work = self.start("one", "two")

        def before(_call: str) -> None:
            raise client.HostDown("no answer")

        self.hosts.hosts["one"].before = before
        with self.assertLogs("imagecache_lib.precache", "WARNING"):
            self.precacher().cancel(work.id)
        self.assertEqual([work.id], self.hosts.hosts["two"].cancelled)
        self.assertTrue(self.database.is_cancelled(work.id))

    def test_a_conductor_that_died_repeats_no_finished_download(self) -> None:
        work = self.start(concurrency=1)
        fake = self.hosts.hosts["two"]
        calls: list[str] = []

        def before(call: str) -> None:
            calls.append(call)
            if len(calls) == 3:
                raise Crash

        fake.before = before
        with self.assertRaises(Crash):
            self.precacher().run(work.id)
        fake.before = lambda _call: None
        fake.poll(work.id)  # its download ends while no conductor is there
        ended = self.precacher().resume(work.id)
        self.assertEqual(6, ended.count()[CACHED])
        for host in self.hosts.hosts.values():
            self.assertEqual(["image-a", "image-b"], host.fetched)

    def test_what_failed_is_tried_again(self) -> None:
        fake = self.hosts.hosts["two"]
        fake.fails["image-b"] = job.Cell(ERROR, "the service is down")
        ended = self.run_job()
        self.assertEqual([CACHED, ERROR], self.results(ended, "two"))
        fake.fails.clear()
        fake.restart()
        again = self.precacher().resume(ended.id)
        self.assertEqual(6, again.count()[CACHED])
        self.assertEqual(("image-b",), fake.begun[-1].image_ids)
        self.assertEqual(1, fake.begun[-1].attempt)

    def test_hosts_begin_at_random_times(self) -> None:
        work = self.start(jitter=60.0)
        spread = iter([0.1, 0.9, 0.5])
        begun: dict[str, float] = {}

        def note(name: str) -> Callable[[str], None]:
            def begin(_call: str) -> None:
                begun.setdefault(name, self.time.now)

            return begin

        for name, fake in self.hosts.hosts.items():
            fake.before = note(name)
        precacher.AggregatePrecacher(
            self.database,
            self.hosts,
            host=dataclasses.replace(self.time.host, random=lambda: next(spread, 0.5)),
        ).run(work.id)
        self.assertEqual(["one", "three", "two"], sorted(begun, key=lambda name: begun[name]))
        self.assertGreaterEqual(begun["two"], 1000 + 54)


class AgentCase(CacheCase):
    def agent(self, **options: object) -> HostAgent:
        watch = Watch()
        manager = self.manager()
        manager = type(manager)(
            manager.config,
            self.source,
            backend="qcow2",
            host=dataclasses.replace(manager.host, random=lambda: 0.0),
            observers=(self.events.append, watch),
        )
        agent = HostAgent(manager, watch=watch, **options)  # type: ignore[arg-type]
        self.addCleanup(agent.stop)
        return agent

    def finish(self, agent: HostAgent, task: client.HostTask) -> Mapping[str, job.Cell]:
        agent.begin(task)
        return self.wait(agent, task.job_id)

    def wait(self, agent: HostAgent, job_id: str) -> Mapping[str, job.Cell]:
        over = threading.Event()
        while True:
            cells = agent.poll(job_id).cells
            if all(cell.result is not None for cell in cells.values()):
                return cells
            over.wait(0.01)

    def host(self, **options: object) -> System:
        slept = [0.0]

        def sleep(seconds: float) -> None:
            slept[0] += seconds

        clocks = {
            "clock": lambda: time.time() + slept[0],
            "monotonic": lambda: time.monotonic() + slept[0],
        }
        return super().host(**{"sleep": sleep, **clocks, **options})


class AgentTest(AgentCase):
    def test_images_are_cached_and_pinned(self) -> None:
        agent = self.agent()
        cells = self.finish(agent, client.HostTask("job", (ID, OTHER_ID), pin_until=4e9))
        self.assertEqual([CACHED, CACHED], [cell.result for cell in cells.values()])
        self.assertEqual(len(raw_image()), cells[ID].received)
        self.assertTrue(self.base(ID).exists())
        self.assertTrue(list((self.instances / "_base" / ".imagecache" / "pins").iterdir()))
        again = self.finish(agent, client.HostTask("later", (ID,)))
        self.assertEqual(EXISTING, again[ID].result)

    def test_a_survey_says_what_is_here_and_how_large_the_rest_is(self) -> None:
        agent = self.agent()
        self.finish(agent, client.HostTask("job", (ID,)))
        survey = agent.survey([ID, OTHER_ID, "absent"])
        self.assertEqual((ID,), survey.present)
        self.assertEqual({OTHER_ID: len(raw_image())}, survey.missing)
        self.assertEqual(["absent"], list(survey.problems))
        self.assertGreater(survey.free, 0)

    def test_one_failure_stops_nothing_and_says_why(self) -> None:
        cells = self.finish(self.agent(), client.HostTask("job", ("absent", ID)))
        self.assertEqual([ERROR, CACHED], [cell.result for cell in cells.values()])
        self.assertIn("absent", cells["absent"].reason)

    def test_what_may_pass_is_tried_again(self) -> None:
        self.source.fail_describe(errors.SourceError("busy"), errors.SourceError("busy"))
        cells = self.finish(self.agent(), client.HostTask("job", (ID,), retries=2))
        self.assertEqual(CACHED, cells[ID].result)
        self.source.fail_describe(errors.SourceError("busy"), errors.SourceError("busy"))
        cells = self.finish(self.agent(), client.HostTask("job", (OTHER_ID,), retries=1))
        self.assertEqual(ERROR, cells[OTHER_ID].result)
        self.assertIn("busy", cells[OTHER_ID].reason)

    def test_a_task_that_is_known_goes_on(self) -> None:
        agent, task = self.agent(), client.HostTask("job", (ID,))
        self.finish(agent, task)
        cells = self.finish(agent, task)
        self.assertEqual(CACHED, cells[ID].result)
        self.assertEqual(1, self.source.opens)

    def test_the_next_attempt_tries_what_failed(self) -> None:
        agent = self.agent()
        self.source.fail_describe(errors.ImageNotFound("not yet"))
        first = self.finish(agent, client.HostTask("job", (ID, OTHER_ID)))
        self.assertEqual([ERROR, CACHED], [cell.result for cell in first.values()])
        same = self.finish(agent, client.HostTask("job", (ID, OTHER_ID)))
        self.assertEqual(first, same)
        second = self.finish(agent, client.HostTask("job", (ID,), attempt=1))
        self.assertEqual([CACHED, CACHED], [cell.result for cell in second.values()])

    def test_a_cancelled_task_stops_and_can_be_begun_again(self) -> None:
        agent = self.agent()
        stop = self.points.stop_at("transfer.chunk")
        agent.begin(client.HostTask("job", (ID, OTHER_ID)))
        stop.wait()
        agent.cancel("job")
        stop.go_on()
        cells = self.wait(agent, "job")
        self.assertEqual([SKIPPED] * 2, [cell.result for cell in cells.values()])
        self.assertEqual([], self.in_flight())
        cells = self.finish(agent, client.HostTask("job", (ID, OTHER_ID), attempt=1))
        self.assertEqual([CACHED] * 2, [cell.result for cell in cells.values()])

    def test_a_new_attempt_does_not_inherit_the_cancellation(self) -> None:
        agent = self.agent()
        stop = self.points.stop_at("transfer.chunk")
        agent.begin(client.HostTask("job", (ID,)))
        stop.wait()
        agent.cancel("job")
        agent.begin(client.HostTask("job", (ID,), attempt=1))
        stop.go_on()
        self.assertEqual(CACHED, self.wait(agent, "job")[ID].result)

    def test_progress_is_seen_while_it_comes(self) -> None:
        large = 40 * 2**20
        self.source = FakeSource({ID: os.urandom(large)}, chunk_size=2**20)
        agent = self.agent()
        for _chunk in range(20):
            self.points.at("transfer.chunk", lambda: None)
        stop = self.points.stop_at("transfer.chunk")
        agent.begin(client.HostTask("job", (ID,)))
        stop.wait()
        cell = agent.poll("job").cells[ID]
        self.assertEqual((None, 16 * 2**20, large), (cell.result, cell.received, cell.total))
        stop.go_on()
        self.assertEqual(large, self.wait(agent, "job")[ID].received)

    def test_no_job_takes_more_of_the_disk_than_the_host_allows(self) -> None:
        agent = self.agent(max_bytes=len(raw_image()) + 1000)
        cells = self.finish(agent, client.HostTask("job", (ID, OTHER_ID)))
        self.assertEqual([CACHED, ERROR], [cell.result for cell in cells.values()])
        self.assertIn("allows", cells[OTHER_ID].reason)
        cells = self.finish(agent, client.HostTask("next", (ID,)))
        self.assertEqual(EXISTING, cells[ID].result)

    def test_copies_of_what_is_here_are_charged_too(self) -> None:
        ids = ("one", "two", "three")
        self.source = FakeSource(dict.fromkeys(ids, raw_image()))
        size, allocated = len(raw_image()), self.manager().precache_image("one").allocated
        if self.manager().precache_image("two").allocated == 0:
            self.skipTest("copies share their extents here, and take no space")
        for image_id in ids[:2]:
            self.manager().evict_image(image_id)
        agent = self.agent(max_bytes=size + allocated + 1000)
        cells = self.finish(agent, client.HostTask("job", ids))
        self.assertEqual([CACHED, CACHED, ERROR], [cell.result for cell in cells.values()])

    def test_nothing_is_begun_after_the_deadline(self) -> None:
        cells = self.finish(self.agent(), client.HostTask("job", (ID,), deadline=1.0))
        self.assertEqual(SKIPPED, cells[ID].result)
        self.assertIn("deadline", cells[ID].reason)
        self.assertEqual(0, self.source.opens)

    def test_what_it_never_heard_of_is_unknown(self) -> None:
        with self.assertRaises(client.UnknownTask):
            self.agent().poll("job")
        self.agent().cancel("job")

    def test_ids_that_cannot_be_are_refused(self) -> None:
        with self.assertRaises(errors.ImageRejected):
            self.agent().begin(client.HostTask("job", ("a\0b",)))

    def test_gone_from_the_service_and_had_from_a_fallback(self) -> None:
        other = FakeSource({ID: raw_image(1)})
        self.source.remove(ID)
        cells = self.finish(self.agent(fallbacks=(other,)), client.HostTask("job", (ID,)))
        self.assertEqual(CACHED, cells[ID].result)
        self.assertEqual(1, other.opens)


class OneMachineTest(AgentCase):
    def test_from_job_to_base_images(self) -> None:
        database = JobDatabase(str(self.directory / "jobs.sqlite"))
        conductor = precacher.AggregatePrecacher(database, InProcessClient({"here": self.agent()}))
        work = conductor.start("this machine", ["here"], [ID, OTHER_ID])
        ended = conductor.run(work.id)
        self.assertEqual(2, ended.count()[CACHED])
        self.assertTrue(self.base(OTHER_ID).exists())
        self.assertEqual([ended.id], [each.id for each in conductor.list()])


class ConversionTest(CacheCase):
    def test_what_another_cache_converted_never_serves_as_the_images_own_bytes(self) -> None:
        class Peer(FakeSource):
            def describe(self, image_id: str) -> model.Image:
                return dataclasses.replace(super().describe(image_id), converted_from="qcow2")

        manager = self.manager(Peer({ID: raw_image(1)}))
        with self.assertRaisesRegex(errors.ImageNotFound, "qcow2"):
            manager.fetch_file(ID, str(self.instances / "kernel"))
        manager.cache_image(ID)
        with manager.fetch_or_reuse(ID) as base:
            self.assertEqual(("raw", "qcow2", None), (base.format, base.source_format, base.digest))
        with self.assertRaises(errors.ImageNotFound):
            manager.fetch_file(ID, str(self.instances / "kernel"))
