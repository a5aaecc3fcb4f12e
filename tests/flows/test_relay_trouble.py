# SPDX-License-Identifier: Apache-2.0
"""Routes that make no sense, and hosts in a chain that stop serving though they are there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import imagecache_lib as ic
from imagecache_lib import errors, model
from imagecache_lib.precache.peer import PeerServer
from imagecache_lib.sources.route import Route
from imagecache_lib.store.pieces import PIECE
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, raw_image
from tests.support.relay_hosts import RelayCase

DATA = raw_image(4)


def fast() -> float:
    """A monotonic clock that goes forty times as fast, so that patience ends soon."""
    return 40 * time.monotonic()


class FullDisk(FakeSource):
    """What a host meets whose disk another program fills while bytes come."""

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with super().open(image, offset) as chunks:
            yield self._until_full(chunks)

    def _until_full(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        sent = 0
        for chunk in chunks:
            if sent + len(chunk) > 2 * PIECE:
                raise errors.NoSpaceError("no space is left")
            sent += len(chunk)
            yield chunk


class RouteTest(RelayCase):
    def test_hosts_that_wait_for_each_other_end_with_that_and_ask_no_image_service(self) -> None:
        origin = FakeSource({ID: DATA})
        first, second = self.hosts(2, origin, monotonic=fast)
        running = [
            self.fetching(host, ID, Route([other.name], origin=False))
            for host, other in ((first, second), (second, first))
        ]
        for each in running:
            with self.assertRaisesRegex(errors.SourceError, "no leave"):
                each.result()
        self.assertEqual(0, origin.opens)

    def test_hosts_that_wait_for_each_other_go_on_once_one_has_leave(self) -> None:
        origin = FakeSource({ID: DATA})
        first, second = self.hosts(2, origin)
        waiting, leave = Route([second.name], origin=False), Route([first.name], origin=False)
        running = [self.fetching(first, ID, waiting), self.fetching(second, ID, leave)]
        leave.change([], origin=True)
        self.assertEqual([ic.CacheResult.CACHED] * 2, [each.result() for each in running])
        self.assertEqual(1, origin.opens)

    def test_a_host_that_is_to_wait_for_itself_asks_the_next(self) -> None:
        origin = FakeSource({ID: DATA})
        first, second = self.hosts(2, origin)
        first.fetch(ID, Route([first.name], origin=True))
        second.fetch(ID, Route([second.name, first.name], origin=False))
        self.assertEqual((DATA, 1), (second.content(ID), origin.opens))


class ServingTest(RelayCase):
    def test_a_host_with_another_secret_is_passed_over(self) -> None:
        origin = FakeSource({ID: DATA})
        first, second, third = self.hosts(3, origin)
        for host in (first, second):
            host.fetch(ID, Route())
        assert second.server is not None
        port = second.server.port
        second.stop()
        second.server = PeerServer(
            second.manager, (second.name, port), token="the-secret-of-tomorrow", spools=second.spools
        )
        second.server.start()
        third.fetch(ID, Route([second.name, first.name], origin=False))
        self.assertEqual((DATA, 2), (third.content(ID), origin.opens))

    def test_a_host_whose_disk_is_full_holds_up_those_behind_it_for_a_while_alone(self) -> None:
        origin = FakeSource({ID: DATA})
        first, full, third = self.hosts(3, origin, monotonic=fast)
        full.origin = FullDisk({ID: DATA})
        first.fetch(ID, Route())
        with self.assertRaises(errors.NoSpaceError):
            full.fetch(ID, Route())
        third.fetch(ID, Route([full.name, first.name], origin=False), starved=4000.0)
        self.assertEqual((DATA, 1), (third.content(ID), origin.opens))
