# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with conductors and agents: crash loops, two under one name, death, clocks, floods."""

from __future__ import annotations

import os
import threading
import time

from imagecache_lib import errors
from imagecache_lib.precache import client, job, lease, patience, precacher, run
from imagecache_lib.precache.agent import HostAgent
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.slots import HostState, Slots
from imagecache_lib.system.host import System
from imagecache_lib.testing.sources import FakeSource
from tests.flows.test_precache import AgentCase, JobCase, Time
from tests.support.cache_case import ID, OTHER_ID, Running, Stop, raw_image

CACHED, ERROR, SKIPPED = job.Result.CACHED, job.Result.ERROR, job.Result.SKIPPED


class RestartTest(JobCase):
    def test_an_agent_in_a_crash_loop_ends_with_that_as_the_reason(self) -> None:
        fake = self.hosts.hosts["one"]
        fake.idle = True
        polls = [0]

        def before(call: str) -> None:
            polls[0] += call == "poll"
            if call == "poll" and polls[0] % 10 == 0:
                fake.restart()
                raise client.HostDown("it was killed")

        fake.before = before
        ended = self.run_job("one")
        self.assertEqual([ERROR] * 2, self.results(ended, "one"))
        self.assertRegex(self.reasons(ended, "one").pop(), "forgot its task 5 times.*restarts")
        self.assertEqual(run.MOST_RESTARTS, len(fake.begun))

    def test_restarts_between_which_images_are_finished_are_no_loop(self) -> None:
        fake = self.hosts.hosts["one"]
        self.IMAGES = tuple(f"image-{number}" for number in range(2 * run.MOST_RESTARTS))
        polls = [0]

        def before(call: str) -> None:
            polls[0] += call == "poll"
            if call == "poll" and polls[0] % 2 == 0:
                fake.restart()

        fake.before = before
        ended = self.run_job("one")
        self.assertEqual({CACHED}, set(self.results(ended, "one")))

    def test_two_agents_under_one_name_end_with_that_as_the_reason(self) -> None:
        fake = self.hosts.hosts["one"]
        agents = [client.AgentInfo(name, self.time.now) for name in ("first", "other")]
        calls = [0]

        def before(call: str) -> None:
            fake.info = agents[calls[0] % 2]
            calls[0] += 1
            if call == "poll":
                error = client.UnknownTask("it knows nothing of it")
                error.agent = fake.info
                raise error

        fake.before = before
        ended = self.run_job("one", "two")
        self.assertEqual([ERROR] * 2, self.results(ended, "one"))
        self.assertRegex(self.reasons(ended, "one").pop(), "two agents.*first and other.*stop one")
        self.assertEqual(2, len(fake.cancelled), "each of the two has to be told")
        self.assertEqual([CACHED] * 2, self.results(ended, "two"))

    def test_an_agent_that_restarts_once_is_no_second_agent(self) -> None:
        fake = self.hosts.hosts["one"]
        fake.info = client.AgentInfo("first", self.time.now)
        polls = [0]

        def before(call: str) -> None:
            polls[0] += call == "poll"
            if call == "poll" and polls[0] == 2:
                fake.restart()
                fake.info = client.AgentInfo("second", self.time.now)

        fake.before = before
        self.assertEqual([CACHED] * 2, self.results(self.run_job("one"), "one"))

    def test_a_clock_that_is_off_is_reported(self) -> None:
        self.hosts.hosts["one"].info = client.AgentInfo("first", self.time.now + 86400)
        with self.assertLogs("imagecache_lib.precache", "WARNING") as logged:
            self.run_job("one")
        self.assertEqual(1, sum("+86400 s off" in line for line in logged.output))


class BusyTest(JobCase):
    def test_a_host_with_too_many_tasks_is_asked_again(self) -> None:
        until = self.time.now + 300

        def before(call: str) -> None:
            if call == "begin" and self.time.now < until:
                raise client.HostBusy("the host has 100 unfinished tasks")

        self.hosts.hosts["one"].before = before
        ended = self.run_job()
        self.assertEqual(6, ended.count()[CACHED])
        self.assertLess(self.time.now, until + 2 * patience.LONGEST_POLL_DOWN)

    def test_a_host_that_stays_busy_is_skipped_in_the_end(self) -> None:
        def before(_call: str) -> None:
            raise client.HostBusy("the host has 100 unfinished tasks")

        self.hosts.hosts["one"].before = before
        ended = self.run_job()
        self.assertEqual([SKIPPED] * 2, self.results(ended, "one"))
        self.assertIn("unfinished tasks", self.reasons(ended, "one").pop())
        self.assertEqual(4, ended.count()[CACHED])


