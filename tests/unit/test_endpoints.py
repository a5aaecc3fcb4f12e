# SPDX-License-Identifier: Apache-2.0
"""One endpoint of a Glance sends other data than the image's, of the right length and under its name."""

from __future__ import annotations

import random
import unittest

from imagecache_lib import errors, model
from imagecache_lib.sources import endpoints, transfer
from imagecache_lib.sources.glance import GlanceSource
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import data_answer
from tests.support.servers import GlanceServer
from tests.unit.test_http_servers import QUIET, fetch

DATA = random.Random(9).randbytes(200_000)
WRONG = bytes(8) + DATA[8:]
FILE = "/v2/images/x/file"


class EndpointsCase(unittest.TestCase):
    def setUp(self) -> None:
        self.first, self.second, self.third = (self.enterContext(GlanceServer()) for _ in range(3))
        for server in (self.first, self.second, self.third):
            server.add("x", DATA)

    def source(self, *servers: GlanceServer) -> GlanceSource:
        return GlanceSource([server.url for server in servers], timeout=(60.0, 60.0))

    def damage(self, *servers: GlanceServer) -> None:
        for server in servers:
            server.script(FILE, lambda seen: data_answer(WRONG, seen))

    def reads(self, server: GlanceServer) -> int:
        return len(server.requests("GET", FILE))


class TestDamagedCopies(EndpointsCase):
    def test_the_next_one_is_asked(self) -> None:
        self.damage(self.first)
        self.assertEqual(DATA, fetch(self.source(self.first, self.second), retries=1))
        self.assertEqual((1, 1), (self.reads(self.first), self.reads(self.second)))

    def test_all_of_them_are_asked(self) -> None:
        self.damage(self.first, self.second)
        self.assertEqual(DATA, fetch(self.source(self.first, self.second, self.third), retries=2))

    def test_what_all_of_them_send_is_the_images_fault(self) -> None:
        self.damage(self.first, self.second)
        source = self.source(self.first, self.second)
        for times in (1, 2):  # whoever asks later asks all of them anew
            self.assertRaises(errors.ImageRejected, fetch, source, retries=3)
            self.assertEqual((times, times), (self.reads(self.first), self.reads(self.second)))

    def test_what_one_of_them_sends_is_not_as_long_as_another_one_was_not_asked(self) -> None:
        self.damage(self.first)
        source = self.source(self.first, self.second)
        with self.assertRaisesRegex(
            errors.SourceError, f"{self.first.url} sends data that is not the image's"
        ):
            fetch(source, retries=0)
        self.assertEqual(DATA, fetch(source, retries=0))

    def test_a_damaged_one_is_asked_last_from_then_on(self) -> None:
        self.damage(self.first)
        source = self.source(self.first, self.second)
        self.assertEqual(DATA, fetch(source, retries=1))
        self.second.fail(FILE, faults.truncated(1000))
        self.first.add("x", DATA)
        self.first.script(FILE, lambda seen: data_answer(DATA, seen))
        self.assertEqual(DATA, fetch(source, retries=1))
        self.assertEqual("bytes=1000-", self.second.requests("GET", FILE)[-1].headers.get("Range"))
        self.second.always_fail(FILE, faults.status(503))
        self.assertEqual(DATA, fetch(source, retries=0))  # which is better than none

    def test_a_splice_of_two_is_neithers_fault(self) -> None:
        self.damage(self.first)
        self.first.fail(FILE, faults.truncated(1000))
        source = self.source(self.first, self.second)
        self.assertEqual(DATA, fetch(source, retries=2))

    def test_of_one_endpoint_alone_nothing_else_is_asked(self) -> None:
        self.damage(self.first)
        for source in (self.source(self.first), self.source(self.first, self.first)):
            self.assertRaises(errors.ImageRejected, fetch, source, retries=3)
        self.assertEqual(2, self.reads(self.first))

    def test_more_data_than_the_image_has(self) -> None:
        self.first.script(FILE, lambda seen: data_answer(DATA + b"more", seen))
        self.first.always_fail(FILE, faults.chunked())
        self.assertEqual(DATA, fetch(self.source(self.first, self.second), retries=1))

    def test_other_images_are_asked_for_as_before(self) -> None:
        self.damage(self.first)
        source = self.source(self.first, self.second)
        self.first.add("y", DATA)
        self.assertEqual(DATA, fetch(source, retries=1))
        source.describe("x")
        before = len(self.second.requests())
        found, image = transfer.describe(source, "x", host=QUIET)
        self.assertEqual(DATA, b"".join(transfer.Transfer(found, image, host=QUIET).chunks()))
        self.assertEqual(2, len(self.second.requests()) - before)


class TestSuspects(unittest.TestCase):
    def test_no_more_images_are_remembered_than_some(self) -> None:
        suspects = endpoints.Suspects(("a", "b"))
        images = [model.Image(str(number)) for number in range(1000)]
        for image in images:
            self.assertTrue(suspects.blame(image, "a"))
        remembered = [image for image in images if suspects.of(image)]
        self.assertLess(len(remembered), 100)
        self.assertEqual(images[-len(remembered) :], remembered)
