# SPDX-License-Identifier: Apache-2.0
"""A task whose image goes, changes or does not fit while the agent works: what each image ends with."""

from __future__ import annotations

import os
import subprocess

from imagecache_lib.precache import client, job
from imagecache_lib.testing.sources import FakeSource
from tests.flows.test_precache import AgentCase
from tests.support import needs
from tests.support.cache_case import ID, MIB, OTHER_ID, raw_image

CACHED, ERROR = job.Result.CACHED, job.Result.ERROR


class OriginTest(AgentCase):
    def test_an_image_deleted_meanwhile_ends_with_that_and_one_that_was_under_way_is_cached(self) -> None:
        agent = self.agent()
        stop = self.points.stop_at("transfer.chunk")
        agent.begin(client.HostTask("job", (ID, OTHER_ID)))
        stop.wait()
        for image_id in (ID, OTHER_ID):
            self.source.remove(image_id)
        stop.go_on()
        cells = self.wait(agent, "job")
        self.assertEqual([CACHED, ERROR], [cell.result for cell in cells.values()])
        self.assertIn(OTHER_ID, cells[OTHER_ID].reason)
        self.assertEqual([], self.in_flight())

    def test_data_other_than_described_is_fetched_once_and_said_with_both_digests(self) -> None:
        digest = self.source.describe(ID).digest
        assert digest is not None
        self.source.change_data(ID, raw_image(7))
        cells = self.finish(self.agent(), client.HostTask("job", (ID, OTHER_ID), retries=3))
        self.assertEqual([ERROR, CACHED], [cell.result for cell in cells.values()])
        self.assertIn(digest.value, cells[ID].reason)
        self.assertRegex(cells[ID].reason.replace(digest.value, ""), "[0-9a-f]{64}")
        self.assertEqual(2, self.source.opens)
        self.assertFalse(self.base(ID).exists())
        self.assertEqual([], self.in_flight())

    def test_what_was_wrong_at_the_origin_and_is_right_again_is_cached_by_the_next_attempt(self) -> None:
        agent, right = self.agent(), raw_image(1)
        self.source.change_data(ID, raw_image(7))
        self.finish(agent, client.HostTask("job", (ID,)))
        self.source.change_data(ID, right)
        cells = self.finish(agent, client.HostTask("job", (ID,), attempt=1))
        self.assertEqual(CACHED, cells[ID].result)


class RoomTest(AgentCase):
    def setUp(self) -> None:
        super().setUp()
        needs.root()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", self.instances], check=True)
        self.addCleanup(lambda: subprocess.run(["umount", "-l", self.instances], check=True))
        sizes = {"first": 3 * MIB, "too-large": 6 * MIB, "last": MIB}
        self.images = {name: os.urandom(size) for name, size in sizes.items()}

    def test_an_image_without_room_ends_with_what_it_needs_and_the_others_are_cached(self) -> None:
        for sizes in (True, False):
            with self.subTest(sizes=sizes):
                self.source = FakeSource(self.images, sizes=sizes)
                agent = self.agent()
                cells = self.finish(agent, client.HostTask(f"job-{sizes}", tuple(self.images)))
                self.assertEqual(ERROR, cells["too-large"].result)
                self.assertRegex(cells["too-large"].reason, "(?i)space|room|bytes more|full")
                self.assertFalse({cells["first"].result, cells["last"].result} & {ERROR, None})
                self.assertEqual([], self.in_flight())
                self.assertFalse(self.base("too-large").exists())

    def test_once_there_is_room_the_next_attempt_has_it(self) -> None:
        self.source = FakeSource(self.images)
        agent = self.agent()
        self.finish(agent, client.HostTask("job", ("first", "too-large")))
        self.manager().evict_image("first")
        cells = self.finish(agent, client.HostTask("job", ("too-large",), attempt=1))
        self.assertEqual(CACHED, cells["too-large"].result)