class TermsTest(JobCase):
    def test_times_travel_as_seconds_from_now_too(self) -> None:
        self.run_job("one", deadline=self.time.now + 500, pin_until=self.time.now + 900, jitter=100.0)
        (task,) = self.hosts.hosts["one"].begun
        begun = self.time.now - 1000
        assert task.deadline_in is not None and task.pin_for is not None
        self.assertEqual(1500.0, task.deadline)
        self.assertAlmostEqual(450, task.deadline_in, delta=5)
        self.assertAlmostEqual(850, task.pin_for, delta=5)
        self.assertGreater(begun, 45)

    def test_more_images_than_a_task_may_have_are_refused_at_the_start(self) -> None:
        images = [f"image-{number}" for number in range(job.MOST_IMAGES + 1)]
        with self.assertRaisesRegex(errors.ConfigError, "1000 images at most"):
            self.precacher().start("all", ["one"], images)
        self.precacher().start("all", ["one"], images[1:])

    def test_what_an_agent_says_is_kept_whatever_it_is(self) -> None:
        odd = job.Cell(ERROR, "a\0b\ud800" * 10_000, job.LARGEST, job.LARGEST)
        self.hosts.hosts["one"].fails["image-a"] = odd
        ended = self.run_job("one")
        self.assertEqual([ERROR, CACHED], self.results(ended, "one"))
        self.assertEqual(job.LARGEST, ended.cells["one"]["image-a"].received)


class TwoConductorsTest(JobCase):
    def other(self) -> tuple[precacher.AggregatePrecacher, Time]:
        """Return a conductor on another machine, with a clock of its own."""
        its = Time()
        its.host = System(
            name="other",
            clock=lambda: its.now,
            monotonic=lambda: its.now,
            sleep=its.sleep,
            random=lambda: 0.5,
        )
        return precacher.AggregatePrecacher(JobDatabase(self.path), self.hosts, host=its.host), its

    def test_one_runs_and_the_other_watches(self) -> None:
        work = self.start("one", "two", concurrency=2)
        at_work = Stop()
        calls: list[str] = []

        def before(call: str) -> None:
            calls.append(call)
            if len(calls) == 1:
                at_work()

        self.hosts.hosts["one"].before = before
        first = Running(lambda: self.precacher().run(work.id))
        at_work.wait()
        conductor, its = self.other()
        sleeps = [0]

        def sleep(seconds: float) -> None:
            sleeps[0] += 1
            if sleeps[0] == 3:
                at_work.go_on()
                first.result()
            its.sleep(seconds)

        conductor = precacher.AggregatePrecacher(
            JobDatabase(self.path),
            self.hosts,
            host=System(clock=lambda: its.now, monotonic=lambda: its.now, sleep=sleep),
        )
        with self.assertLogs("imagecache_lib.precache", "WARNING") as logged:
            ended = conductor.resume(work.id)
        self.assertIn("watching", logged.output[0])
        self.assertEqual(4, ended.count()[CACHED])
        self.assertEqual([1, 1], [len(self.hosts.hosts[name].begun) for name in ("one", "two")])
        self.assertEqual(0, ended.attempt)

    def test_a_dead_ones_job_is_taken_over(self) -> None:
        work = self.start("one")
        self.assertTrue(self.database.take_lease(work.id, "dead", self.database.lease_of(work.id)))
        conductor, its = self.other()
        with self.assertLogs("imagecache_lib.precache", "WARNING") as logged:
            ended = conductor.run(work.id)
        self.assertEqual(2, ended.count()[CACHED])
        self.assertGreaterEqual(its.now - 1000, lease.SECONDS)
        self.assertLess(its.now - 1000, lease.SECONDS + 10)
        self.assertIn("goes on here", "".join(logged.output))
        self.assertIsNone(self.database.lease_of(work.id).runner)

    def test_what_changed_since_it_was_seen_is_not_taken_over(self) -> None:
        work = self.start("one")
        free = self.database.lease_of(work.id)
        self.assertTrue(self.database.take_lease(work.id, "first", free))
        seen = self.database.lease_of(work.id)
        for not_so in (free, lease.Lease("another", seen.beat), lease.Lease("first", seen.beat + 1)):
            self.assertFalse(self.database.take_lease(work.id, "second", not_so))
        self.database.keep(work.id, "first", [])
        self.assertFalse(self.database.take_lease(work.id, "second", seen))
        self.assertEqual("first", self.database.lease_of(work.id).runner)

    def test_one_that_lost_its_job_writes_nothing_more_and_watches(self) -> None:
        work = self.start("one")
        fake = self.hosts.hosts["one"]
        fake.idle = True
        stolen = threading.Event()

        def before(_call: str) -> None:
            if not stolen.is_set():
                stolen.set()
                self.database.take_lease(work.id, "thief", self.database.lease_of(work.id))

        fake.before = before
        leave = threading.Event()

        def sleep(seconds: float) -> None:
            self.time.sleep(seconds)
            if self.time.now > 1010:
                leave.set()

        conductor = precacher.AggregatePrecacher(
            self.database,
            self.hosts,
            host=System(clock=lambda: self.time.now, monotonic=lambda: self.time.now, sleep=sleep),
        )
        with self.assertLogs("imagecache_lib.precache", "WARNING") as logged:
            conductor.run(work.id, leave=leave)
        self.assertIn("taken over", logged.output[0])
        self.assertEqual("thief", self.database.lease_of(work.id).runner)

    def test_who_leaves_lets_another_go_on_at_once(self) -> None:
        work = self.start("one")
        leave = threading.Event()
        leave.set()
        self.precacher().run(work.id, leave=leave)
        conductor, its = self.other()
        self.assertEqual(2, conductor.run(work.id).count()[CACHED])
        self.assertLess(its.now - 1000, lease.SECONDS)


