# SPDX-License-Identifier: Apache-2.0
"""Jobs whose hosts pass images on: which routes hosts are given, and what comes of a whole chain."""

from __future__ import annotations

import dataclasses
import itertools
import unittest
from collections.abc import Mapping

from imagecache_lib import errors
from imagecache_lib.precache import client, job
from imagecache_lib.precache.agent import HostAgent
from imagecache_lib.precache.chains import HostRoute
from imagecache_lib.precache.database import JobDatabase
from imagecache_lib.precache.in_process import InProcessClient
from imagecache_lib.precache.passing_on import KEPT_SECONDS, PassingOn
from imagecache_lib.precache.precacher import AggregatePrecacher
from imagecache_lib.precache.tasks import Moments, Task
from imagecache_lib.precache.watch import Watch
from imagecache_lib.sources.relay import NOT_THE_IMAGE
from imagecache_lib.sources.route import RouteState
from imagecache_lib.store.pieces import PIECE
from imagecache_lib.testing.sources import FakeSource
from tests.flows.test_precache import FakeHosts, JobCase
from tests.support.cache_case import ID, OTHER_ID, raw_image
from tests.support.relay_hosts import RelayCase, RelayHost, until

CACHED, ERROR, SKIPPED = job.Result.CACHED, job.Result.ERROR, job.Result.SKIPPED
NAMES = ["one", "two", "three", "four", "five"]
RELAYS = client.AgentInfo("first", 1000.0, relays=True)
DOES_NOT = client.AgentInfo("first", 1000.0)
CHAIN = job.RelayTerms(heads=1)


