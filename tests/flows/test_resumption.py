# SPDX-License-Identifier: Apache-2.0
"""Downloads whose process died: the next agent goes on at the byte where they broke off."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import subprocess
from collections.abc import Mapping
from typing import Any

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.precache import client, job
from imagecache_lib.sources.identity import identity
from imagecache_lib.store import layout, remains
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.store.pieces import PIECE
from imagecache_lib.testing.sources import FakeSource
from tests.flows.test_precache import AgentCase
from tests.support import needs
from tests.support.cache_case import ID, MIB, OTHER_ID, content_of, disk_image, raw_image
from tests.support.dying import SayingSource, die
from tests.support.relay_hosts import RelayCase

CACHED, ERROR, SKIPPED = job.Result.CACHED, job.Result.ERROR, job.Result.SKIPPED

#: Bytes that a source of these tests sends at a time.
CHUNK = 2**16


class ResumptionCase(AgentCase):
    #: Of the caches.
    options: Mapping[str, Any] = {}

    def manager(self, *arguments: Any, **options: Any) -> ic.ImageCacheManager:
        return super().manager(*arguments, **{**self.options, **options})

    def die(self, data: bytes, *, at: int, **options: Any) -> None:
        """Have a process fetch an image, and be killed at a byte."""
        path = self.directory / "data"
        path.write_bytes(data)
        die(self.instances, path, ID, at, **self.options, **options)

    def offer(self, data: bytes, **says: Any) -> FakeSource:
        """Have the image service offer an image.

        :param says: fields of its description.
        """
        self.source = SayingSource({ID: data}, says, chunk_size=CHUNK)
        return self.source

    def fetch(self, **options: Any) -> job.Cell:
        """Have an agent, which has just started, fetch the image."""
        return self.finish(self.agent(), client.HostTask("job", (ID,), **options))[ID]

    def content(self) -> bytes:
        """Return what a guest sees of the image."""
        with self.manager().fetch_or_reuse(ID) as base:
            return content_of(base.path, base.format)

    def kept(self) -> list[pathlib.Path]:
        """Return the files that hold a source's bytes."""
        stage = self.instances / "_base" / ".imagecache" / "stage"
        notes = {path: json.loads(path.read_bytes()) for path in stage.glob("*.json")}
        return [path.with_suffix("") for path, note in notes.items() if note["source"]]