class LateTest(JobCase):
    """A job of which an earlier conductor began much, and nobody has heard how that went on."""

    def left(self, **terms: float) -> job.Job:
        """Return a job that was left at work, and whose hosts have gone on since."""
        work = self.start("one", "two", concurrency=2, **terms)
        leave = threading.Event()
        failed = job.Cell(ERROR, "two digests differ")
        one, two = (self.hosts.hosts[name] for name in ("one", "two"))
        two.fails = dict.fromkeys(self.IMAGES, failed)

        def before(call: str) -> None:
            one.idle = bool(one.fetched)
            if call == "poll" and one.idle and self.results(self.database.get(work.id), "two") == [ERROR] * 2:
                leave.set()

        one.before = before
        self.precacher().run(work.id, leave=leave)
        self.assertEqual([CACHED, None], self.results(self.database.get(work.id), "one"))
        one.before = lambda _call: None
        one.cells["image-b"] = job.Cell(CACHED, "", 10, 10)
        return work

    def test_a_resume_after_the_deadline_learns_what_hosts_did_and_takes_no_result_back(self) -> None:
        work = self.left(deadline=5000.0)
        self.time.now = 6000.0
        with self.assertLogs("imagecache_lib.precache", "WARNING") as logged:
            ended = self.precacher().resume(work.id)
        self.assertIn("deadline of job", logged.output[0])
        self.assertEqual([CACHED, CACHED], self.results(ended, "one"))
        self.assertEqual({"two digests differ"}, self.reasons(ended, "two"))
        self.assertEqual([1, 1], [len(self.hosts.hosts[name].begun) for name in ("one", "two")])

    def test_what_a_host_did_not_do_by_then_is_skipped(self) -> None:
        work = self.left(deadline=5000.0)
        self.hosts.hosts["one"].cells["image-b"] = job.Cell(None, "", 5, 10)
        self.time.now = 6000.0
        ended = self.precacher().resume(work.id)
        self.assertEqual([CACHED, SKIPPED], self.results(ended, "one"))
        self.assertIn("the deadline passed before it was done", str(self.reasons(ended, "one")))
        self.assertEqual([work.id], self.hosts.hosts["one"].cancelled)

    def test_one_that_does_not_answer_by_then_is_skipped(self) -> None:
        work = self.left(deadline=5000.0)

        def before(_call: str) -> None:
            raise client.HostDown("no answer")

        self.hosts.hosts["one"].before = before
        self.time.now = 6000.0
        ended = self.precacher().resume(work.id)
        self.assertEqual([CACHED, SKIPPED], self.results(ended, "one"))
        self.assertIn("no answer", str(self.reasons(ended, "one")))

    def test_a_job_that_was_cancelled_meanwhile_ends_with_what_hosts_did(self) -> None:
        work = self.left()
        self.database.cancel(work.id)
        ended = self.precacher().run(work.id)
        self.assertEqual([CACHED, CACHED], self.results(ended, "one"))
        self.assertEqual([ERROR, ERROR], self.results(ended, "two"))