class RelayingHosts(FakeHosts):
    """Fake agents that relay.

    :ivar released: the hosts that were told to remove what they keep.
    :ivar states: how hosts get on, by name.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.released: list[str] = []
        self.states: dict[str, RouteState] = {}
        for fake in self.hosts.values():
            fake.info = RELAYS

    def poll(self, host: str, job_id: str) -> client.TaskReport:
        try:
            report = super().poll(host, job_id)
        except client.UnknownTask as error:
            error.agent = self.hosts[host].info
            raise
        return dataclasses.replace(report, relay=self.states.get(host))

    def release(self, host: str, job_id: str) -> None:
        self.released.append(host)


class RoutesTest(JobCase):
    hosts: RelayingHosts

    def setUp(self) -> None:
        super().setUp()
        self.hosts = RelayingHosts(NAMES)

    def routes(self, name: str) -> list[HostRoute | None]:
        """Return the routes that a host was given, in order."""
        return [task.relay for task in self.hosts.hosts[name].begun]

    def run_relay(self, relay: job.RelayTerms = CHAIN, **terms: object) -> job.Job:
        return self.run_job(*NAMES, relay=relay, **terms)

    def test_all_are_at_work_at_once_and_few_ask_the_image_service(self) -> None:
        work = self.run_relay(job.RelayTerms(heads=2))
        self.assertEqual([CACHED, CACHED], self.results(work, "five"))
        given = [self.routes(name)[0] for name in NAMES]
        self.assertEqual(2, sum(route is not None and route.origin for route in given))
        for name, route in zip(NAMES, given, strict=True):
            assert route is not None
            self.assertEqual(route.origin, not route.parents)
            self.assertNotIn(name, route.parents)

    def test_each_site_has_its_own_chains(self) -> None:
        self.run_relay(job.RelayTerms(heads=1, sites=(("north", 3), ("south", 2))))
        north, south = set(NAMES[:3]), set(NAMES[3:])
        for name in NAMES:
            route = self.routes(name)[0]
            assert route is not None
            self.assertLessEqual(set(route.parents), north if name in north else south)
        # Two hosts of a site ask the image service themselves: a chain would gain them nothing.
        self.assertEqual(
            [True, True],
            [route is not None and route.origin for name in south for route in self.routes(name)],
        )

    def test_sites_of_one_host_and_more_heads_than_hosts_have_no_chains(self) -> None:
        for relay in (
            job.RelayTerms(heads=1, sites=tuple((name, 1) for name in NAMES)),
            job.RelayTerms(heads=1000),
        ):
            with self.subTest(relay=relay):
                self.setUp()
                self.assertEqual(10, self.run_relay(relay).count()[CACHED])
                self.assertEqual({HostRoute((), True)}, {self.routes(name)[0] for name in NAMES})

    def test_what_is_kept_is_released_at_the_end(self) -> None:
        self.run_relay()
        self.assertEqual(sorted(NAMES), sorted(self.hosts.released))

    def test_without_the_option_nothing_of_this_happens(self) -> None:
        self.run_job(*NAMES)
        self.assertEqual([], self.hosts.released)
        self.assertEqual({None}, {route for name in NAMES for route in self.routes(name)})

    def test_agents_that_do_not_relay_ask_the_image_service_a_few_at_a_time(self) -> None:
        most = [0]

        def before(_call: str) -> None:
            fakes = [self.hosts.hosts[name] for name in NAMES[:4]]
            most[0] = max(most[0], sum(bool(fake.begun) and len(fake.fetched) < 2 for fake in fakes))

        for name in NAMES[:4]:
            self.hosts.hosts[name].info = DOES_NOT
            self.hosts.hosts[name].before = before
        work = self.run_relay(concurrency=2)
        self.assertEqual([CACHED, CACHED], self.results(work, "one"))
        self.assertEqual({None}, {route for name in NAMES[:4] for route in self.routes(name)})
        self.assertEqual([HostRoute((), True)], self.routes("five"))
        self.assertLessEqual(most[0], 2)

    def test_a_host_whose_name_can_be_no_part_of_an_address_asks_the_image_service(self) -> None:
        odd = "rack 7/\N{SNOWMAN}"
        self.hosts = RelayingHosts(["one", odd, "two", "three"])
        ended = self.run_job(relay=job.RelayTerms(heads=1))
        self.assertEqual(8, ended.count()[CACHED])
        self.assertIsNone(self.hosts.hosts[odd].begun[0].relay)
        for name in ("one", "two", "three"):
            for task in self.hosts.hosts[name].begun:
                self.assertNotIn(odd, () if task.relay is None else task.relay.parents)

    def test_a_resume_tries_again_what_failed_although_the_agents_still_know_how(self) -> None:
        fake = self.hosts.hosts["three"]
        fake.fails = dict.fromkeys(self.IMAGES, job.Cell(ERROR, "no room"))
        work = self.run_relay()
        self.assertEqual([ERROR, ERROR], self.results(work, "three"))
        begin, fake.fails = fake.begin, {}

        def begin_anew(task: client.HostTask) -> None:
            if task.attempt:
                fake.cells.clear()
            begin(task)

        fake.begin = begin_anew  # type: ignore[method-assign]
        resumed = self.precacher().resume(work.id)
        self.assertEqual([CACHED, CACHED], self.results(resumed, "three"))

    def test_the_next_attempt_blames_no_host_for_what_it_sent_in_the_one_before(self) -> None:
        asked = client.HostTask("job", self.IMAGES, relay=HostRoute(("one",)))
        task = Task(asked, Moments())
        assert task.route is not None
        task.route.blame("one")
        task.route.mismatched()
        task.extend(dataclasses.replace(asked, relay=HostRoute(("two",))), Moments())
        self.assertEqual((("one",), True), (task.route.state.wrong, task.route.state.mismatched))
        task.extend(dataclasses.replace(asked, attempt=1), Moments())
        self.assertEqual(RouteState(), task.route.state)

    def test_a_host_that_comes_late_goes_to_the_end(self) -> None:
        late = self.hosts.hosts["one"]
        began = self.time.now

        def before(_call: str) -> None:
            if self.time.now < began + 30:
                raise client.HostDown("it is off")

        late.before = before
        for name in NAMES[1:]:
            self.hosts.hosts[name].idle = True
        sleep = self.time.sleep

        def act(seconds: float) -> None:
            sleep(seconds)
            if late.begun:
                for fake in self.hosts.hosts.values():
                    fake.idle = False

        self.time.host = dataclasses.replace(self.time.host, sleep=act)
        work = self.run_relay()
        self.assertEqual([CACHED, CACHED], self.results(work, "one"))
        (route,) = self.routes("one")
        assert route is not None
        self.assertEqual((False, 4), (route.origin, len(route.parents)))

    def test_leave_is_given_to_as_many_as_there_are_heads(self) -> None:
        wanting = [name for name in NAMES if name != "one"]
        self.hosts.states = {name: RouteState(None, wants_origin=True) for name in wanting}
        for name in NAMES:
            self.hosts.hosts[name].idle = True
        sleep, most = self.time.sleep, [0]
        began = self.time.now

        def act(seconds: float) -> None:
            sleep(seconds)
            allowed = [
                name
                for name in NAMES
                if len(self.hosts.hosts[name].fetched) < 2
                and any(route is not None and route.origin for route in self.routes(name)[-1:])
            ]
            most[0] = max(most[0], len(allowed))
            if self.time.now > began + 20:
                for name in allowed:
                    self.hosts.states[name] = RouteState("")
                    self.hosts.hosts[name].idle = False

        self.time.host = dataclasses.replace(self.time.host, sleep=act)
        work = self.run_relay()
        self.assertEqual([CACHED, CACHED], self.results(work, "five"))
        self.assertEqual(2, most[0])  # the head, and one that has leave
        for name in wanting:
            self.assertTrue(any(route is not None and route.origin for route in self.routes(name)))

    def test_a_host_that_passed_on_wrong_bytes_goes_to_the_end(self) -> None:
        for name in NAMES:
            self.hosts.hosts[name].idle = True
        began, sleep, accused = self.time.now, self.time.sleep, list[str]()

        def act(seconds: float) -> None:
            sleep(seconds)
            if self.time.now > began + 10 and not accused:
                head = next(name for name in NAMES if self.routes(name)[0] == HostRoute((), True))
                second = next(name for name in NAMES if self.routes(name)[0] == HostRoute((head,), False))
                third = next(name for name in NAMES if self.parents(name)[:1] == (second,))
                accused.extend([head, second, third])
                self.hosts.states[third] = RouteState(head, wrong=(second,))
            if self.time.now > began + 30:
                for fake in self.hosts.hosts.values():
                    fake.idle = False

        self.time.host = dataclasses.replace(self.time.host, sleep=act)
        self.run_relay()
        head, second, third = accused
        self.assertEqual(HostRoute((head,), False), self.routes(third)[-1])
        for name in NAMES:
            if name not in (second,):
                self.assertNotIn(second, self.parents(name, -1)[:3])

    def test_the_reason_names_who_sent_wrong_bytes_first_and_no_other_host_is_moved(self) -> None:
        for name in NAMES:
            self.hosts.hosts[name].idle = True
        began, sleep, order = self.time.now, self.time.sleep, list[str]()

        def act(seconds: float) -> None:
            sleep(seconds)
            if self.time.now > began + 10 and not order:
                order.extend(sorted(NAMES, key=lambda name: len(self.parents(name))))
                for above, host in itertools.pairwise(order[1:]):
                    self.hosts.states[host] = RouteState(above, mismatched=True)
                    reason = f"what host {above} {NOT_THE_IMAGE}"
                    self.hosts.hosts[host].fails = dict.fromkeys(self.IMAGES, job.Cell(ERROR, reason))
            if self.time.now > began + 30:
                for fake in self.hosts.hosts.values():
                    fake.idle = False

        self.time.host = dataclasses.replace(self.time.host, sleep=act)
        with self.assertLogs("imagecache_lib.precache", "WARNING") as logged:
            work = self.run_relay()
        first, culprit, *failed = order
        for above, host in itertools.pairwise([culprit, *failed]):
            self.assertEqual(
                {f"what host {above} {NOT_THE_IMAGE}; host {culprit} sent wrong bytes first"},
                self.reasons(work, host),
            )
        self.assertEqual([CACHED, CACHED], self.results(work, first))
        moved = [line for line in logged.output if "goes to the end" in line]
        self.assertEqual([True], [f"host {culprit} " in line for line in moved])

    def parents(self, name: str, number: int = 0) -> tuple[str, ...]:
        route = self.routes(name)[number]
        return () if route is None else route.parents

    def test_terms_that_relay_are_there_for_the_next_process(self) -> None:
        relay = job.RelayTerms(heads=3, sites=(("north", 3), ("", 2)))
        made = self.start(*NAMES, relay=relay)
        self.assertEqual(relay, JobDatabase(self.path).get(made.id).terms.relay)
        self.assertEqual("north", relay.sites_of(NAMES)["three"])
        self.assertEqual("", relay.sites_of(NAMES)["five"])
        self.assertNotIn("relay", job.Terms().to_json())

    def test_a_job_without_heads_is_refused(self) -> None:
        with self.assertRaises(errors.ConfigError):
            job.RelayTerms(heads=0)


class ChainTest(RelayCase):
    """Real agents, each with a cache and a server of its own."""

    def agents(self, hosts: list[RelayHost]) -> Mapping[str, HostAgent]:
        found = {}
        for host in hosts:
            watch = Watch()
            manager = host.manager
            agent = HostAgent(manager, watch=watch, passing_on=PassingOn(manager, host.spools, host.parents))
            self.addCleanup(agent.stop)
            found[host.name] = agent
        return found

    def run_job(self, agents: Mapping[str, HostAgent], names: list[str], images: list[str]) -> job.Job:
        conductor = AggregatePrecacher(
            JobDatabase(str(self.directory / "jobs.sqlite")), InProcessClient(agents)
        )
        work = conductor.start("all", names, images, job.Terms(relay=CHAIN))
        return conductor.run(work.id)

    def test_two_images_come_once_from_the_image_service_to_four_hosts(self) -> None:
        images = {ID: raw_image(1, size=6 * PIECE), OTHER_ID: raw_image(2, size=5 * PIECE)}
        origin = FakeSource(images)
        hosts = self.hosts(4, origin)
        work = self.run_job(self.agents(hosts), [host.name for host in hosts], [ID, OTHER_ID])
        self.assertEqual(8, work.count()[CACHED])
        self.assertEqual(sum(map(len, images.values())), origin.bytes_sent)
        for host in hosts:
            self.assertEqual([images[ID], images[OTHER_ID]], [host.content(each) for each in images])
            self.assertIsNone(host.spools.find(ID))
        self.assertEqual(len(images[ID]), work.cells[hosts[3].name][ID].received)

    def test_an_image_that_one_host_has_already_is_passed_on_from_its_cache(self) -> None:
        origin = FakeSource({ID: raw_image(1, size=4 * PIECE)})
        hosts = self.hosts(3, origin)
        hosts[1].manager.cache_image(ID)
        work = self.run_job(self.agents(hosts), [host.name for host in hosts], [ID])
        self.assertEqual({CACHED: 2, job.Result.EXISTING: 1}, {k: v for k, v in work.count().items() if v})

    def test_an_image_that_is_not_there_fails_on_every_host_with_its_reason(self) -> None:
        hosts = self.hosts(3, FakeSource({}))
        work = self.run_job(self.agents(hosts), [host.name for host in hosts], [ID])
        self.assertEqual(3, work.count()[ERROR])

    def test_a_task_that_is_begun_again_lets_no_host_wait_for_what_ended(self) -> None:
        (host,) = self.hosts(1, FakeSource({ID: raw_image(1, size=PIECE)}))
        agents = self.agents([host])
        agent = agents[host.name]
        task = client.HostTask("job", (ID,), relay=HostRoute((), origin=True))
        agent.begin(task)
        self.wait_for(agent)
        agent.begin(task)
        self.assertFalse(host.spools.is_expected(ID))
        agent.cancel("job")
        self.assertIsNone(host.spools.find(ID))

    def test_what_no_host_reads_any_more_is_not_kept(self) -> None:
        now = [1000.0]
        (host,) = self.hosts(1, FakeSource({ID: raw_image(1, size=PIECE)}), monotonic=lambda: now[0])
        agent = self.agents([host])[host.name]
        agent.begin(client.HostTask("job", (ID,), relay=HostRoute((), origin=True)))
        self.wait_for(agent)
        agent.changes()
        self.assertIsNotNone(host.spools.find(ID))
        now[0] += KEPT_SECONDS + 1
        agent.changes()
        self.assertIsNone(host.spools.find(ID))

    def wait_for(self, agent: HostAgent) -> None:
        until(lambda: all(cell.result is not None for cell in agent.poll("job").cells.values()))

    def test_a_limit_of_a_job_counts_what_is_kept_for_others(self) -> None:
        size = 4 * PIECE
        (host,) = self.hosts(1, FakeSource({ID: raw_image(1, size=size)}))
        passing_on = PassingOn(host.manager, host.spools, host.parents)
        agent = HostAgent(host.manager, watch=Watch(), max_bytes=2 * size - 1, passing_on=passing_on)
        self.addCleanup(agent.stop)
        work = self.run_job({host.name: agent}, [host.name], [ID])
        self.assertEqual(1, work.count()[ERROR])
        self.assertIn("allows", work.cells[host.name][ID].reason)


if __name__ == "__main__":
    unittest.main()