class DeathTest(ResumptionCase):
    def check(self, data: bytes, expected: bytes, *, slack: int = CHUNK, **says: Any) -> None:
        """Have a process die half way, and an agent fetch the rest.

        :param expected: what a guest sees.
        :param slack: bytes before the death that may be asked for once more.
        :param says: fields of its description.
        """
        at = len(data) // 2
        self.die(data, at=at, **says)
        source = self.offer(data, **says)
        self.assertEqual(CACHED, self.fetch().result)
        (offset,) = source.offsets
        self.assertGreater(offset, 0)
        self.assertLessEqual(at - offset, slack)
        self.assertEqual(len(data) - offset, source.bytes_sent)
        self.assertEqual(expected, self.content())
        self.assertEqual([], self.kept())

    def test_an_image_that_is_stored_as_it_comes(self) -> None:
        noise = os.urandom(2 * MIB)
        self.check(noise, noise)

    def test_an_image_whose_last_bytes_were_zeros(self) -> None:
        data = raw_image(1, 8 * MIB)
        self.check(data, data, slack=3 * MIB)  # no bytes of a file tell that zeros came

    def test_an_image_that_is_stored_in_its_own_format(self) -> None:
        noise = os.urandom(2 * MIB)
        self.options = {"force_raw_images": False}
        self.check(disk_image(self.directory, "qcow2", data=noise), noise, disk_format="qcow2")

    def test_an_image_that_is_decoded_while_it_arrives(self) -> None:
        noise = os.urandom(2 * MIB)
        self.check(disk_image(self.directory, "qcow2", data=noise), noise, disk_format="qcow2")

    def test_an_image_that_is_converted_as_a_whole(self) -> None:
        noise = os.urandom(2 * MIB)
        data = disk_image(self.directory, "vmdk", options="subformat=streamOptimized", data=noise)
        self.check(data, noise, disk_format="vmdk")

    def test_an_image_that_is_compressed_as_a_whole(self) -> None:
        noise = os.urandom(2 * MIB)
        self.check(gzip.compress(noise), noise, compression="gzip")

    def test_one_that_dies_again_and_again_gets_on(self) -> None:
        data = os.urandom(2 * MIB)
        for part in (1, 2, 3):
            self.die(data, at=part * MIB // 2)
            self.assertEqual(part * MIB // 2, max(path.stat().st_size for path in self.kept()))
            self.assertLessEqual(len(self.kept()), 2)
        source = self.offer(data)
        self.assertEqual(CACHED, self.fetch().result)
        self.assertEqual([3 * MIB // 2], source.offsets)
        self.assertEqual([], self.in_flight())

    def test_one_that_had_every_byte_asks_for_none(self) -> None:
        data = os.urandom(MIB)
        self.die(data, at=MIB - 1)
        (stage,) = self.kept()
        stage.write_bytes(data)  # as if it had died while it computed the digest's last bytes
        source = self.offer(data)
        self.assertEqual(CACHED, self.fetch().result)
        self.assertEqual([], source.offsets)
        self.assertEqual(data, self.content())


class DoubtTest(ResumptionCase):
    def setUp(self) -> None:
        super().setUp()
        self.data = os.urandom(MIB)
        self.die(self.data, at=MIB // 2)

    def test_other_data_under_the_same_id_is_fetched_from_its_first_byte(self) -> None:
        other = os.urandom(MIB)
        source = self.offer(other)
        self.assertEqual(CACHED, self.fetch().result)
        self.assertEqual([0], source.offsets)
        self.assertEqual(other, self.content())

    def test_an_image_with_another_entity_tag_is_fetched_from_its_first_byte(self) -> None:
        source = self.offer(self.data, properties={"etag": '"another"'})
        self.assertEqual(CACHED, self.fetch().result)
        self.assertEqual([0], source.offsets)

    def test_without_a_digest_nothing_is_taken_over(self) -> None:
        self.source = FakeSource({ID: self.data}, digests=False)
        self.assertEqual(CACHED, self.fetch().result)
        self.assertEqual([0], self.source.offsets)

    def test_bytes_that_rotted_on_disk_cost_one_more_download_and_no_more(self) -> None:
        (stage,) = self.kept()
        with stage.open("r+b") as file:
            file.write(bytes(4096))
        source = self.offer(self.data)
        self.assertEqual(CACHED, self.fetch().result)
        self.assertEqual([MIB // 2, 0], source.offsets)
        self.assertEqual(self.data, self.content())
        self.assertEqual([], self.in_flight())

    def test_an_image_service_that_ignores_ranges_sends_all_of_it(self) -> None:
        source = self.offer(self.data)
        source.refuses_resume = True
        self.assertEqual(CACHED, self.fetch().result)
        self.assertEqual([MIB // 2, 0], source.offsets)
        self.assertEqual(self.data, self.content())

    def test_what_a_living_process_fetches_is_not_taken_from_it(self) -> None:
        source, stop = self.offer(os.urandom(MIB)), self.points.stop_at("transfer.chunk")
        agent, manager = self.agent(), self.manager()
        agent.begin(client.HostTask("job", (ID,)))
        stop.wait()
        cache, data = CacheStore(manager.config, manager.host), identity(source.describe(ID))
        self.assertIsNone(remains.find(cache, layout.base_name(ID), data))
        stop.go_on()
        self.assertEqual(CACHED, self.wait(agent, "job")[ID].result)


class LeavingTest(ResumptionCase):
    """What is left, and for how long."""

    def test_what_a_source_broke_off_is_gone_on_with_by_the_agents_next_try(self) -> None:
        data = os.urandom(MIB)
        source = self.offer(data)
        source.break_at(MIB // 2)
        self.assertEqual(CACHED, self.fetch(retries=1).result)
        self.assertEqual([0, MIB // 2], source.offsets)
        self.assertEqual(data, self.content())
        self.assertEqual([], self.in_flight())

    def test_an_agent_that_ends_leaves_what_came_to_the_next_one(self) -> None:
        data = os.urandom(MIB)
        source, stop = self.offer(data), self.points.stop_at("transfer.chunk")
        agent = self.agent()
        agent.begin(client.HostTask("job", (ID,)))
        stop.wait()
        agent.stop(timeout=0.0)
        stop.go_on()
        agent.stop()
        self.assertEqual(1, len(self.kept()))
        self.assertEqual(CACHED, self.fetch().result)
        self.assertEqual([0, CHUNK], source.offsets)
        self.assertEqual(data, self.content())

    def test_a_task_that_is_cancelled_leaves_nothing(self) -> None:
        self.die(data := os.urandom(MIB), at=MIB // 2)
        self.offer(data)
        agent, stop = self.agent(), self.points.stop_at("transfer.chunk")
        agent.begin(client.HostTask("job", (ID,)))
        stop.wait()
        agent.cancel("job")
        stop.go_on()
        self.assertEqual(SKIPPED, self.wait(agent, "job")[ID].result)
        self.assertEqual([], self.in_flight())

    def test_an_image_that_is_refused_leaves_nothing(self) -> None:
        self.die(data := os.urandom(MIB), at=MIB // 2)
        source = self.offer(data)
        source.change_data(ID, os.urandom(MIB))
        self.assertEqual(ERROR, self.fetch().result)
        self.assertEqual([MIB // 2, 0], source.offsets)
        self.assertEqual([], self.in_flight())

    def test_what_nobody_goes_on_with_is_swept_like_all_that_is_in_flight(self) -> None:
        self.die(os.urandom(MIB), at=MIB // 2)
        (kept,) = self.kept()
        self.manager().verify_base_images([])
        self.assertTrue(kept.exists())
        os.utime(kept, (1000, 1000))
        self.manager().verify_base_images([])
        self.assertEqual([], self.in_flight())

    def test_no_base_is_evicted_for_what_is_left(self) -> None:
        needs.root()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", self.instances], check=True)
        self.addCleanup(lambda: subprocess.run(["umount", "-l", self.instances], check=True))
        base, data = os.urandom(MIB), os.urandom(4 * MIB)
        self.source = FakeSource({OTHER_ID: base})
        self.manager().cache_image(OTHER_ID)
        self.die(data, at=3 * MIB)
        source = self.offer(data)
        self.assertEqual(CACHED, self.fetch().result)
        self.assertEqual([0], source.offsets)
        self.assertTrue(self.base(OTHER_ID).exists())

    def test_fetches_for_disks_leave_nothing(self) -> None:
        self.source.break_at(MIB)
        with self.assertRaises(errors.SourceError):
            self.manager().create_disk(ID, self.target())
        self.assertEqual([], self.in_flight())


class RelayTest(RelayCase):
    """A host that passes an image on, and dies."""

    def left(self, data: bytes, at: int) -> pathlib.Path:
        """Have a host's process die at a byte, and return the host's directory."""
        (self.directory / "data").write_bytes(data)
        directory = self.directory / "host-11"
        directory.mkdir()
        die(directory, self.directory / "data", ID, at, relays=True)
        return directory

    def test_its_spool_is_gone_on_with_and_passed_on(self) -> None:
        data = os.urandom(8 * PIECE + 100)
        self.left(data, 5 * PIECE)
        origin = FakeSource({ID: data}, chunk_size=CHUNK)
        first, second = self.hosts(2, origin)
        routes = self.chain([first, second])
        running = self.fetching(second, ID, routes[1])
        self.assertEqual(ic.CacheResult.CACHED, first.fetch(ID, routes[0]))
        self.assertEqual(ic.CacheResult.CACHED, running.result())
        self.assertEqual([5 * PIECE], origin.offsets)
        self.assertEqual([data, data], [host.content(ID) for host in (first, second)])

    def test_bytes_of_it_that_rotted_blame_no_other_host(self) -> None:
        data = os.urandom(8 * PIECE + 100)
        stage = self.left(data, 5 * PIECE) / "_base" / ".imagecache" / "stage"
        for path in stage.iterdir():
            if "." not in path.name and path.stat().st_size == 5 * PIECE:
                with path.open("r+b") as file:
                    file.write(bytes(4096))
        origin = FakeSource({ID: data}, chunk_size=CHUNK)
        (host,) = self.hosts(1, origin)
        (route,) = self.chain([host])
        self.assertEqual(ic.CacheResult.CACHED, host.fetch(ID, route))
        self.assertEqual(data, host.content(ID))
        self.assertEqual([5 * PIECE, 0], origin.offsets)
        self.assertEqual(((), False), (tuple(route.state.wrong), route.state.mismatched))