class CancelTest(JobCase):
    def test_what_is_open_ends_when_no_conductor_runs_the_job(self) -> None:
        work = self.start("one", "two", "three")
        task = client.HostTask(work.id, self.IMAGES)
        for name in ("one", "two"):
            self.hosts.begin(name, task)
        self.hosts.poll("one", work.id)  # it finished an image that no conductor heard of

        def down(_call: str) -> None:
            raise client.HostDown("no answer")

        self.hosts.hosts["two"].before = down
        for fake in self.hosts.hosts.values():
            fake.idle = True
        with self.assertLogs("imagecache_lib.precache", "WARNING"):
            ended = self.precacher().cancel(work.id)
        self.assertTrue(ended.is_over)
        self.assertEqual([CACHED, SKIPPED], self.results(ended, "one"))
        self.assertEqual([SKIPPED] * 2, self.results(ended, "two"))
        self.assertIn("could not be told: no answer", self.reasons(ended, "two").pop())
        self.assertEqual({"the job was cancelled"}, self.reasons(ended, "three"))

    def test_a_job_whose_conductor_died_ends_too(self) -> None:
        work = self.start("one")
        self.assertTrue(self.database.take_lease(work.id, "dead", self.database.lease_of(work.id)))
        ended = self.precacher().cancel(work.id)
        self.assertEqual([SKIPPED] * 2, self.results(ended, "one"))
        self.assertGreaterEqual(self.time.now - 1000, lease.SECONDS)

    def test_a_message_bus_that_restarts_meanwhile_keeps_no_host_from_being_told(self) -> None:
        work = self.start("one", "two")
        calls: list[str] = []

        def before(call: str) -> None:
            calls.append(call)
            if call == "cancel" and self.time.now < 1015:
                raise client.BusDown("the message bus fails")

        self.hosts.hosts["one"].before = before
        with self.assertLogs("imagecache_lib.precache", "WARNING") as logged:
            ended = self.precacher().cancel(work.id)
        self.assertIn("message bus", logged.output[0])
        self.assertEqual([[work.id]] * 2, [self.hosts.hosts[name].cancelled for name in ("one", "two")])
        self.assertEqual({"the job was cancelled"}, self.reasons(ended, "one"))

    def test_a_message_bus_that_does_not_come_back_holds_a_cancellation_up_for_half_a_minute(self) -> None:
        work = self.start("one")

        def before(_call: str) -> None:
            raise client.BusDown("the message bus fails")

        self.hosts.hosts["one"].before = before
        with self.assertLogs("imagecache_lib.precache", "WARNING"):
            ended = self.precacher().cancel(work.id)
        self.assertEqual([SKIPPED, SKIPPED], self.results(ended, "one"))
        self.assertIn("could not be told", str(self.reasons(ended, "one")))
        self.assertLess(self.time.now, 1000 + 40)

    def test_cancelled_twice_resumed_and_resumed_again_it_does_what_is_left_alone(self) -> None:
        work = self.start("one", "two")
        once = self.precacher().cancel(work.id)
        again = self.precacher().cancel(work.id)
        self.assertEqual((4, once.cells), (once.count()[SKIPPED], again.cells))
        resumed = self.precacher().resume(work.id)
        self.assertEqual((4, False), (resumed.count()[CACHED], resumed.cancelled))
        over = self.precacher().resume(work.id)
        self.assertEqual(resumed.cells, over.cells)
        self.assertEqual([1, 1], [len(self.hosts.hosts[name].begun) for name in ("one", "two")])

    def test_a_job_that_is_over_stays_as_it_is(self) -> None:
        ended = self.run_job()
        self.assertEqual(ended.cells, self.precacher().cancel(ended.id).cells)

    def test_many_hosts_are_told_at_the_same_time(self) -> None:
        work = self.start(*(f"host-{number}" for number in range(200)))
        at_once = threading.Barrier(100, timeout=60)
        tells = [0]
        lock = threading.Lock()

        class Slow(client.HostClient):
            def survey(self, host: str, image_ids: object) -> client.Survey:
                self.cancel(host, "")
                raise client.HostDown("no answer")

            def begin(self, host: str, task: client.HostTask) -> None:
                raise NotImplementedError

            def poll(self, host: str, job_id: str) -> client.TaskReport:
                raise NotImplementedError

            def cancel(self, host: str, job_id: str) -> None:
                with lock:
                    tells[0] += 1
                at_once.wait()  # passes only when a hundred calls are under way
                raise client.HostDown("no answer")

        conductor = precacher.AggregatePrecacher(self.database, Slow(), host=self.time.host)
        with self.assertLogs("imagecache_lib.precache", "WARNING"):
            self.assertEqual(400, conductor.cancel(work.id).count()[SKIPPED])
        self.assertEqual(200, tells[0])
        learned: list[str] = []
        plan = conductor.plan(
            work.hosts, ["image-a"], learned=lambda name, answer: learned.append(f"{name}: {answer}")
        )
        self.assertEqual(200, len(plan.unreachable))
        self.assertEqual(200, len(learned))

    def test_a_plan_says_who_does_not_answer_before_all_have(self) -> None:
        slow = Stop()
        self.hosts.hosts["one"].before = lambda _call: slow()

        def down(_call: str) -> None:
            raise client.HostDown("no answer")

        self.hosts.hosts["two"].before = down
        learned: list[str] = []

        def note(name: str, answer: object) -> None:
            learned.append(name)
            if len(learned) == 2:
                slow.go_on()

        plan = self.precacher().plan(["one", "two", "three"], self.IMAGES, learned=note)
        self.assertEqual({"two", "three"}, set(learned[:2]))
        self.assertEqual(["two"], list(plan.unreachable))


