# SPDX-License-Identifier: Apache-2.0
"""Where no thread can be started, a call fails with an error of the library's, and works again afterwards."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.precache import client, job
from imagecache_lib.system import threads
from tests.flows.test_precache import AgentCase, JobCase
from tests.support.cache_case import ID, MIB, OTHER_ID, CacheCase, content_of, raw_image
from tests.support.no_threads import no_more_threads


class NoThreadsTest(CacheCase):
    def assert_host_at_fault(self, call: Callable[[], object]) -> None:
        with (
            no_more_threads(),
            self.assertRaisesRegex(errors.BackendError, "no thread can be started") as found,
        ):
            call()
        self.assertIn("limit of tasks", found.exception.next_step or "")

    def test_what_fetches_leaves_nothing_and_works_afterwards(self) -> None:
        manager = self.manager()
        manager.create_disk(OTHER_ID, self.target("other"))
        before = self.tree()
        calls: dict[str, Callable[[], object]] = {
            "disk": lambda: manager.create_disk(ID, self.target()),
            "raw disk": lambda: manager.create_disk(ID, self.target("raw"), backend="raw"),
            "kernel": lambda: manager.fetch_file(ID, self.target("kernel")),
            "swap": lambda: manager.create_swap(self.target("swap"), size_mb=1),
        }
        for what, call in calls.items():
            with self.subTest(what):
                self.assert_host_at_fault(call)
                self.assertEqual(before.keys(), self.tree().keys())
        for call in calls.values():
            call()
        self.assertEqual(content_of(self.target(), "qcow2"), raw_image(1))

    def test_a_pass_evicts_nothing(self) -> None:
        manager = self.manager(remove_unused_original_minimum_age_seconds=0)
        manager.cache_image(ID)
        self.assert_host_at_fault(lambda: manager.verify_base_images([]))
        self.assertTrue(self.base().exists())

    def test_a_scrub_condemns_no_base(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        self.assert_host_at_fault(manager.scrub)
        self.assertEqual([ic.Verdict.SOUND], [each.verdict for each in manager.scrub().bases])

    def test_a_disk_is_as_it_was(self) -> None:
        manager = self.manager()
        disk = manager.create_disk(ID, self.target())
        self.assert_host_at_fault(lambda: manager.resize_disk(disk, 8 * MIB))
        self.assert_host_at_fault(lambda: manager.flatten_disk(disk))
        self.assertEqual(disk, manager.inspect_disk(disk.target))
        self.assertEqual(content_of(disk.target, "qcow2"), raw_image(1))

    def test_a_driver_gets_no_lease_that_nothing_keeps(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)

        def lease() -> None:
            with manager.fetch_or_reuse(ID):
                self.fail("it is not kept")

        self.assert_host_at_fault(lease)
        with manager.fetch_or_reuse(ID) as base:
            self.assertIsInstance(base, ic.BaseImage)


class NoThreadsForJobsTest(JobCase):
    def test_what_cannot_begin_says_why_and_works_afterwards(self) -> None:
        conductor, work = self.precacher(), self.start()
        calls: dict[str, Callable[[], object]] = {
            "plan": lambda: conductor.plan(["one", "two"], self.IMAGES),
            "run": lambda: conductor.run(work.id),
            "resume": lambda: conductor.resume(work.id),
        }
        for what, call in calls.items():
            with (
                self.subTest(what),
                no_more_threads(),
                self.assertRaisesRegex(errors.BackendError, "no thread can be started"),
            ):
                call()
        self.assertEqual([], [host.begun for host in self.hosts.hosts.values() if host.begun])
        self.assertTrue(conductor.run(work.id).is_over)
        self.assertEqual({job.Result.CACHED}, set(self.results(self.only_job(), "three")))

    def test_a_cancellation_that_no_host_heard_of_is_made_again(self) -> None:
        conductor, work = self.precacher(), self.start()
        with no_more_threads(), self.assertRaisesRegex(errors.BackendError, "no thread can be started"):
            conductor.cancel(work.id)
        self.assertTrue(self.only_job().cancelled)
        self.assertTrue(conductor.cancel(work.id).is_over)

    def test_a_job_goes_on_with_the_threads_that_there_are(self) -> None:
        work = self.start(concurrency=3)
        with contextlib.ExitStack() as scarce:

            def before(_call: str) -> None:
                scarce.enter_context(no_more_threads())
                for host in self.hosts.hosts.values():
                    host.before = lambda _call: None

            for host in self.hosts.hosts.values():
                host.before = before
            ended = self.precacher().run(work.id)
        for name in ended.hosts:
            self.assertEqual({job.Result.CACHED}, set(self.results(ended, name)))

    def test_one_thread_does_what_several_were_to_do(self) -> None:
        numbers = itertools.count()
        with threads.Pool(3, "test") as pool, no_more_threads():
            calls = [pool.submit(lambda: next(numbers)) for _ in range(5)]
            self.assertEqual([0, 1, 2, 3, 4], [call.result(60) for call in calls])


class NoThreadsForTasksTest(AgentCase):
    def test_a_host_takes_a_task_later(self) -> None:
        agent, task = self.agent(), client.HostTask("job", (ID,))
        with no_more_threads(), self.assertRaisesRegex(client.HostBusy, "no thread can be started"):
            agent.begin(task)
        with self.assertRaises(client.UnknownTask):
            agent.poll("job")
        self.assertEqual(job.Result.CACHED, self.finish(agent, task)[ID].result)
