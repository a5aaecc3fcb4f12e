# SPDX-License-Identifier: Apache-2.0
"""Where no thread can be started, a call fails with an error of the library's, and works again afterwards."""

from __future__ import annotations

from collections.abc import Callable

import imagecache_lib as ic
from imagecache_lib import errors
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