class SlotTest(JobCase):
    def test_hosts_that_do_not_answer_take_half_of_the_calls_at_most(self) -> None:
        waiting = Slots((HostState(f"host-{number}", 0.0) for number in range(8)), slots=4, calls=4)
        for _call in range(8):
            state = waiting.take(0.0)
            assert state is not None
            waiting.returned(state.name).down_since = 0.0
            waiting.give_away(state, 5.0)
        self.assertIsNone(waiting.take(4.0))
        self.assertEqual(5.0, waiting.next_due(4.0))
        taken = [waiting.take(5.0) for _call in range(4)]
        self.assertEqual([True, True, False, False], [state is not None for state in taken])
        self.assertGreater(waiting.next_due(5.0), 1e6, "one of these calls has to end first")

    def test_hosts_at_work_that_fall_silent_do_not_hold_up_the_others(self) -> None:
        slots = Slots((HostState(f"host-{number}", 0.0) for number in range(4)), slots=4, calls=2)
        states = []
        for _call in range(4):
            state = slots.take(0.0)
            assert state is not None
            states.append(slots.returned(state.name))
            slots.keep(state, 9.0)
        for state in states[:3]:
            state.down_since = 0.0
            slots.keep(state, 1.0)
        slots.keep(states[3], 2.0)
        self.assertEqual(
            {states[3].name, "host-0"}, {getattr(slots.take(2.0), "name", None) for _call in "ab"}
        )

    def test_more_hosts_are_at_work_than_threads_call_them(self) -> None:
        names = [f"host-{number}" for number in range(300)]
        self.hosts = type(self.hosts)(names)
        for fake in self.hosts.hosts.values():
            fake.idle = True
        most = [0]

        def before(_call: str) -> None:
            most[0] = max(most[0], threading.active_count())
            if sum(bool(fake.begun) for fake in self.hosts.hosts.values()) == 300:
                for fake in self.hosts.hosts.values():
                    fake.idle = False

        for fake in self.hosts.hosts.values():
            fake.before = before
        ended = self.run_job(concurrency=300)
        self.assertEqual(600, ended.count()[CACHED])
        self.assertLess(most[0], 200)


class AgentFaultsTest(AgentCase):
    def test_a_sick_image_lets_others_go_first(self) -> None:
        agent = self.agent()
        self.source.fail_describe(*[errors.SourceError("busy")] * 3)
        agent.begin(client.HostTask("sick", (ID,), retries=5))
        order: list[str] = []
        agent.begin(client.HostTask("healthy", (OTHER_ID,)))
        over = threading.Event()
        while len(order) < 2:
            for name in ("sick", "healthy"):
                if name not in order and all(cell.result for cell in agent.poll(name).cells.values()):
                    order.append(name)
            over.wait(0.005)
        self.assertEqual(CACHED, agent.poll("sick").cells[ID].result)
        self.assertEqual(CACHED, agent.poll("healthy").cells[OTHER_ID].result)

    def test_a_sick_image_lets_the_others_of_its_own_task_go_first(self) -> None:
        paused = Stop()
        self.pause = paused
        agent = self.agent()
        self.source.fail_describe(errors.SourceError("busy"))
        agent.begin(client.HostTask("job", (ID, OTHER_ID), retries=5))
        paused.wait()  # nothing is left to do but to wait for the retry
        cells = agent.poll("job").cells
        paused.go_on()
        self.assertEqual([None, CACHED], [cell.result for cell in cells.values()])
        self.assertIn("to be tried again", cells[ID].reason)
        self.assertEqual(CACHED, self.wait(agent, "job")[ID].result)

    def host(self, **options: object) -> System:
        slept = [0.0]

        def sleep(seconds: float) -> None:
            pause = getattr(self, "pause", None)
            if pause is not None:
                self.pause = None
                pause()
            slept[0] += seconds

        own = {
            "sleep": sleep,
            "clock": lambda: time.time() + self.offset + slept[0],
            "monotonic": lambda: time.monotonic() + slept[0],
        }
        return super(AgentCase, self).host(**{**own, **options})

    offset = 0.0
    pause: Stop | None = None

    def test_a_cancellation_stops_the_fetch_that_an_earlier_attempt_began(self) -> None:
        agent = self.agent()
        stop = self.points.stop_at("transfer.chunk")
        agent.begin(client.HostTask("job", (ID,)))
        stop.wait()
        agent.begin(client.HostTask("job", (ID,), attempt=1))  # left, and resumed
        agent.cancel("job")
        stop.go_on()
        self.assertEqual(SKIPPED, self.wait(agent, "job")[ID].result)
        self.assertEqual([], self.in_flight())

    def test_the_agents_end_stops_the_fetch_that_an_earlier_attempt_began(self) -> None:
        agent = self.agent()
        stop = self.points.stop_at("transfer.chunk")
        agent.begin(client.HostTask("job", (ID,)))
        stop.wait()
        agent.begin(client.HostTask("job", (ID,), attempt=1))
        ending = Running(agent.stop)
        stop.go_on()
        ending.result()
        self.assertFalse(self.base(ID).exists())
        self.assertEqual(2, len(self.in_flight()), "what came is left to the next agent, with its note")

    def test_times_are_by_the_agents_own_clock(self) -> None:
        for off, told in ((-86400.0, r"-86[34]\d\d"), (86400.0, r"\+86[45]\d\d")):
            with self.subTest(off=off):
                self.offset = off
                self.source = FakeSource({ID: raw_image(1)})
                agent = self.agent()
                now = time.time()
                task = client.HostTask(
                    f"job{off}",
                    (ID,),
                    deadline=now + 600,
                    pin_until=now + 6000,
                    deadline_in=600,
                    pin_for=6000,
                )
                with self.assertLogs("imagecache_lib.precache.agent", "WARNING") as logged:
                    cells = self.finish(agent, task)
                self.assertFalse(cells[ID].result is SKIPPED or cells[ID].result is ERROR, cells)
                self.assertRegex(logged.output[0], f"{told} s off")  # that, and how long it took until then

    def test_an_old_conductors_times_are_taken_as_they_are(self) -> None:
        cells = self.finish(self.agent(), client.HostTask("job", (ID,), deadline=time.time() - 5))
        self.assertEqual(SKIPPED, cells[ID].result)

    def test_a_flood_of_tasks_is_refused_for_now(self) -> None:
        agent = self.agent()
        stop = self.points.stop_at("transfer.chunk")
        agent.begin(client.HostTask("job-0", (ID,)))
        stop.wait()
        for number in range(1, 100):
            agent.begin(client.HostTask(f"job-{number}", (OTHER_ID,)))
        with self.assertRaisesRegex(client.HostBusy, "100 unfinished"):
            agent.begin(client.HostTask("one more", (ID,)))
        stop.go_on()
        for number in range(100):
            self.wait(agent, f"job-{number}")
        self.finish(agent, client.HostTask("one more", (ID,)))

    def test_every_start_of_an_agent_is_another_instance(self) -> None:
        one, other = self.agent(), self.agent()
        self.assertEqual(one.info().instance, one.info().instance)
        self.assertNotEqual(one.info().instance, other.info().instance)
        self.assertIsInstance(one, HostAgent)
        self.assertLess(abs(one.info().clock - time.time()), 60)
        self.assertTrue(os.path.isdir(self.instances))
